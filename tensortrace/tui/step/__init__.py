"""The records of one step, as the table shows them.

`slots`, `rows` and `folds` make them rows (`row`), `cells` and `calls` make text of a row, `detail`
tells all of one (`distribution`, `profile`). `flow` says where its tensors come from and go to,
`findings` lists those of the run.
"""
