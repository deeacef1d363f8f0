"""What a training loop does around the calls of its modules.

`wrappers` sees what has no hook, `optimizers` the steps and with them the gate, `losses` what
backward starts from. `batches` and `orders` look at what loaders give, `loaders` whether another
batch is to come, so that a turn over one that is kept is a step. `carried` and `by_hand` say what
becomes of gradients, and of weights that no optimizer moves.
"""
