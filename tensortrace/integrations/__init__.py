"""Place for adapters to training frameworks, one file each; none is needed so far.

`with trace():` around the call of a trainer (Lightning, transformers) sees its loop as it is.
"""
