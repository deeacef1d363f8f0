"""The viewer: a Textual program over a `Run`, the only part that imports textual.

`app` is the program and `frame` its one screen: panes of lines over the records of a step
(`step/`), in whose place a view may stand (`views/`). Lists and questions open over it
(`dialogs/`), and `terminal/` paints it. `walk` and `seek` move through the run, `background` reads
it in threads.
"""
