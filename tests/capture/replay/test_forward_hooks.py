"""A forward hook of the user's that makes a NaN is named, since a replay runs none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrace.records import Finding
from tests.checks.traced import find_live


def whiten(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def whiten_before(module: nn.Module, given: Any) -> Tensor:
    return whiten(given[0])


def whiten_after(module: nn.Module, given: Any, made: Tensor) -> Tensor:
    return whiten(made)


def whiten_in_place(module: nn.Module, given: Any, made: Tensor) -> None:
    made.detach().copy_(whiten(made.detach()))


def write_weight(module: nn.Module, given: Any) -> None:
    module.scale = module.free / (given[0].std(0).sum() * module.free.norm())  # type: ignore[union-attr]


class Whitening:
    """A hook with something of its own."""

    def __call__(self, module: nn.Module, given: Any, made: Tensor) -> Tensor:
        return whiten(made)


class Scaled(nn.Module):
    """Multiplies by what a hook wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.ones(4))
        self.scale = self.free * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


kept: list[Tensor] = []
features: dict[nn.Module, Tensor] = {}


def keep(module: nn.Module, given: Any, made: Tensor) -> None:
    kept.append(made.detach())
    features[module] = made.detach()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def before_the_first() -> nn.Module:
    model = net()
    model[0].register_forward_pre_hook(whiten_before)
    return model


def before_all() -> nn.Module:
    model = net()
    model.register_forward_pre_hook(whiten_before)
    return model


def before_a_layer_alone() -> nn.Module:
    model = nn.Linear(4, 3)
    model.register_forward_pre_hook(whiten_before)
    return model


def between() -> nn.Module:
    model = net()
    model[0].register_forward_hook(whiten_after)
    return model


def between_partially() -> nn.Module:
    model = net()
    model[0].register_forward_hook(functools.partial(whiten_after))
    return model


def between_with_an_object() -> nn.Module:
    model = net()
    model[0].register_forward_hook(Whitening())
    return model


def between_deep_inside() -> nn.Module:
    model = nn.Sequential(net(), nn.Linear(3, 3))
    model[0][0].register_forward_hook(whiten_after)
    return model


def between_in_place() -> nn.Module:
    model = net()
    model[0].register_forward_hook(whiten_in_place)
    return model


def of_a_weight() -> nn.Module:
    model = nn.Sequential(Scaled(), net())
    model[0].register_forward_pre_hook(write_weight)
    return model


def train(make: Callable[[], nn.Module], bad_at: int) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(bad_at + 3):
        x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
        if step == bad_at:
            x = x[:1].repeat(16, 1)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def one_error(make: Callable[[], nn.Module], bad_at: int, **options: Any) -> Finding:
    listed = find_live(lambda: train(make, bad_at), **options)
    (found,) = [f for f in listed if f.severity != "note"]
    return found


@pytest.mark.parametrize("bad_at", [3, 33, 230])
@pytest.mark.parametrize(("make", "name"), [
    (before_the_first, "whiten_before"), (before_all, "whiten_before"),
    (before_a_layer_alone, "whiten_before"), (between, "whiten_after"),
    (between_partially, "whiten_after"), (between_with_an_object, "__call__"),
    (between_deep_inside, "whiten_after"), (between_in_place, "whiten_in_place"),
    (of_a_weight, "write_weight"),
])  # fmt: skip
def test_the_hook_is_named(make: Callable[[], nn.Module], name: str, bad_at: int) -> None:
    found = one_error(make, bad_at)
    assert (found.code, found.step) == ("TT101", bad_at)
    assert found.location is not None
    assert found.location.function.endswith(name)
    assert found.location.file == __file__
    assert len(found.evidence["hooks"]) == 1
    assert ", or a forward hook there, made" in found.message
    assert f"{name} (" in found.explanation


