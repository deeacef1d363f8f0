"""A pretrained network is fine-tuned: nothing of it is loaded, and its new head is never trained.

The weights were saved from a wrapped model, so that each name begins with "module."; strict=False
passes over them all. The new head came after the optimizer. You will see first that nothing was
loaded, then that the optimizer still holds the old head.

Expect: TT408 - step 0
Expect: TT405 head.weight step 3
"""

import sys
from io import BytesIO

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(x))


def train(model, optimizer, images, labels):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"last loss: {loss:.3f}")


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    images, file = images / 16, BytesIO()
    pretrained = nn.DataParallel(Classifier())
    optimizer = torch.optim.Adam(pretrained.parameters(), lr=3e-3)
    train(pretrained, optimizer, images[:1000], labels[:1000])
    torch.save(pretrained.state_dict(), file)
    file.seek(0)

    with trace(*sys.argv[1:]):
        model = Classifier()
        model.load_state_dict(torch.load(file), strict=False)
        model.body.requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        model.head = nn.Linear(64, 2)
        train(model, optimizer, images[1000:], labels[1000:] % 2)


if __name__ == "__main__":
    main()
