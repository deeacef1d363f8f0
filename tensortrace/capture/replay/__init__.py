"""From a module whose values went bad to the op and the line, without running the program twice.

`narrow` chooses which of the outermost calls that `roots`, one folder up, has kept is run again,
`aside` makes stand-ins for all that it may touch, `rerun` runs it at op level.
"""
