"""A classifier for images of 8 x 8 gets images of 16 x 16: the program ends with an exception.

PyTorch says `mat1 and mat2 shapes cannot be multiplied (32x256 and 64x10)`. You will see which
layer, which line, which variable, and which of its dims does not fit; then the exception goes on
as it would without tracing.

Expect: TT801 head step 1
"""

import sys

import torch
from torch import nn

from tensortrace import trace


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        pixels = self.flatten(images)
        return self.head(pixels)


def main():
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(*sys.argv[1:]):
        for width in (8, 16):
            images, labels = torch.rand(32, width, width), torch.randint(10, (32,))
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
