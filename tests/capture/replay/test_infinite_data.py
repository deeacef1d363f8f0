"""-inf that is data, as the log of an empty band of a spectrogram, and -inf that is a mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrace.records import Finding
from tests.checks.traced import find_live

STEPS = 40


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    spoil: Callable[[int], str],
    value: float = -math.inf,
) -> list[Finding]:
    """Fit a model; `spoil` says of each step what holds one -inf: "x", "target" or nothing."""

    def program() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(STEPS):
            x, target = torch.rand(4, 8, 6).log(), torch.randn(4, 8, 6)
            if spoil(step) == "x":
                x[1, 2, 3] = value
            if spoil(step) == "target":
                target[1, 2, 3] = value
            optimizer.zero_grad()
            loss_of(model(x), target).backward()
            optimizer.step()

    return [f for f in find_live(program) if f.severity != "note"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Tanh()),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(6, 6)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)),
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("at", [2, 33])
@pytest.mark.parametrize("name", MODELS)
def test_in_the_input_of_a_model(name: str, at: int) -> None:
    (found,) = train(MODELS[name](), F.mse_loss, lambda step: "x" if step == at else "")
    assert (found.code, found.severity, found.step) == ("TT105", "warning", at)
    assert "1 -inf of 192 in the data" in found.message
    assert "isfinite" in found.fix


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function": F.mse_loss,
    "module": nn.L1Loss(),
    "square": lambda y, t: ((y - t) ** 2).mean(),
    "scaled": lambda y, t: F.smooth_l1_loss(y, t * 0.5),
}
# Finite - inf is -inf, as a mask has it.
OF_DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function": lambda y, t: F.mse_loss(y - t, torch.zeros_like(t)),
    "square": lambda y, t: ((y - t) ** 2).mean(),
    "method": lambda y, t: (y - t).square().mean(),
    "absolute": lambda y, t: (y - t).abs().mean(),
    "product": lambda y, t: ((y - t) * (y - t)).mean(),
    "likelihood": lambda y, t: -(y - t).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_in_the_target(name: str) -> None:
    model = nn.Linear(6, 6)
    (found,) = train(model, LOSSES[name], lambda step: "target" if step == 2 else "")
    assert (found.code, found.severity, found.step) == ("TT105", "warning", 2)


@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_of_infinity_in_the_target(name: str) -> None:
    spoil, loss_of = (lambda step: "target" if step == 2 else ""), OF_DIFFERENCES[name]
    (found,) = train(nn.Linear(6, 6), loss_of, spoil, math.inf)
    assert (found.code, found.severity, found.step) == ("TT105", "warning", 2)
    assert "1 inf of 192 in the data: input[1] of sub" in found.message


@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_of_infinity_in_a_target_that_is_made_after_the_update_before(name: str) -> None:
    def program() -> None:
        model = nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(6):
            rate = torch.rand(4, 1) + 0.5
            rate[2] *= step != 3
            target = 1 / rate
            OF_DIFFERENCES[name](model(torch.rand(4, 6)), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.severity, found.step, found.op) == ("TT101", "error", 3, "div")
    assert found.message.endswith("; made at the end of step 2")
    assert found.location is not None
    assert found.location.code == "target = 1 / rate"


def test_of_an_infinite_cost_that_hides_a_row_or_goes_times_0() -> None:
    def program(after: Callable[[Tensor], Tensor]) -> None:
        model = nn.Linear(6, 8)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(4):
            cost = torch.rand(3, 8)
            if step == 2:
                cost[1] = math.inf
            after(model(torch.rand(3, 6)) - cost).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for op, after in (("softmax", lambda s: s.softmax(-1)), ("mul", lambda s: s * s.isfinite())):
        found = [f for f in find_live(lambda after=after: program(after)) if f.code == "TT101"]
        assert [(f.severity, f.step, f.op) for f in found] == [("error", 2, op)]


class Attention(nn.Module):
    """Adds a mask, and may be given one that hides a whole row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(self.linear(x) + mask, -1)


@pytest.mark.parametrize("bias", ["none", "distance"])
def test_in_a_mask_is_none(bias: str) -> None:
    distance = (torch.arange(8.0)[:, None] - torch.arange(8.0)).abs()
    mask = torch.zeros(8, 8) if bias == "none" else -0.5 * distance
    mask = mask.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
    hiding = mask.masked_fill(torch.eye(8).bool() & (torch.arange(8) == 0), -math.inf)

    def program(last: Tensor) -> None:
        model = Attention()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(6):
            optimizer.zero_grad()
            y = model(torch.rand(2, 8, 6), last if step == 4 else mask)
            y.square().mean().backward()
            optimizer.step()

    assert [f for f in find_live(lambda: program(mask)) if f.severity != "note"] == []
    # Of a row that is hidden altogether the softmax makes NaN: the mask is no missing value.
    found = [f for f in find_live(lambda: program(hiding)) if f.severity != "note"]
    assert [(f.code, f.step, f.op) for f in found] == [("TT101", 4, "softmax")]


def test_scores_that_are_masked_outside_are_no_data() -> None:
    def program() -> None:
        model = nn.Linear(6, 8)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        mask = torch.zeros(8).masked_fill(torch.arange(8) > 5, -math.inf)
        for _ in range(4):
            optimizer.zero_grad()
            scores = model(torch.rand(3, 6)) + mask
            F.cross_entropy(scores, torch.tensor([0, 1, 2])).backward()
            optimizer.step()

    assert [f for f in find_live(program) if f.severity != "note"] == []


def test_in_a_batch_that_is_taken_after_the_update_before() -> None:
    def program() -> None:
        data = torch.rand(9, 4, 6).log()
        data[5, 2, 3] = -math.inf
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(9):
            x = data[step]
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.severity, found.step) == ("TT105", "warning", 5)


class Outer(nn.Module):
    """Hands on what it is given, changed, so that its layer takes another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.inner(x * 2)
        return y if bias is None else (y + bias).softmax(-1) + (x * 0).sum().sqrt() / 0


@pytest.mark.parametrize("cleared", ["before", "after"])
def test_in_a_model_that_changes_it_first(cleared: str) -> None:
    """Whatever the first record of the step is: the call of the model may be number 0."""

    def program() -> None:
        model = Outer()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(5):
            x = torch.rand(4, 6).log()
            if step == 3:
                x[1, 2] = -math.inf
            if cleared == "before":
                optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if cleared == "after":
                optimizer.zero_grad()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.severity, found.step) == ("TT105", "warning", 3)


def test_a_bias_that_masks_is_not_blamed_for_another_fault_of_the_model() -> None:
    bias = (-0.5 * torch.arange(6.0)).masked_fill(torch.arange(6) > 4, -math.inf)

    def program() -> None:
        model = Outer()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(240):
            x = torch.rand(4, 6)
            y = model(x, bias) if step == 230 else model(x)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.step) == ("TT101", 230)
