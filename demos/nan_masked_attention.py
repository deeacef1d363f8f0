"""Attention over the columns of an image skips blank ones; where all are blank, softmax is 0 / 0.

A column may look at itself and at those left of it, but not at blank ones. The first column of most
digits is blank: it may look at nothing, its scores are -inf throughout, their softmax is NaN. You
will see the softmax inside the attention, its line, and the line that the -inf came from.

Expect: TT101 attention step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class ColumnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT / 8**0.5
        before = torch.ones(8, 8, dtype=torch.bool).tril()
        inked = x.any(dim=-1)
        scores = scores.masked_fill(~(before & inked[:, None, :]), float("-inf"))
        return scores.softmax(dim=-1) @ self.value(x)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = ColumnAttention()
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.attention(images.mT).flatten(1))


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images = images / 16
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(32)[:10]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
