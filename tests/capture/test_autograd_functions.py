"""Autograd functions of the user's own: their backward is named, at the line that went wrong."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tensortrace import trace
from tensortrace.records import Call, Finding


class Squash(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        scale = (x * 0).sum()
        return grad / scale  # fault


class Once(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * 0).log()  # fault


class Recovers(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        keep = torch.exp(torch.log((x > 0).float()))  # -inf for a moment
        grad = grad * keep
        return grad / (x * 0)  # fault


class Passes(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Holder(nn.Module):
    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.use(self.inner(x)))


class Last(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.outer(self.inner(x)))


def line_of(function: type[Function], marked: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return next(first + i for i, line in enumerate(lines) if marked in line)


def train(model: nn.Module, loss_of: Callable[[Tensor], Tensor] = torch.sum, **options: Any):
    torch.manual_seed(0)
    records: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=records.append, **options) as t:
        for _ in range(2):
            loss_of(model(torch.randn(3, 4))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [f for f in t.findings if f.severity == "error"], records


def blamed(finding: Finding) -> tuple[Any, ...]:
    assert finding.location is not None
    return finding.code, finding.op, finding.module, finding.location.line


@pytest.mark.parametrize("function", [Squash, Once, Recovers])
@pytest.mark.parametrize("kind", [Holder, Last])
def test_backward_of_an_own_function_is_named_at_the_line_of_the_op(
    function: type[Function], kind: type[Holder]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind(function.apply), nn.Identity())
    (found,), records = train(model)
    assert blamed(found) == ("TT102", function.__name__, "1", line_of(function, "# fault"))
    assert found.evidence["placed"] == "exact"
    assert found.fix is not None
    assert f"gradcheck({function.__name__}.apply" in found.fix
    named = next(r for r in records if isinstance(r, Call) and r.seq == found.seq and r.replay)
    assert (named.phase, named.node) == ("backward", f"{function.__name__}Backward")


@pytest.mark.parametrize("function", [Squash, Once])
def test_at_op_level_it_is_named_where_it_is_defined(function: type[Function]) -> None:
    (found,), _ = train(Holder(function.apply), level="op")
    assert blamed(found) == ("TT102", function.__name__, "", line_of(function, "def backward"))
    assert found.evidence["placed"] == "direct"


def test_of_two_in_a_row_the_one_to_blame_is_named() -> None:
    (found,), _ = train(Holder(lambda h: Passes.apply(Squash.apply(Passes.apply(h)))))
    assert blamed(found) == ("TT102", "Squash", "", line_of(Squash, "# fault"))


def test_what_a_checkpoint_recomputes_before_it_is_not_to_blame() -> None:
    def part(h: Tensor) -> Tensor:
        return Squash.apply(h + torch.exp(torch.log(torch.zeros(4))))

    (found,), _ = train(Holder(lambda h: checkpoint(part, h, use_reentrant=False)))
    assert found.location is not None
    assert found.location.line == line_of(Squash, "# fault")


def test_one_whose_backward_is_no_function_of_python_is_named_at_its_forward() -> None:
    class Odd(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        backward = staticmethod(functools.partial(lambda scale, ctx, grad: grad / scale, 0.0))

    (found,), _ = train(Holder(Odd.apply))
    assert found.op == "Odd"


def test_inside_a_checkpoint_it_is_named() -> None:
    (found,), _ = train(Holder(lambda h: checkpoint(Squash.apply, h, use_reentrant=False)))
    assert found.op == "Squash"
    assert found.location is not None
    assert found.location.line == line_of(Squash, "# fault")


@pytest.mark.parametrize(
    "loss_of", [lambda y: Squash.apply(y.sum()), lambda y: Squash.apply(y).sum()]
)
def test_outside_modules_it_is_named_at_once(loss_of: Callable[[Tensor], Tensor]) -> None:
    (found,), records = train(nn.Linear(4, 2), loss_of)
    assert found.op == "Squash"
    assert found.evidence["placed"] == "direct"
    assert found.location is not None
    assert found.location.line == line_of(Squash, "def backward")
    assert not any(isinstance(r, Call) and r.replay for r in records)


def test_a_healthy_one_is_silent_and_seen_once() -> None:
    errors, records = train(Holder(Passes.apply), level="op")
    assert errors == []
    seen = [r for r in records if isinstance(r, Call) and r.op == "Passes"]
    assert [(r.step, r.phase, r.module) for r in seen] == [(0, "backward", ""), (1, "backward", "")]


def test_functions_of_torch_are_not_the_users() -> None:
    def use(h: Tensor) -> Tensor:
        return checkpoint(torch.tanh, h, use_reentrant=True)

    _, records = train(Holder(use), level="op")
    assert not any("Checkpoint" in (r.op or "") for r in records if isinstance(r, Call))
