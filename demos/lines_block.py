"""A block in the middle of a function, with expressions that are followed like variables.

You will see the lines of the block only, the statistics of each tensor, and the gradient and the
settings of the optimizer wherever they change: `watch` and `watch_explode` name them.

Expect: nothing
"""

import sys

import torch
from torch import nn

from tensortrace import Lines, trace

LINES = Lines(
    output="stderr", statistics=True, watch="layer.weight.grad", watch_explode="group", prefix="| "
)


def main():
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    x = torch.randn(8, 3)
    with trace(*sys.argv[1:], lines=LINES):
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        group["lr"] = 0.05
    print(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
