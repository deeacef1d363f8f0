"""The records of one step.

`slots`, `rows` and `folds` make them the rows of a table, `cells`, `calls` and `detail` make text
of a row, `flow` says where its tensors come from and go to.
"""
