"""Two losses against each other, and losses made of gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.healthy import healthy
from tests.healthy.data import images, points


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8 * 3 * 3)
        self.net = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.inp(z).view(-1, 8, 3, 3))


def critic(norm: bool = True) -> nn.Sequential:
    wrap = nn.utils.parametrizations.spectral_norm if norm else (lambda m: m)
    return nn.Sequential(
        wrap(nn.Conv2d(1, 8, 4, stride=2, padding=1)), nn.LeakyReLU(0.2),
        wrap(nn.Conv2d(8, 8, 3, padding=1)), nn.LeakyReLU(0.2), nn.Flatten(),
        wrap(nn.Linear(288, 1)),
    )  # fmt: skip


@healthy
def alternating_gan(steps: int) -> None:
    generator, discriminator = Generator(), critic()
    g_opt = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    d_opt = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for _ in range(steps):
        real = images(16)[0].tanh()
        fake = generator(torch.randn(16, 8))
        d_opt.zero_grad()
        ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)
        d_loss = F.binary_cross_entropy_with_logits(discriminator(real), 0.9 * ones)
        d_loss = d_loss + F.binary_cross_entropy_with_logits(discriminator(fake.detach()), zeros)
        d_loss.backward()
        d_opt.step()

        g_opt.zero_grad()
        g_loss = F.binary_cross_entropy_with_logits(discriminator(fake), ones)
        g_loss.backward()
        g_opt.step()


@healthy
def wasserstein_gan_with_gradient_penalty(steps: int) -> None:
    """Three steps of the critic to one of the generator; the penalty is a double backward."""
    generator, judge = Generator(), critic(norm=False)
    g_opt = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    d_opt = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.0, 0.9))
    for i in range(steps):
        if i % 4 == 3:
            judge.requires_grad_(False)
            g_opt.zero_grad()
            (-judge(generator(torch.randn(16, 8))).mean()).backward()
            g_opt.step()
            judge.requires_grad_(True)
            continue
        real = images(16)[0].tanh()
        with torch.no_grad():
            fake = generator(torch.randn(16, 8))
        between = torch.lerp(real, fake, torch.rand(16, 1, 1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss = judge(fake).mean() - judge(real).mean() + 10 * penalty
        d_opt.zero_grad()
        loss.backward()
        d_opt.step()


@healthy
def adversarial_training(steps: int) -> None:
    """FGSM: one backward for the input, then one for the weights; the first is thrown away."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        x, y = images(16)
        x.requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        worse = (x + 0.1 * x.grad.sign()).detach()
        optimizer.zero_grad()
        F.cross_entropy(model(worse), y).backward()
        optimizer.step()


@healthy
def meta_learning(steps: int) -> None:
    """MAML: an inner step with `create_graph`, the outer loss through it."""
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        total = torch.zeros(())
        for _ in range(2):
            phase, x = 3 * torch.rand(1), 4 * torch.rand(16, 1) - 2
            y = torch.sin(x + phase)
            weights = dict(model.named_parameters())
            inner = F.mse_loss(functional_call(model, weights, x[:8]), y[:8])
            grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            moved = {k: w - 0.05 * g for (k, w), g in zip(weights.items(), grads, strict=True)}
            total = total + F.mse_loss(functional_call(model, moved, x[8:]), y[8:])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


@healthy
def domain_adversarial_training(steps: int) -> None:
    """A gradient that is reversed on its way to the shared features."""

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return -0.3 * grad

    shared = nn.Sequential(nn.Linear(2, 16), nn.ELU())
    label, domain = nn.Linear(16, 2), nn.Linear(16, 2)
    model = nn.ModuleList([shared, label, domain])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = points(64)
        where = torch.randint(2, (64,))
        hidden = shared(x + where[:, None])
        known = where == 0
        loss = F.cross_entropy(label(hidden[known]), y[known])
        loss = loss + F.cross_entropy(domain(Reverse.apply(hidden)), where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
