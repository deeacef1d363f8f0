"""A convolutional classifier of digits, with validation after each epoch: nothing is wrong with it.

You will see the summary line only: no finding.

Expect: nothing
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from tensortrace import trace
from tensortrace.demo import load_digits


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4 * 4, 10),
    )


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    data = TensorDataset(images[:, None] / 16, labels)
    training, validation = random_split(data, [1500, 297])
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    with trace(*sys.argv[1:]):
        for epoch in range(3):
            model.train()
            for x, y in DataLoader(training, batch_size=64, shuffle=True):
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                right = sum((model(x).argmax(1) == y).sum() for x, y in DataLoader(validation, 99))
            print(f"epoch {epoch}: loss {loss:.3f}, {right} of {len(validation)} digits right")


if __name__ == "__main__":
    main()
