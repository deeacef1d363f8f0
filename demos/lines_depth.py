"""Two frames deep: the lines of a training step, and of the forward that it reaches through torch.

You will see the function's lines and, further in, those of `forward`; the frames of torch between
them are neither told nor counted. `loss.backward()` makes the first infinity: the log flags it.

Expect: TT102 (root) step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace


class Distance(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        squares = (x - self.place).square()
        total = squares.sum(1)
        return total.sqrt()


@trace(*sys.argv[1:], lines={"depth": 2, "output": "stderr"})
def train_step(model, optimizer, x):
    distance = model(x)
    loss = distance.mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def main():
    model = Distance()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    print(f"loss {train_step(model, optimizer, x)}")


if __name__ == "__main__":
    main()
