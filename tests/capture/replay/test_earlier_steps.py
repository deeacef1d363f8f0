"""Values that an earlier step made without harm, and that do harm now."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.checks.traced import find_live


def error(program: Any) -> Any:
    """The one error of a program; its line is marked."""
    found = [f for f in find_live(program) if f.severity != "note"]
    assert len(found) == 1
    assert found[0].location is not None
    assert found[0].location.code is not None
    assert found[0].location.code.endswith("# the cause")
    return found[0]


def rollout(bad_at: int) -> None:
    """Each call of the policy without grad is a step; the reward is used some steps later."""
    policy = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(policy.parameters())
    states, rewards = [], []
    for turn in range((bad_at + 2) * 8):
        with torch.no_grad():
            action = policy(torch.randn(1, 2))
            state = torch.zeros(1, 2) if turn == bad_at * 8 + 2 else torch.rand(1, 2) + 0.1
            reward = (state * action).sum(1) / state.norm(dim=1)  # the cause
            states.append(state)
            rewards.append(reward)
        if turn % 8 == 7:
            advantage = torch.cat(rewards) - torch.cat(rewards).mean()
            loss = (policy(torch.cat(states)).sum(1) * advantage).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            states, rewards = [], []


def replay_buffer(bad_at: int) -> None:
    """What is written to a buffer is drawn from it some steps later."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters())
    states, rewards = torch.randn(16, 4), torch.randn(16)
    for step in range(bad_at + 6):
        action = torch.zeros(2) if step == bad_at else torch.rand(2) + 0.1
        reward = action.sum() / action.norm()  # the cause
        states[step % 16], rewards[step % 16] = torch.randn(4), reward
        drawn = torch.arange(bad_at + 1, bad_at + 9) % 16
        drawn[0] = bad_at % 16 if step == bad_at + 4 else drawn[1]
        loss = (model(states[drawn])[:, 0] - rewards[drawn]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("bad_at", [1, 5, 29])
@pytest.mark.parametrize("program", [rollout, replay_buffer])
def test_the_step_that_made_them_is_named(program: Any, bad_at: int) -> None:
    found = error(lambda: program(bad_at))
    assert (found.code, found.op, found.phase) == ("TT101", "div", "forward")
    assert f"made in step {found.evidence['made_in_step']}" in found.message
    assert found.evidence["made_in_step"] < found.step - 1
    # Its seq and tensor would be those of another step.
    assert (found.seq, found.tensor) == (None, None)


@pytest.mark.parametrize("bad_at", [0, 3, 33])
def test_weights_written_after_the_update_are_one_finding(bad_at: int) -> None:
    def program() -> None:
        embedding = nn.Embedding(12, 4)
        optimizer = torch.optim.SGD(embedding.parameters(), 0.1)
        for step in range(bad_at + 4):
            optimizer.zero_grad()
            embedding(torch.arange(12)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                if step == bad_at:
                    embedding.weight[3] = 0.0
                embedding.weight.div_(embedding.weight.norm(dim=1, keepdim=True))  # the cause

    found = error(program)
    assert (found.step, found.code, found.op, found.param) == (
        bad_at + 1,
        "TT101",
        "div_",
        "weight",
    )


def test_what_is_healed_before_it_is_used_does_no_harm() -> None:
    def program() -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters())
        kept: list[torch.Tensor] = []
        for step in range(8):
            kept.append(torch.ones(4) / (torch.zeros(4) if step == 2 else torch.ones(4)))
            x = torch.stack(kept).nan_to_num(0.0, 0.0, 0.0)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    assert [f.severity for f in find_live(program) if f.severity != "note"] == []


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if x[0, 0] > 100:
            y = y + (y - y.detach()).abs().sqrt()  # the cause
        return y


def test_what_was_kept_for_show_is_not_blamed_for_another_cause() -> None:
    """A harmless inf of step 0 is read again in the very step in which a gradient is spoilt."""

    def program() -> None:
        model, history = Rooted(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            x = torch.randn(8, 4)
            x[0, 0] = 101.0 if step == 4 else 0.0
            loss = model(x).square().mean()
            with torch.no_grad():
                if step == 0:
                    history.append(1 / torch.zeros(3))
                if step == 4:
                    torch.stack(history).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    found = error(program)
    assert (found.step, found.code, found.op) == (4, "TT102", "sqrt")


@pytest.mark.parametrize("later", [1, 7])
def test_after_a_batch_that_was_left_out_another_cause_is_told(later: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 4), torch.ones(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    def program() -> None:
        model = Scaled()
        optimizer = torch.optim.SGD(model.parameters(), 0.001)
        for step in range(30 + later + 2):
            model.scale = torch.full((4,), math.nan if step == 30 + later else 1.0)
            y = model(torch.randn(8, 4))
            loss = (y * 0).abs().sum(1).sqrt().mean() if step == 30 else y.square().mean()
            optimizer.zero_grad()
            loss.backward()
            if all(bool(p.grad.isfinite().all()) for p in model.parameters()):
                optimizer.step()

    found = [f for f in find_live(program) if f.severity != "note"]
    assert [(f.step, f.code) for f in found] == [(30, "TT102"), (30 + later, "TT101")]


def test_a_view_of_a_buffer_that_was_met_before_is_told_as_what_it_is() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(4, 4, 4)
            self.register_buffer("places", torch.randn(16, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, self.places[:8])

    def program() -> None:
        model = Embedded()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(7):
            if step == 5:
                model.places.data[0, 0] = math.nan
            loss = model(torch.randn(8, 4)).square().mean()
            if step in (2, 4):
                (model.places * 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.step, found.code) == (5, "TT101")
    assert "of the buffer places" in found.message


def test_a_gradient_taken_at_the_inputs_tells_what_makes_such_ones() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + (x - x.detach()).norm(dim=1, keepdim=True).sqrt()

    def adversarial() -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            x = torch.rand(8, 4, requires_grad=True)
            for _ in range(1):  # steps of an attack, before an optimizer was met
                (slope,) = torch.autograd.grad(model(x).square().sum(), x)  # the cause
            loss = model(x.detach() + 0.1 * slope / slope.norm()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    found = error(adversarial)
    assert (found.code, found.op) == ("TT101", "autograd.grad")
    assert "infinite slope" in found.explanation
    assert "eps inside roots" in found.fix
