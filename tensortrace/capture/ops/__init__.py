"""Ops: what a function of torch's took and gave, and the line that called it.

`function_mode` sees them, `calls` describes one, `names` says how it is called. `places` knows
those of a loop again and which of their turns are recorded, `passed` is about the others.
`backward` runs the passes that the loop asks for.
"""
