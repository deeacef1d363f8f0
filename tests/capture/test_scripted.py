"""Script modules answer other than modules do: a frozen one has no training mode at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import record
from tests.checks.traced import find_live

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` (is|has been) deprecated")

FROZEN = [torch.jit.freeze, torch.jit.optimize_for_inference]


def teacher(frozen: Callable[[Any], Any]) -> Any:
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return frozen(torch.jit.script(layers.eval()))


def taught(frozen: Callable[[Any], Any], turns: int, *, spoilt: int = -1) -> Any:
    """The program that trains a small net on what a frozen one says; its weights at the end."""

    def program(*_: Any) -> list[torch.Tensor]:
        net, told = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), teacher(frozen)
        adam, x = torch.optim.Adam(net.parameters(), lr=1e-2), torch.randn(32, 8)
        for i in range(turns):
            if i == spoilt:
                net[0].weight.data.mul_(float("inf"))
            with torch.no_grad():
                target = told(x).softmax(-1)
            adam.zero_grad()
            loss = F.kl_div(net(x).log_softmax(-1), target, reduction="batchmean")
            loss.backward()
            adam.step()
        return [p.detach() for p in net.parameters()]

    return program


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("level", ["module", "op"])
def test_a_frozen_module_is_one_in_evaluation(frozen: Any, level: str) -> None:
    records = record(taught(frozen, 3), level=level)
    calls = [c for c in records.modules() if c.training is False]
    assert [c.step for c in calls] == [0, 1, 2]
    assert {c.module for c in records.modules()} > {"", "Sequential", "Sequential.0"}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("spoilt", [5, 230])
def test_what_is_spoilt_beside_a_frozen_module_is_named(frozen: Any, spoilt: int) -> None:
    found = find_live(taught(frozen, spoilt + 3, spoilt=spoilt), "TT1")
    assert all("weight.data.mul_" in (f.location.code or "") for f in found if f.location)
    assert "Sequential.0.weight holds" in found[-1].message
    assert find_live(taught(frozen, spoilt + 3)) == []


def test_a_frozen_module_inside_another_is_run_through() -> None:
    class Extractor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = teacher(torch.jit.freeze), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.head(self.features(x))
            return (made - 9).log()  # the cause

    def program() -> None:
        net = Extractor().train()
        net.features.eval()
        sgd = torch.optim.SGD(net.head.parameters(), lr=0.1)
        net(torch.randn(4, 8)).mean().backward()
        sgd.step()

    (found,) = find_live(program, "TT101")
    assert "the code of Extractor made 8 NaN of 8 between the exit of head" in found.message


def test_a_frozen_module_is_switched_as_it_is_untraced() -> None:
    def program(*_: Any) -> None:
        module = teacher(torch.jit.freeze)
        assert module.eval() is module
        assert module.train() is module

    record(program)
