"""What opens over the main screen: lists, questions, the help.

`over` has it shown, `choose` and `pick` are lists to choose from, `toggle` is one of switches,
`screens` holds the help and the line that asks.
"""
