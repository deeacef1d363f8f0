"""Prices of houses are learnt in float16: the run is dead by step 300, and the loss looks healthy.

A price is above 0, so the network gives its logarithm. What it predicts begins at a dollar and
rises with each step, as it should, until one is over 65504: float16 ends there, at exp of 11.1. You
will see the op, its line and what it got. In bfloat16 the same program learns.

Expect: TT101 (root) step 298
"""

import sys

import torch
from torch import nn

from tensortrace import trace


def houses(count):
    """Space, rooms, age and distance, each from 0 to 1; the price in dollars."""
    features = torch.rand(count, 4)
    return features, 200_000 + features @ torch.tensor([90_000.0, 60_000.0, -40_000.0, -70_000.0])


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        logarithm = self.head(self.body(x)).squeeze(-1)
        return logarithm.exp()


def main():
    torch.manual_seed(0)
    model = Regressor()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.3e-4)
    with trace(*sys.argv[1:]):
        for step in range(301):
            x, price = houses(64)
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.l1_loss(model(x), price)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 60 == 0:
                print(f"step {step}: off by {loss:.0f} dollars on average")


if __name__ == "__main__":
    main()
