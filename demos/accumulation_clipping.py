"""Gradients of four micro-batches add up, are clipped, then used, with a learning rate schedule.

You will see the summary line only: no finding. One micro-batch is one step, four make one update.

Expect: nothing
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrace import trace
from tensortrace.demo import load_digits

ACCUMULATE = 4


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    data = TensorDataset(images / 16, labels)
    loader = DataLoader(data, batch_size=16, shuffle=True, drop_last=True)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.LayerNorm(128),
        nn.GELU(),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=len(loader) // ACCUMULATE
    )
    with trace(*sys.argv[1:]):
        for i, (x, y) in enumerate(loader, start=1):
            loss = nn.functional.cross_entropy(model(x), y)
            (loss / ACCUMULATE).backward()
            if i % ACCUMULATE == 0:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if i % 28 == 0:
                print(f"micro-batch {i}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
