"""Blank pixels are kept away from a logarithm by `where`, which helps the forward pass only.

What comes out is finite, and so is the loss. But `where` sends a gradient of 0 to the branch it
did not take, the slope of log at 0 is infinite, and 0 * inf is NaN. You will see the log inside the
module, its line, and that `where` does not use what it made.

Expect: TT102 scale step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class LogScale(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, torch.log(x), 0.0)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(64))
        self.scale = LogScale()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.scale(self.gain * x.flatten(1)))


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(32)[:20]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
