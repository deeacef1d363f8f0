"""A residual sum written with `+=` overwrites what backward() needs: the program ends there.

PyTorch says that a variable "has been modified by an inplace operation", and hints at anomaly
mode. You will see the line that overwrote it and the line that needed it.

Expect: TT801 backward step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace


def smooth(hidden, strength):
    gate = torch.sigmoid(hidden)
    gate += strength
    return (hidden * gate).mean()


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(*sys.argv[1:]):
        for _ in range(3):
            loss = smooth(model(torch.randn(8, 16)), 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
