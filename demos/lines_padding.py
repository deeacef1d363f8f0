"""Words are averaged over a sentence, and in one batch a sentence is padding alone: 0 / 0.

You will see the division and its line. `tensortrace lines log.jsonl --function forward` prints the
source with the shapes that flowed through each line, and the steps in which they were not finite.

Expect: TT101 (root) step 7
"""

import sys

import torch
from torch import nn

from tensortrace import trace


class Net(nn.Module):
    def __init__(self, vocabulary=1000, width=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for i in range(4):
            x = self.layers[i](x).relu()
        words = (ids > 3)[..., None]  # the rest is padding
        pooled = (x * words).sum(1) / words.sum(1)
        return self.head(pooled)


@trace(*sys.argv[1:], lines={"depth": 2})
def train_step(model, optimizer, ids, labels):
    loss = nn.functional.cross_entropy(model(ids), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(12):
        ids = torch.randint(4, 1000, (8, 97 if step < 6 else 128))
        if step == 7:
            ids[3] = 0
        train_step(model, optimizer, ids, torch.randint(10, (8,)))


if __name__ == "__main__":
    main()
