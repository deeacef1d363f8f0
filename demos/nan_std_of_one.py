"""A hand-written batch norm works until the last batch of the epoch, which has one image.

1797 images in batches of 449 leave one over. The standard deviation of one value is 0 / 0. You will
see `std` inside the norm at step 4, and that it was given a single element.

Expect: TT101 norm step 4
"""

import sys
import warnings

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class Standardize(nn.Module):
    def forward(self, x):
        return (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-5)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 64)
        self.norm = Standardize()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm(self.hidden(x.flatten(1))).relu())


def main():
    torch.manual_seed(0)
    # torch warns of it, once, in a message that is easy to miss.
    warnings.filterwarnings("ignore", ".*degrees of freedom")
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images = images / 16
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(449):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
