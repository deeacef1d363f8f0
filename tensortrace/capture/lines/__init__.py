"""Source lines: which ones ran, and what each changed.

`tracer` decides which code is followed, `frames` follows one frame of it (`events`, `statements`,
`comprehensions`), `variables` finds what a line has changed, which `reader` puts into words.
`thinning` and `deferred` make loops cheap, `drafts` and `marks` are what goes to the log, `live`
what is printed. `options` is the class that users meet.
"""
