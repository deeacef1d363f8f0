"""+inf that a program deals with, made before the block, beside a fault that is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tensortrace.records import Finding
from tests.checks.traced import find_live

X = torch.linspace(-1, 1, 48).view(8, 6)
DIAGONAL = torch.zeros(8, 8).fill_diagonal_(math.inf)
FULL = torch.full((8, 8), math.inf)
ABOVE = torch.full((8, 8), math.inf).triu(1)


def nearest(h: Tensor) -> Tensor:
    distance = torch.cdist(h.detach(), h.detach()) + DIAGONAL
    return (h - h[distance.argmin(1)]).square().mean()


def running_minimum(h: Tensor) -> Tensor:
    distance = torch.cdist(h.detach(), h.detach())
    return (h - h[torch.where(torch.eye(8).bool(), FULL, distance).argmin(1)]).square().mean()


def attention(h: Tensor) -> Tensor:
    return (((h @ h.T - ABOVE) * 0.3).softmax(-1) @ h - X).square().mean()


def in_place(h: Tensor) -> Tensor:
    scores = h @ h.T
    scores[:] = scores - ABOVE
    return (scores.softmax(-1) @ h - X).square().mean()


HEALTHY = [nearest, running_minimum, attention, in_place]


def slope(h: Tensor) -> Tensor:
    return (h[0, :2] * 0).square().sum().sqrt()


def value(h: Tensor) -> Tensor:
    return (h[0, :2] * 0).log().sum()


def found_in(loss_of: Callable[[Tensor], Tensor]) -> list[Finding]:
    def program() -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model(X)).backward()
            optimizer.step()

    return [f for f in find_live(program) if f.severity != "note"]


@pytest.mark.parametrize("healthy", HEALTHY)
@pytest.mark.parametrize(
    ("fault", "code", "op"), [(slope, "TT102", "sqrt"), (value, "TT101", "log")]
)
def test_a_fault_beside_it_is_told_alone(
    healthy: Callable[[Tensor], Tensor], fault: Callable[[Tensor], Tensor], code: str, op: str
) -> None:
    assert found_in(healthy) == []
    (found,) = found_in(lambda h: healthy(h) + fault(h))
    assert (found.code, found.severity, found.step, found.op) == (code, "error", 0, op)


@pytest.mark.parametrize(
    "loss_of",
    [
        # The loss is finite, what the gradient is made of is not.
        lambda h: torch.where(torch.eye(8).bool(), 0, ((h @ h.T) * DIAGONAL).square()).mean() * 0,
        lambda h: (h.sum(1, keepdim=True) * FULL).tanh().mean(),
        lambda h: (h.square().sum(1) * (-FULL[0]).exp()).sqrt().sum(),
        lambda h: (h.square().sum(1) * torch.tensor([math.inf] * 8)).sum(),
        # And by way of a view that it is written to.
        lambda h: written(h).square().sum().sqrt(),
    ],
    ids=["masked", "bounded", "vanishing", "brought in", "written"],
)
def test_what_does_harm_is_data(loss_of: Callable[[Tensor], Tensor]) -> None:
    first = found_in(loss_of)[0]
    assert (first.code, first.severity, first.step) == ("TT105", "warning", 0)


def written(h: Tensor) -> Tensor:
    factors = torch.ones(8, 6)
    factors[:, 0].copy_((-FULL[0]).exp())
    factors[:, 1:].copy_(torch.zeros(8, 5))
    return h * factors
