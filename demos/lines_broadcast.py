"""A line is to be fitted, and the loss stays near the variance of the targets.

You will see `error` with 8 x 8 numbers where 8 were meant: `prediction` has a dim more than `y`. In
the log that line is flagged "broadcast".

Expect: TT604 sub step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace


@trace(*sys.argv[1:], lines={"output": "stderr", "relative_time": True})
def fit(model, optimizer, x, y):
    optimizer.zero_grad()
    prediction = model(x)
    error = y - prediction
    loss = (error**2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def main():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 8).reshape(8, 1)
    y = 3 * x.reshape(8) + 1
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = fit(model, optimizer, x, y)
    print(f"loss {loss:.3f}, variance of the targets {y.var():.3f}")


if __name__ == "__main__":
    main()
