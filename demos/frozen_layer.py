"""The optimizer is given two of three layers: the one in the middle never learns.

It has gradients like the others, and the loss goes down all the same, so nobody notices. You will
see its parameters named.

Expect: TT401 layer2.weight step 3
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(64, 64)
        self.layer2 = nn.Linear(64, 64)
        self.layer3 = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer1(x.flatten(1)).relu()
        x = self.layer2(x).relu()
        return self.layer3(x)


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images = images / 16
    model = Classifier()
    optimizer = torch.optim.Adam(
        [
            {"params": model.layer1.parameters(), "lr": 1e-3},
            {"params": model.layer3.parameters(), "lr": 1e-2},
        ]
    )
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(32):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
