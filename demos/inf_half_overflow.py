"""Scores are computed in float16, and the pixels are fed as they are, 0 to 16: they do not fit.

float16 ends at 65504. Products of a few hundred, summed, are larger, so they are inf, and inf - inf
in the softmax is NaN. You will see the matmul inside the module, with the range of what went in;
in bfloat16 the same program is fine.

Expect: TT101 similarity step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class Similarity(nn.Module):
    """How much each image of a batch is like each other."""

    def forward(self, x):
        x = (x * 16).half()
        return (x @ x.T).float()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.similarity = Similarity()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.body(x.flatten(1))
        return self.head(self.similarity(x).softmax(dim=-1) @ x)


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(32)[:20]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
