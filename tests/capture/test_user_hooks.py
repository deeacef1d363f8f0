"""A hook of the user's that makes a NaN out of a gradient is named, since no op is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checks.traced import find_live


def normalised(grad: Tensor) -> Tensor:
    return grad / grad.flatten(1).norm(dim=1, keepdim=True)


def of_parameter(grad: Tensor) -> Tensor:
    return grad / grad.norm()


def of_module(module: nn.Module, given: Any, arrived: Any) -> tuple[Tensor]:
    return (normalised(given[0]),)


def only_looks(grad: Tensor) -> None:
    assert grad.shape


class Hooked(nn.Module):
    """Puts a hook on what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        if h.requires_grad:
            h.register_hook(normalised)
        return h


Model = tuple[nn.Module, Callable[[Tensor], Tensor]]


def in_the_loop() -> Model:
    model = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 1)])

    def call(x: Tensor) -> Tensor:
        h = model[0](x)
        h.register_hook(normalised)
        return model[1](h)

    return model, call


def in_a_forward() -> Model:
    model = nn.Sequential(Hooked(), nn.Linear(8, 1))
    return model, model


def on_a_module() -> Model:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    model[1].register_full_backward_hook(of_module)
    return model, model


def on_a_parameter() -> Model:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    model[1].bias.register_hook(of_parameter)
    return model, model


def train(make: Callable[[], Model], bad_at: int) -> None:
    model, call = make()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(bad_at + 3):
        weight = torch.ones(8, 1)
        weight[2:] = 0.0 if step == bad_at else 1.0
        weight[:2] = 0.0 if step == bad_at and "parameter" in make.__name__ else 1.0
        optimizer.zero_grad()
        (weight * (call(torch.randn(8, 3)) - 1.0).square()).mean().backward()
        optimizer.step()


def on_a_parameter_partially() -> Model:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    model[1].bias.register_hook(functools.partial(of_parameter))
    return model, model


@pytest.mark.parametrize("bad_at", [2, 33])
@pytest.mark.parametrize(("make", "name"), [
    (in_the_loop, "normalised"), (in_a_forward, "normalised"), (on_a_module, "of_module"),
    (on_a_parameter, "of_parameter"), (on_a_parameter_partially, "of_parameter"),
])  # fmt: skip
def test_the_hook_is_named(make: Callable[[], Model], name: str, bad_at: int) -> None:
    (found,) = [f for f in find_live(lambda: train(make, bad_at)) if f.severity != "note"]
    assert (found.step, found.code) == (bad_at, "TT102")
    assert found.location is not None
    assert found.location.function == name
    assert found.location.file == __file__
    assert "or a hook there, made" in found.message
    assert ",," not in found.message
    assert f"{name} (" in found.explanation


def test_of_several_hooks_none_is_called_the_place() -> None:
    def program() -> None:
        model, call = in_the_loop()
        model[1].weight.register_hook(only_looks)
        train(lambda: (model, call), 2)

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert len(found.evidence["hooks"]) == 2
    assert found.location is not None
    assert found.location.function not in ("normalised", "only_looks")


def test_a_hook_is_not_to_blame_where_an_op_is() -> None:
    def program() -> None:
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
        model[0].weight.register_hook(only_looks)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            x = torch.randn(8, 3)
            loss = torch.sqrt(model(x).square() * (step != 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.op, "hooks" in found.evidence) == ("sqrt", False)


def test_a_hook_that_is_put_on_many_tensors_hides_no_other_one() -> None:
    def program() -> None:
        model = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 1)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            h = model[0](torch.randn(8, 3))
            for _ in range(20):
                h.register_hook(only_looks)
            h.register_hook(normalised)
            optimizer.zero_grad()
            (model[1](h) * (step != 2)).sum().backward()
            optimizer.step()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert "normalised" in found.explanation
