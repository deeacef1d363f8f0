"""What a training loop does around the calls of its modules.

`wrappers` sees what has no hook, `optimizers` the steps and with them the gate, `losses` what
backward starts from, `batches` and `orders` what loaders give, `carried` and `by_hand` what becomes
of gradients and of weights that no optimizer moves.
"""
