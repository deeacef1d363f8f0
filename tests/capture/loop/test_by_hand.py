"""Programs without modules and optimizers: weights are tensors, and the loop moves them itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tensortrace import trace
from tests.checks.traced import find_live


@pytest.mark.parametrize("at", [2, 37])
@pytest.mark.parametrize("way", ["no_grad", "data", "in place"])
def test_weights_that_are_mere_tensors_and_moved_by_hand(way: str, at: int) -> None:
    def program() -> None:
        x, y = torch.rand(16, 3), torch.rand(16)
        w = torch.zeros(3, requires_grad=True)
        for step in range(at + 4):
            error = x @ w - y
            loss = error.square().mean()
            if step == at:
                loss = loss + (error - error.detach()).square().sum().sqrt()
            loss.backward()
            assert w.grad is not None
            if way == "no_grad":
                with torch.no_grad():
                    w -= 0.1 * w.grad
            elif way == "data":
                w.data = w.data - 0.1 * w.grad
            else:
                w.data.sub_(0.1 * w.grad)
            w.grad = None

    found = find_live(program)
    assert [(f.code, f.severity, f.step, f.op) for f in found] == [("TT102", "error", at, "sqrt")]


def test_update_by_hand_that_leaves_out_what_is_not_finite_does_no_harm_later() -> None:
    def program() -> None:
        x = torch.rand(16, 3)
        w = torch.ones(3, requires_grad=True)
        for step in range(8):
            error = x @ w
            loss = error.square().mean()
            if step == 2:
                loss = loss + (error - error.detach()).square().sum().sqrt()
            if step == 6:
                loss = loss + (w * 0).sum().log()
            loss.backward()
            assert w.grad is not None
            if w.grad.isfinite().all():
                with torch.no_grad():
                    w -= 0.1 * w.grad
            w.grad = None

    # The second is no consequence of the first, whose gradient was thrown away.
    assert [(f.code, f.step, f.op) for f in find_live(program)] == [
        ("TT102", 2, "sqrt"), ("TT101", 6, "log"),
    ]  # fmt: skip


def test_values_that_outgrow_their_dtype_are_one_finding_wherever_that_shows() -> None:
    def program() -> None:
        x = torch.linspace(-3, 3, 500)
        weights = [torch.ones(()).mul_(0.1).requires_grad_() for _ in range(4)]
        for _ in range(24):
            y = sum((w * x**k for k, w in enumerate(weights)), torch.zeros(()))
            (y - x.sin()).pow(2).sum().backward()
            with torch.no_grad():
                for w in weights:
                    assert w.grad is not None
                    w.sub_(w.grad, alpha=1e-3)
                    w.grad = None

    # First the sum is over the range, in the next steps the power before it.
    assert [(f.code, f.op) for f in find_live(program)] == [("TT101", "sum")]


@pytest.mark.parametrize("steps", [15, 260])
def test_a_network_written_by_hand_is_silent(steps: int) -> None:
    def program() -> None:
        x = torch.randn(256, 20)
        y = (x[:, :3].sum(1) > 0).long()
        shapes = [(20, 32), (32,), (32, 2), (2,)]
        weights = [torch.randn(shape).mul_(0.1).requires_grad_() for shape in shapes]

        def network(batch: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(batch @ weights[0] + weights[1])
            return hidden @ weights[2] + weights[3]

        for step in range(steps):
            at = torch.arange(32) + 32 * (step % 8)
            loss = torch.nn.functional.cross_entropy(network(x[at]), y[at])
            loss.backward()
            with torch.no_grad():
                for w in weights:
                    assert w.grad is not None
                    w.sub_(w.grad, alpha=0.1)
                    w.grad.zero_()
                if step % 8 == 7:
                    assert 0 <= (network(x).argmax(1) == y).float().mean() <= 1

    assert find_live(program) == []


def test_rows_of_a_jacobian_are_no_steps() -> None:
    steps: list[int] = []

    def program() -> None:
        w = torch.rand(5, requires_grad=True)
        y = w.square()
        rows = torch.zeros(5, 5)
        for i in range(5):
            rows[i] = torch.autograd.grad(y[i], w, retain_graph=True)[0]

    with trace(out=lambda record: steps.append(record.step)):
        program()
    assert set(steps) == {0}


def train_modules_by_hand(loss_of: Callable[[Tensor, Tensor, bool], Tensor], at: int) -> None:
    """The chapter before the one about optimizers: modules, and weights moved in a loop."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    for step in range(at + 4):
        x = torch.rand(8, 4)
        loss = loss_of(model(x), x.sum(1, keepdim=True), step == at)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)


@pytest.mark.parametrize("at", [4, 260])
@pytest.mark.parametrize("loss_of", [
    lambda made, y, bad: ((made - y).square() - (99 if bad else 0)).clamp_min(-9).sqrt().mean(),
    lambda made, y, bad: (made - y).square().mean() + (made * (not bad)).square().sum().sqrt(),
    lambda made, y, bad: (made - (y / 0 - y / 0 if bad else y)).square().mean(),
    lambda made, y, bad: (made - torch.tensor([math.nan if bad else 1.0])).square().mean(),
], ids=["forward", "backward", "target", "data"])  # fmt: skip
def test_weights_of_modules_that_are_moved_by_what_is_not_finite_are_told_once(
    loss_of: Callable[[Tensor, Tensor, bool], Tensor], at: int
) -> None:
    found = find_live(lambda: train_modules_by_hand(loss_of, at))
    assert [f.step for f in found if f.severity in ("error", "warning")] == [at]
