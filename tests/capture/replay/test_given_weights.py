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


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 4), torch.randint(0, 3, (16,))


def inner_step(bad_at: int) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(bad_at + 3):
        x, y = batch()
        optimizer.zero_grad()
        weights = dict(model.named_parameters())
        loss = F.cross_entropy(functional_call(model, weights, (x,)), y)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        norm = torch.stack([g.norm() for g in grads]).norm() * (step != bad_at)
        fast = {k: p - 0.1 * g / norm for (k, p), g in zip(weights.items(), grads, strict=True)}
        F.cross_entropy(functional_call(model, fast, (x,)), y).backward()
        optimizer.step()


def weights_of_another(bad_at: int) -> None:
    hyper, main = nn.Linear(2, 32), net().requires_grad_(False)
    optimizer = torch.optim.Adam(hyper.parameters(), 1e-3)
    for step in range(bad_at + 3):
        x, y = batch()
        weight = hyper(torch.ones(2)).view(8, 4) * (step != bad_at)
        weight = weight / weight.norm(dim=1, keepdim=True)
        loss = F.cross_entropy(functional_call(main, {"0.weight": weight}, (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class CopyOfParts(nn.Module):
    """A layer whose parameters are results of the loop."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self._parameters = {k: p.clone() for k, p in of.named_parameters()}  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


def copies_with_results(bad_at: int) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(bad_at + 3):
        x, y = batch()
        copied = CopyOfParts(model)
        F.cross_entropy(copied(x), y)
        weight = copied.weight * (step != bad_at)
        copied._parameters["weight"] = weight / weight.norm()  # type: ignore[assignment]
        optimizer.zero_grad()
        F.cross_entropy(copied(x), y).backward()
        optimizer.step()


def assigned(bad_at: int, after: Callable[[Tensor], Any]) -> None:
    model = net()
    free = nn.Parameter(model[0].weight.detach().clone())
    del model[0].weight
    optimizer = torch.optim.SGD([free, *model.parameters()], 0.1)
    for step in range(bad_at + 3):
        if step == bad_at:
            with torch.no_grad():
                free[5] = 0
        x, y = batch()
        after(x)
        model[0].weight = free / free.norm(dim=1, keepdim=True)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def assigned_after_a_call(bad_at: int) -> None:
    other = nn.Linear(4, 4)
    assigned(bad_at, other)


def assigned_between_steps(bad_at: int) -> None:
    assigned(bad_at, torch.sum)


def one_error(program: Callable[[], None]) -> Finding:
    (found,) = [f for f in find_live(program) if f.severity != "note"]
    return found


@pytest.mark.parametrize("bad_at", [3, 33])
@pytest.mark.parametrize("train", [
    inner_step, weights_of_another, copies_with_results, assigned_after_a_call,
    assigned_between_steps,
])  # fmt: skip
def test_the_op_that_spoilt_the_weights_is_named(train: Callable[[int], None], bad_at: int) -> None:
    found = one_error(lambda: train(bad_at))
    assert (found.code, found.step, found.op) == ("TT101", bad_at, "div")
    assert found.location is not None
    assert found.location.file == __file__
    assert "got its weights from it" in found.message or "written to weights" in found.message


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
