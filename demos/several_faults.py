"""Two faults at once: pixels from 0 to 255 go in as they are, and zero_grad is forgotten.

The loss falls at first, then the run dies of NaN in the loss, where it shows and where it does not
come from. You will see the two faults long before that, then what they lead to, step by step.

Expect: TT601 0 step 2
Expect: TT206 0.weight step 3
Expect: TT402 2 step 14
Expect: TT201 2 step 16
Expect: TT101 mse_loss step 17
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


def main():
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits()[0]).flatten(1) * 255 / 16  # as in a PNG file
    encoder = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.1), nn.Linear(32, 8))
    decoder = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.1), nn.Linear(32, 64))
    model = nn.Sequential(*encoder, *decoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-5)
    with trace(*sys.argv[1:]):
        for step, x in enumerate(images[torch.randperm(len(images))].split(32)[:24]):
            loss = nn.functional.mse_loss(model(x), x)
            loss.backward()
            optimizer.step()
            if step % 4 == 0:
                print(f"step {step}: loss {loss:.3g}")


if __name__ == "__main__":
    main()
