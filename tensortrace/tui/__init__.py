"""The viewer: a Textual program over a `Run`, the only part that imports textual.

`app` is the program, a method for each key, and `frame` its one screen: panes of lines over the
records of a step (`step/`), in whose place a view may stand (`views/`). `stand` is the place in the
run that the screen shows. Objects of the program go elsewhere and read the run: `walk`, `folding`,
`seek`, `asking`, `opening`, `background`, `ahead`. Lists and questions open over it all
(`dialogs/`), and `terminal/` paints it.
"""
