"""Small data sets that can be learnt, drawn anew for each program."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

PAD = 0


def images(n: int = 96, classes: int = 4, size: int = 12) -> tuple[Tensor, Tensor]:
    """Noisy images (n, 1, size, size) of a bar, and which of `classes` rows it lies in (n,)."""
    y = torch.randint(classes, (n,))
    x = 0.5 * torch.randn(n, 1, size, size)
    x[torch.arange(n), 0, y * size // classes] += 2.0
    return (x - x.mean()) / x.std(), y


def loader(n: int = 96, batch_size: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    """Images in shuffled batches."""
    return DataLoader(TensorDataset(*images(n)), batch_size=batch_size, shuffle=True)


def points(n: int = 128) -> tuple[Tensor, Tensor]:
    """Points (n, 2) and whether they lie outside the unit circle (n,)."""
    x = torch.randn(n, 2)
    return x, (x.square().sum(1) > 1.4).long()


def line(n: int = 64, features: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (n, features) and a noisy linear function of them (n, 1)."""
    x = torch.randn(n, features)
    return x, x @ torch.randn(features, 1) + 0.1 * torch.randn(n, 1)


def sentences(n: int = 8, length: int = 12, words: int = 20) -> Tensor:
    """Tokens (n, length) that count upwards from a random word, padded at the end with `PAD`."""
    start = torch.randint(words, (n, 1))
    tokens = 1 + (start + torch.arange(length)) % (words - 1)
    lengths = torch.randint(length // 2, length + 1, (n, 1))
    return tokens.masked_fill(torch.arange(length) >= lengths, PAD)
