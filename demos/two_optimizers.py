"""A GAN learns to draw digits: two models, two optimizers, three backward passes a batch; healthy.

You will see the summary line only: no finding. Gradients that the generator's loss leaves in the
discriminator are wiped before they are used, as they should be.

Expect: nothing
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrace import trace
from tensortrace.demo import load_digits

NOISE = 16


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())


class Discriminator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


def main():
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits()[0]).flatten(1) / 16
    loader = DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True)
    generator, discriminator = Generator(), Discriminator()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    criterion = nn.BCEWithLogitsLoss()
    real, fake = torch.ones(64, 1), torch.zeros(64, 1)
    with trace(*sys.argv[1:]):
        for epoch in range(2):
            for (x,) in loader:
                drawn = generator(torch.randn(len(x), NOISE))
                discriminator_optimizer.zero_grad()
                criterion(discriminator(x), real).backward()
                criterion(discriminator(drawn.detach()), fake).backward()
                discriminator_optimizer.step()
                generator_optimizer.zero_grad()
                loss = criterion(discriminator(drawn), real)
                loss.backward()
                generator_optimizer.step()
            print(f"epoch {epoch}: generator loss {loss:.3f}")


if __name__ == "__main__":
    main()
