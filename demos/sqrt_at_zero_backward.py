"""A contrastive loss draws the same image twice: the distance is 0, its gradient is NaN.

The square root is finite at 0, so every forward value and the loss are fine. Its derivative there
is infinite, and infinity times the zero in front of it is NaN. You will see a finding in the
backward pass, at the line of the square root, in the first step that has such a pair.

Expect: TT102 sqrt step 47
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits

MARGIN = 1.0


def contrastive_loss(a, b, same):
    distance = ((a - b) ** 2).sum(dim=1).sqrt()
    return torch.where(same, distance**2, (MARGIN - distance).relu() ** 2).mean()


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images = images / 16
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with trace(*sys.argv[1:]):
        for step in range(60):
            i, j = torch.randint(len(images), (2, 64))
            loss = contrastive_loss(model(images[i]), model(images[j]), labels[i] == labels[j])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                print(f"step {step}: loss {loss:.4f}")


if __name__ == "__main__":
    main()
