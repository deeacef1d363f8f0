"""What goes to the terminal and comes from it.

`looks` has the colours and `styled` the glyphs, `strips` are lines that cost little, `painting` and
`paints` write what changed, `keyboard` reads keys, `quick` has them answered soon.
"""
