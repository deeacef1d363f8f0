"""Weights that the loop computes and gives to a module: the op that spoilt them is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tensortrace.records import Finding
from tests.checks.traced import find_live


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 4), torch.randint(0, 3, (16,))


def one_error(program: Callable[[], None]) -> Finding:
    (found,) = [f for f in find_live(program) if f.severity != "note"]
    return found


class Logarithm(nn.Module):
    """Makes its own NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.inner(x).abs() - 100 * (x[0, 0] == 7))


def beside(make: Callable[[nn.Module], Any], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Logarithm()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for step in range(6):
        x, y = batch()
        model(x)  # the step begins here
        if step == 3:
            make(model.inner)
            x[0, 0] = 7
        optimizer.zero_grad()
        F.cross_entropy(call(model, x), y).backward()
        optimizer.step()


def masked(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return torch.where(weight > 9, weight / 0, weight).sum()


def statistics(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight.detach()  # type: ignore[union-attr]
    return (weight - weight) / (weight - weight)


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def with_others(model: nn.Module, x: Tensor) -> Tensor:
    weights = {k: p * 1.0 for k, p in model.named_parameters()}
    out: Tensor = functional_call(model, weights, (x,))
    return out


@pytest.mark.parametrize("make", [masked, statistics])
def test_an_op_of_the_same_shape_is_not_to_blame_where_a_replay_finds_another(
    make: Callable[[nn.Module], Any],
) -> None:
    found = one_error(lambda: beside(make, plainly))
    assert (found.step, found.op) == (3, "log")


def test_what_was_masked_is_no_weight() -> None:
    found = one_error(lambda: beside(masked, with_others))
    assert (found.step, found.op, found.module) == (3, None, "")


def test_without_replays_statistics_are_no_weights() -> None:
    found = one_error(lambda: beside(statistics, plainly))
    assert found.op == "log"
    options = {"narrow": False}
    (found,) = [f for f in find_live(lambda: beside(statistics, plainly), **options)
                if f.severity != "note"]  # fmt: skip
    assert (found.step, found.op, found.module) == (3, None, "")


def test_a_module_is_not_run_again_with_weights_that_it_had_not() -> None:
    found = one_error(lambda: beside(copy.copy, with_others))
    assert found.evidence["placed"] == "parameters were replaced since"
