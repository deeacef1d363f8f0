"""Ten linear layers, a sigmoid after each: the gradient dies on its way to the first ones.

A sigmoid multiplies the gradient by at most 1/4. You will see one finding that names the layers and
shows how the gradient shrinks from the last to the first of them; the loss hardly moves.

Expect: TT202 stack.0 step 3
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits

DEPTH = 10


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential()
        for _ in range(DEPTH):
            self.stack.append(nn.Linear(64, 64)).append(nn.Sigmoid())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.stack(x.flatten(1)))


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images = images / 16
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(32):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f} (guessing gives 2.303)")


if __name__ == "__main__":
    main()
