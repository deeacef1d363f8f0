"""Source lines: which ones ran, and what each changed.

`tracer` decides which code is followed (`calls` counts the calls of the rest), `frames` follows one
frame of it (`events`, `statements`, `comprehensions`), while our own code has Python's trace
function rest (`tracing`). `variables` and `watched` find what a line has changed, which `reader`
puts into words (`values`, `tensor_words`). `thinning` and `deferred` make loops cheap, `drafts` and
`marks` are what goes to the log, `live` what is printed. `options` is the class that users meet.
"""
