"""Programs with one planted non-finite value each; the line to blame ends with ``# fault``.

Each makes a model; `run` trains it for two steps and returns what training left behind. The fault
is inside a module, so that at module level it has to be found by a replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True)
class Faulty:
    make: Callable[[], nn.Module]
    op: str
    phase: str = "forward"


FAULTY: dict[str, Faulty] = {}


def faulty(op: str, phase: str = "forward") -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(cls: type[nn.Module]) -> type[nn.Module]:
        FAULTY[cls.__name__] = Faulty(cls, op, phase)
        return cls

    return register


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.middle(self.inner(x)))

    def middle(self, h: Tensor) -> Tensor:
        raise NotImplementedError


@faulty("log")
class LogOfZero(Base):
    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0).log()  # fault


@faulty("softmax")
class MaskedRow(Base):
    def middle(self, h: Tensor) -> Tensor:
        scores = h.masked_fill(torch.ones_like(h, dtype=torch.bool), float("-inf"))
        return F.softmax(scores, -1) + h  # fault


@faulty("div")
class EmptyPool(Base):
    def middle(self, h: Tensor) -> Tensor:
        mask = torch.zeros(h.shape[0], 1)
        pooled = (h * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)  # fault
        return h + pooled


@faulty("exp")
class ExpOverflow(Base):
    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0 + 100).exp()  # fault


@faulty("log_")
class LogInPlace(Base):
    def middle(self, h: Tensor) -> Tensor:
        p = h.detach().clone().zero_()
        p.log_()  # fault
        return h * p


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, h: Tensor) -> Tensor:
        spread = (h - h).std(-1, keepdim=True)
        return self.norm(h) / spread  # fault


@faulty("div")
class TwoDeep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Dropout(0.2), Deep())

    def middle(self, h: Tensor) -> Tensor:
        return self.block(h)


@faulty("sqrt")
class Reused(Base):
    def middle(self, h: Tensor) -> Tensor:
        h = self.inner(self.inner(h))
        return (h.abs() * 0 - 1).sqrt()  # fault


@faulty("log")
class Checkpointed(Base):
    def middle(self, h: Tensor) -> Tensor:
        return checkpointing.checkpoint(self.part, h, use_reentrant=False)

    def part(self, h: Tensor) -> Tensor:
        return h + (h.abs() * 0).log()  # fault


@faulty("reciprocal")
class WithKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()
        self.inner.middle = self.middle  # type: ignore[method-assign]

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(h * 0).reciprocal()  # fault

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=x)


@faulty("matmul")
class HalfOverflow(Base):
    def middle(self, h: Tensor) -> Tensor:
        big = torch.full((4, 4), 300.0, dtype=torch.float16)
        return h + (big @ big).float().mean()  # fault


@faulty("pow")
class NegativeRoot(Base):
    def middle(self, h: Tensor) -> Tensor:
        return h + (h.abs() * 0 - 2).pow(0.5)  # fault


@faulty("setitem")
class WrittenByIndex(Base):
    def middle(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[0] = float("nan")  # fault
        return h


@faulty("sqrt", "backward")
class RootOfZero(Base):
    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0).sum(-1, keepdim=True).sqrt()  # fault


@faulty("sqrt", "backward")
class CheckpointedRoot(Base):
    def middle(self, h: Tensor) -> Tensor:
        h = checkpointing.checkpoint(self.inner, h, use_reentrant=False)
        return h + (h * 0).sum(-1, keepdim=True).sqrt()  # fault


@faulty("sqrt", "backward")
class ReentrantRoot(Base):
    def __init__(self) -> None:
        super().__init__()
        self.outer = spectral_norm(self.outer)

    def middle(self, h: Tensor) -> Tensor:
        h = checkpointing.checkpoint(self.inner, h, use_reentrant=True)
        return h + (h * 0).sum(-1, keepdim=True).sqrt()  # fault


@faulty("log", "backward")
class WhereHidesLog(Base):
    def middle(self, h: Tensor) -> Tensor:
        positive = h.clamp(min=0) * 0
        logs = positive.log()  # fault
        return torch.where(positive > 0, logs, h)


@faulty("asin", "backward")
class SineOfOne(Base):
    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0 - 1).asin()  # fault


@faulty("acos", "backward")
class AngleOfOne(Base):
    def middle(self, h: Tensor) -> Tensor:
        cosine = (h * 0 + 1).clamp(-1, 1)
        return h + cosine.acos()  # fault


@faulty("pow", "backward")
class SlopeOfPower(Base):
    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0).pow(0.3)  # fault


@faulty("sqrt", "backward")
class SecondRoot(nn.Module):
    """The gradient goes bad in the first op of a module that runs after the one that shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x) * 0)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h.sqrt())  # fault


@faulty("sqrt", "backward")
class OnlyAWeight(nn.Module):
    """No module boundary sees the bad gradient, only a parameter does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2))
        self.inner = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.scale.sqrt()  # fault


def train(model: nn.Module, steps: int = 2) -> list[Any]:
    """Train for a few steps; returns all that a replay could have touched."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(3, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    states = [value for state in optimizer.state.values() for value in state.values()]
    grads = [p.grad for p in model.parameters()]
    parameters = [p.detach() for p in model.parameters()]
    return [losses, parameters, grads, states, list(model.buffers()), torch.get_rng_state()]
