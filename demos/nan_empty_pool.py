"""A mean over the black pixels of an image divides by their number, and one image has none.

Most batches are fine. In the first with such an image the pool divides 0 by 0, and from then on
everything is NaN. You will see the division inside the pool, its line, and where its zeros were
counted.

Expect: TT101 pool step 20
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class BlackPool(nn.Module):
    def forward(self, features, images):
        black = (images == 1).float()[:, None]
        total = (features * black).sum(dim=(2, 3))
        count = black.sum(dim=(2, 3))
        return total / count


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.pool = BlackPool()
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        features = self.conv(images[:, None]).relu()
        return self.head(self.pool(features, images))


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images = images / 16
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(8)[:40]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