def test_of_several_hooks_none_is_called_the_place() -> None:
    def make() -> nn.Module:
        model = between()
        model[0].register_forward_hook(lambda module, given, made: made * 1.0)  # type: ignore[index]
        return model

    found = one_error(make, 3)
    assert len(found.evidence["hooks"]) == 2
    assert found.location is not None
    assert found.location.function == "train"


def test_a_hook_elsewhere_and_one_that_only_keeps_are_not_named() -> None:
    def make() -> nn.Module:
        model: Any = between()
        model[0].register_forward_hook(keep)
        model[1].register_forward_hook(lambda module, given, made: made * 1.0)
        model[2].register_forward_pre_hook(lambda module, given: (given[0] * 1.0,))
        return model  # type: ignore[no-any-return]

    found = one_error(make, 3)
    assert found.location is not None
    assert found.location.function == "whiten_after"


class Logarithm(nn.Module):
    """Makes its own NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.log(x.std(0).sum() - 1e-3)


@pytest.mark.parametrize("hook", [keep, whiten_after])
def test_a_hook_is_not_to_blame_where_an_op_is(hook: Callable[..., Any]) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(Logarithm(), nn.Linear(4, 3))
        model[0].register_forward_hook(hook)
        return model

    found = one_error(make, 3)
    assert (found.op, "hooks" in found.evidence) == ("log", False)


def test_at_op_level_the_op_inside_the_hook_is_seen() -> None:
    found = one_error(between, 3, level="op")
    assert found.op == "div"
    assert "hooks" not in found.evidence


def test_weights_that_were_spoilt_are_no_work_of_a_hook() -> None:
    def make() -> nn.Module:
        model: Any = net()
        model[0].register_forward_pre_hook(lambda module, given: (given[0] * 1.0,))
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
        return model  # type: ignore[no-any-return]

    found = one_error(make, 3)
    assert "hooks" not in found.evidence


class Gathering(nn.Module):
    """Asks its parts for what they return by way of hooks, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.gathered: list[Tensor] | None = None

        def gather(module: nn.Module, given: Any, made: Tensor) -> None:
            if self.gathered is not None:
                self.gathered.append(made)

        gather.__module__ = "transformers.utils.output_capturing"
        self.first.register_forward_hook(gather)

    def forward(self, x: Tensor, bad: bool) -> Tensor:
        self.gathered = []
        self.first(x)
        h, self.gathered = self.gathered[0], None
        return self.last(h / (h * (0 if bad else 1)))


@pytest.mark.parametrize("bad_at", [2, 33])
def test_what_hooks_of_transformers_gather_is_there_in_a_replay(bad_at: int) -> None:
    def program() -> None:
        model = Gathering()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(bad_at + 2):
            optimizer.zero_grad()
            model(torch.randn(8, 4), step == bad_at).square().mean().backward()
            optimizer.step()

    (found,) = (f for f in find_live(program) if f.severity == "error")
    assert (found.step, found.op, found.evidence["placed"]) == (bad_at, "div", "exact")


def add_root(module: nn.Module, given: Any, made: Tensor) -> Tensor:
    return made + torch.sqrt(made * 0)


def keep_shape(module: nn.Module, given: Any, made: Tensor) -> Tensor:
    return made.view(-1, 4)


@pytest.mark.parametrize("bad_at", [2, 33, 229])
@pytest.mark.parametrize("at", [0, 2])
def test_a_hook_whose_backward_makes_a_nan_is_named(bad_at: int, at: int) -> None:
    def program(hook: Callable[..., Any] = add_root) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].register_forward_hook(keep_shape)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(bad_at + 2):
            if step == bad_at:
                model[at].register_forward_hook(hook)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()

    (found,) = (f for f in find_live(program) if f.severity == "error")
    assert (found.code, found.step, found.op) == ("TT102", bad_at, None)
    assert "add_root" in found.explanation
    if bad_at < 200:  # of a step at rest the outermost call alone is known
        assert ", or a hook there, made" in found.message
        assert "keep_shape" not in found.explanation
        assert found.location is not None
        assert found.location.function == "add_root"
    assert find_live(lambda: program(keep_shape)) == []
