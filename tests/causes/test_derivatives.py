"""Gradients that a loss is made of: the pass that spoils one is found like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tensortrace.capture import rest
from tensortrace.records import DERIVATIVE, Call, Finding
from tests.capture import record
from tests.checks.traced import find_live


class Root(nn.Module):
    """Its slope is infinite, and NaN is what comes of it for all before."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x * 0)  # the cause


class Model(nn.Module):
    def __init__(self, of: int = 2) -> None:
        super().__init__()
        self.first, self.last, self.root = nn.Linear(of, 16), nn.Linear(16, 1), Root()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if (x.detach() > 50).any():
            h = h + self.root(h)
        return self.last(h)


class AtOnce(Model):
    """Takes the root of what comes in, so that no module sees the gradient that it spoils."""

    def forward(self, x: Tensor) -> Tensor:
        far = torch.sqrt(x.square().sum(1, keepdim=True))  # the cause
        return super().forward(torch.cat([x, far], 1))


class Forces(nn.Module):
    """Computes a gradient in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = Model()

    def forward(self, at: Tensor) -> Tensor:
        return forces(self.energy, at)


def forces(model: nn.Module, at: Tensor) -> Tensor:
    apart = (at[:, None] - at[None]).square().sum(-1)[~torch.eye(len(at), dtype=torch.bool)]
    apart = apart.sqrt()  # the cause
    energy = model(torch.stack([apart, apart.exp().reciprocal()], -1)).sum()
    return -torch.autograd.grad(energy, at, create_graph=True)[0]


def points(n: int, bad: bool) -> Tensor:
    x = torch.rand(n, 2)
    x[0, 0] = 60.0 if bad else 0.5
    return x


def differential_equation(model: nn.Module, bad: bool) -> Tensor:
    x = points(32, bad).requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope[:, 0] - u[:, 0]).square().mean()


def gradient_penalty(critic: nn.Module, bad: bool) -> Tensor:
    real, between = torch.rand(16, 2), points(16, bad).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean() - critic(real).mean()


def inner_step(model: nn.Module, bad: bool) -> Tensor:
    weights, x = dict(model.named_parameters()), points(16, bad)
    inner = F.mse_loss(functional_call(model, weights, x[:8]), x[:8, :1])
    grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {k: w - 0.05 * g for (k, w), g in zip(weights.items(), grads, strict=True)}
    return F.mse_loss(functional_call(model, moved, x[8:]), x[8:, :1])


def leaf_goes_in(model: nn.Module, bad: bool) -> Tensor:
    x = torch.rand(32, 2)
    x[3] = 0.0 if bad else x[3]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().mean()


def energy_outside(model: nn.Module, bad: bool) -> Tensor:
    at = torch.randn(8, 2)
    at[3] = at[4] if bad else at[3]
    return forces(model, at.requires_grad_()).square().mean()


def energy_inside(model: nn.Module, bad: bool) -> Tensor:
    at = torch.randn(8, 2)
    at[3] = at[4] if bad else at[3]
    return model(at.requires_grad_()).square().mean()


Loss = Callable[[nn.Module, bool], Tensor]
LOSSES: dict[str, tuple[Callable[[], nn.Module], Loss, str]] = {
    "leaf_goes_in": (lambda: AtOnce(3), leaf_goes_in, ""),
    "differential_equation": (Model, differential_equation, "root"),
    "gradient_penalty": (Model, gradient_penalty, "root"),
    "inner_step": (Model, inner_step, "root"),
    "energy_outside": (Model, energy_outside, ""),
    "energy_inside": (Forces, energy_inside, ""),
}


def train(name: str, bad_at: int | None, steps: int, **options: Any) -> list[Finding]:
    kind, loss_of, _ = LOSSES[name]

    def program() -> None:
        model = kind()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(steps):
            loss = loss_of(model, step == bad_at)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return find_live(program, **options)


@pytest.mark.parametrize("bad_at", [0, 27, 45])
@pytest.mark.parametrize("name", LOSSES)
def test_the_op_that_spoilt_a_gradient_in_the_loss_is_named_with_its_line(
    name: str, bad_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "RESTS_FROM", 20)
    found = [f for f in train(name, bad_at, bad_at + 4) if f.severity != "note"]
    assert [(f.step, f.code, f.severity, f.phase, f.op) for f in found] == [
        (bad_at, "TT102", "error", "backward", "sqrt")
    ]
    (finding,) = found
    assert (finding.module or "") == LOSSES[name][2]
    assert finding.location is not None
    assert finding.location.code is not None
    assert finding.location.code.endswith("# the cause")
    assert finding.evidence["placed"] == ("direct" if name == "energy_outside" else "exact")
    assert "the loss is made of what autograd.grad returned at" in finding.message
    assert finding.chain[-1].op == DERIVATIVE


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", LOSSES)
def test_healthy_twins_are_silent(name: str, level: str) -> None:
    found = train(name, None, 30, level=level)
    assert [f for f in found if f.severity != "note"] == []


@pytest.mark.parametrize("name", LOSSES)
def test_the_op_level_names_the_same_line(name: str) -> None:
    found = train(name, 3, 6, level="op")
    assert (found[0].code, found[0].op) == ("TT102", "sqrt")
    assert found[0].location is not None
    assert found[0].location.code is not None
    assert found[0].location.code.endswith("# the cause")


def test_a_call_of_autograd_grad_is_an_op_with_its_gradients() -> None:
    x = torch.rand(4, 2, requires_grad=True)
    seen: list[Tensor] = []

    def program(t: Any) -> None:
        model = Model()
        seen.extend(torch.autograd.grad(model(x).sum(), [x, model.last.bias], create_graph=True))
        (seen[0] * 2).sum().backward()

    records = record(program)
    (call,) = (c for c in records.of(Call) if c.op == DERIVATIVE)
    assert (call.phase, call.module, call.arguments) == ("forward", None, {"create_graph": True})
    tensors = {t.id: t for c in records.of(Call) for t in c.tensors}
    assert [tensors[id].shape for _, id in call.outputs] == [(4, 2), (1,)]
    norms = [tensors[id].norm for _, id in call.outputs]
    assert norms == pytest.approx([g.detach().norm().item() for g in seen])
    # What the hook on a parameter saw is the same tensor.
    bias = next(c for c in records.of(Call) if c.outputs and c.outputs[0][0] == "bias")
    assert bias.outputs[0][1] == call.outputs[1][1]
    (taken,) = (c for c in records.of(Call, phase="forward") if c.op == "mul")
    assert taken.inputs[0][1] == call.outputs[0][1]


def test_a_gradient_that_is_bad_and_not_used_is_a_note() -> None:
    def program() -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            x = points(8, step == 3).requires_grad_()
            loss = model(x.detach().clamp_max(1.0)).square().mean()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            loss = loss + slope.nan_to_num(0.0, 0.0, 0.0).detach().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert [
        (f.step, f.code, f.severity) for f in find_live(program, "TT101", "TT102", "TT103")
    ] == [(3, "TT102", "note")]


def test_a_bad_gradient_and_another_cause_before_it_are_told_apart() -> None:
    def program() -> None:
        x, model = points(8, True).requires_grad_(), Model()
        spoilt = torch.log(x.detach() - 100)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (slope.mean() + spoilt.mean()).backward()

    found = find_live(program, "TT101", "TT102", "TT103")
    assert [(f.code, f.op) for f in found] == [("TT101", "log")]


def by_hand(model: nn.Module, bad: bool) -> None:
    loss = model(points(32, bad)).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.sub_(0.01 * grad)


def sharpness_aware(model: nn.Module, bad: bool) -> None:
    x = points(32, bad)
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().mean(), list(weights.values()))
    with torch.no_grad():
        moved = {k: w + 0.01 * g for (k, w), g in zip(weights.items(), grads, strict=True)}
    loss = functional_call(model, {k: w.requires_grad_() for k, w in moved.items()}, x)
    loss.square().mean().backward()


@pytest.mark.parametrize("step_once", [by_hand, sharpness_aware])
@pytest.mark.parametrize("bad_at", [2, 30])
def test_weights_made_of_a_bad_gradient_follow_from_it(step_once: Any, bad_at: int) -> None:
    def program() -> None:
        model = Model()
        for step in range(bad_at + 5):
            step_once(model, step == bad_at)

    found = find_live(program, "TT101", "TT102", "TT103", "TT104", "TT105")
    assert [(f.code, f.severity) for f in found] == [("TT102", "error")]


@pytest.mark.parametrize("how", [
    lambda t: t.detach(), lambda t: t.data, lambda t: t.detach().clone(), lambda t: t.type_as(t),
    lambda t: t.detach().detach()[None].squeeze(0),
])  # fmt: skip
def test_what_is_detached_is_known_as_what_it_was(how: Any) -> None:
    def program() -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            out, reward = model(torch.rand(8, 2)), torch.rand(8, 1) + 0.1
            reward[3] = -1.0 if step == 4 else 0.5
            advantage = how(torch.log(reward))
            optimizer.zero_grad()
            (out * advantage).mean().backward()
            optimizer.step()

    found = find_live(program, "TT101", "TT103", "TT105")
    assert [(f.step, f.code, f.op) for f in found] == [(4, "TT101", "log")]


def test_the_data_of_the_next_step_is_what_this_one_made() -> None:
    """An adversarial example: the gradient is one step's, the call that takes it the next one's.

    Without an optimizer each backward pass ends a step, where a loop is left after it.
    """

    def program() -> None:
        model = Model()
        for step in range(6):
            x = points(8, step == 4).requires_grad_()
            for _ in range(1):
                (slope,) = torch.autograd.grad(model(x).square().mean(), x)
            loss = model((x + 0.1 * slope).detach().clamp_max(1.0)).square().mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)

    found = [f for f in find_live(program, "TT101", "TT103", "TT105") if f.severity == "error"]
    assert [(f.code, f.op) for f in found] == [("TT101", DERIVATIVE)]
    assert "made at the end of step" in found[0].message


class Steep(Model):
    """Spoils the gradient of what comes in, in which no module inside has a part."""

    def forward(self, x: Tensor) -> Tensor:
        far = (x.detach() > 50).any()
        apart = torch.sqrt((x * (0 if far else 1)).square().sum(1, keepdim=True))  # the cause
        return self.last(torch.tanh(self.first(x))) + apart


def attacked(model: nn.Module, at: int, fetched: bool) -> None:
    """Train on adversarial examples, of which one has a gradient of NaN."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batches = [points(8, step == at) for step in range(at + 3)]
    for x in torch.utils.data.DataLoader(batches, batch_size=None) if fetched else batches:
        x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().mean(), x)
        loss = model(x.data.clamp_max(1.0) + 0.1 * slope).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("at", [4, 26])
@pytest.mark.parametrize("cls", [Model, Steep])
def test_what_spoilt_a_gradient_is_found_before_the_next_call_takes_it(
    cls: type[Model], at: int, fetched: bool
) -> None:
    found = find_live(lambda: attacked(cls(), at, fetched))
    (error,) = (f for f in found if f.severity == "error")
    assert (error.code, error.op) == ("TT102", "sqrt")
    assert (error.step, error.update) == (at, at)
    assert error.location is not None
    assert error.location.code.endswith("# the cause")
