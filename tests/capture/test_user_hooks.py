"""A hook of the user's that makes a NaN out of a gradient is named, since no op is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrace.capture import user_hooks
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
        model[1].register_full_backward_hook(lambda module, given, arrived: (given[0] * 1.0,))
        train(lambda: (model, call), 2)

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert len(found.evidence["hooks"]) == 2
    assert found.location is not None
    assert found.location.function.endswith("call")


@pytest.mark.parametrize("hook", [only_looks, torch.clone])
def test_a_hook_that_cannot_have_made_it_is_not_named(hook: Callable[..., Any]) -> None:
    def program() -> None:
        model, call = in_the_loop()
        for parameter in model.parameters():
            parameter.register_hook(hook)
        train(lambda: (model, call), 2)

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert found.location is not None
    assert found.location.function == "normalised"


class BadOnce(torch.autograd.Function):
    """Makes NaN of a gradient once, so that a replay does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: list[int]) -> Tensor:
        ctx.turns = turns
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.turns.append(1)
        return grad / (0.0 if len(ctx.turns) == 4 else 1.0) * 0, None


class Turning(nn.Module):
    """Has that between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.turns: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(BadOnce.apply(self.first(x), self.turns))
        return out


class Kept:
    """Looks on, in several ways."""

    def __init__(self) -> None:
        self.last: Any = None
        self.count = 0
        self.each: list[Tensor] = []

    def __call__(self, module: nn.Module, given: Any, made: Any) -> None:
        self.last = made

    def counting(self, module: nn.Module, given: Any, made: Any) -> None:
        self.count += 1
        self.each.append(made[0].sum())


def on_modules(model: Turning) -> None:
    norms: list[Tensor] = []
    for hook in (lambda m, gi, go: norms.append(go[0].norm()), Kept(), Kept().counting):
        model.last.register_full_backward_hook(hook)
        model.first.register_forward_hook(hook)


def on_parameters(model: Turning) -> None:
    norms: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: norms.append(grad.norm()))
        parameter.register_hook(lambda grad: grad.clamp(-1, 1))
        parameter.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))


@pytest.mark.parametrize("put", [on_modules, on_parameters])
def test_hooks_that_look_on_are_not_named_where_nothing_else_is(put: Callable[..., None]) -> None:
    def program() -> None:
        model = Turning()
        put(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
                optimizer.step()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.step) == ("TT102", 3)
    assert "hooks" not in found.evidence
    assert found.location is not None
    assert found.location.function.endswith("program")


class Writes(nn.Module):
    """Hooks that may change something."""

    seen: Any

    def __init__(self) -> None:
        super().__init__()
        self.plain = Kept()

    def to_module(self, module: nn.Module, given: Any, made: Any) -> None:
        self.seen = made

    def to_another(self, module: nn.Module, given: Any, made: Any) -> None:
        module.scale = made


class Adds(Kept):
    """Adds to what it was given, and stores on that."""

    def __call__(self, module: nn.Module, given: Any, made: Any) -> None:
        self.last = made
        self.last += 1

    def beside(self, module: Any, given: Any, made: Any) -> None:
        module.count = self.count

    def beside_too(self, module: Any, given: Any, made: Any) -> None:
        module.count += self.count


def in_place(grad: Tensor) -> None:
    grad *= 2


def returns_after(grad: Tensor) -> Tensor:
    kept: list[Tensor] = []
    kept.append(grad)
    return grad * 2


ROW, BY_NAME = 0, {}


def at_a_row(grad: Tensor) -> None:
    grad[:, ROW] = 0


def at_some_rows(grad: Tensor) -> None:
    grad[0:2] = ROW


def at_a_local_row(grad: Tensor) -> None:
    row = 0
    grad[row] = ROW


def into_itself(grad: Tensor) -> None:
    torch.mul(grad, 2, out=grad)


def at_once(grad: Tensor) -> None:
    torch.nn.functional.relu(grad, inplace=True)


def by_name(grad: Tensor) -> None:
    name = "weight"
    BY_NAME["last"] = BY_NAME[name] = grad.norm()


@pytest.mark.parametrize("hook", [
    at_a_row, at_some_rows, at_a_local_row, into_itself, at_once,
    Writes().to_module, Writes().to_another, Adds(), Adds().beside, Adds().beside_too, in_place,
    returns_after, lambda grad: [].append(grad) or grad * 2, lambda grad: grad.div_(2),
    lambda grad: ([].append(grad), grad * 2)[1], lambda grad: torch.mul(grad, 2), torch.sqrt,
])  # fmt: skip
def test_what_may_change_something_does_not_only_look(hook: Callable[..., Any]) -> None:
    assert not user_hooks.only_looks(hook)


@pytest.mark.parametrize("hook", [
    only_looks, by_name, Kept(), Kept().counting, functools.partial(Kept().counting, None),
    lambda grad: [].append(grad.norm()), lambda grad: print(grad.norm()),
])  # fmt: skip
def test_what_only_keeps_or_counts_changes_nothing(hook: Callable[..., Any]) -> None:
    assert user_hooks.only_looks(hook)


def test_a_hook_that_returns_something_comes_first() -> None:
    hooks = user_hooks.changing([in_place, only_looks, normalised])
    assert hooks == [normalised, in_place]


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
