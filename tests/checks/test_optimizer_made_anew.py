from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.checks.traced import find_live

CODE = "TT414"
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def plain(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def learn(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def each_epoch(make, *, epochs=5, steps=4, new=None, made=None):
    """Train, with an optimizer (and with `new` a model) that each epoch makes for itself."""

    def program():
        model = network()
        for _ in range(epochs):
            model = new(model) if new is not None else model
            optimizer = make(model)
            if made is not None:
                made.append(optimizer)
            learn(model, optimizer, steps)
            del optimizer

    return program


@pytest.mark.parametrize("make", [adam, momentum])
def test_an_optimizer_for_each_epoch_is_a_note(make):
    (found,) = find_live(each_epoch(make), CODE)
    assert (found.severity, found.value, found.limit) == ("note", 3, 3)
    name = "Adam" if make is adam else "SGD"
    assert f"optimizer 0, {name}, was made anew 3 times for the same parameters" in found.message
    assert "the last time after 4 steps" in found.message
    assert found.step == 12
    assert found.location.code == "optimizer.step()"


def test_an_optimizer_for_each_step_is_a_warning():
    (found,) = find_live(each_epoch(adam, epochs=21, steps=1), CODE)
    assert (found.severity, found.value, found.limit, found.step) == ("warning", 20, 20, 20)
    assert "each after a single step" in found.message
    assert "whatever its gradient" in found.explanation
    assert find_live(each_epoch(adam, epochs=20, steps=1), CODE) == []


def test_one_for_each_phase_of_a_training_is_silent():
    assert find_live(each_epoch(adam, epochs=3), CODE) == []


def test_what_keeps_nothing_has_nothing_to_lose():
    assert find_live(each_epoch(plain), CODE) == []


@pytest.mark.parametrize(
    "new", [lambda model: network(), copy.deepcopy], ids=["another fold", "a copy for each task"]
)
def test_one_for_each_new_model_is_silent(new):
    assert find_live(each_epoch(adam, epochs=30, steps=2, new=new), CODE) == []
    assert find_live(each_epoch(adam, epochs=30, steps=1, new=new), CODE) == []


def test_one_that_goes_on_from_the_state_of_the_one_before_is_silent():
    def program():
        model, kept = network(), None
        for _ in range(6):
            optimizer = adam(model)
            if kept is not None:
                optimizer.load_state_dict(kept)
            learn(model, optimizer, 3)
            kept = copy.deepcopy(optimizer.state_dict())
            del optimizer

    assert find_live(program, CODE) == []


def test_several_that_live_side_by_side_are_silent():
    made = []
    assert find_live(each_epoch(adam, made=made), CODE) == []
    assert len(made) == 5


def test_a_scaler_that_skips_leaves_the_count_as_it_is():
    def program():
        model = network()
        for _ in range(5):
            optimizer, scaler = adam(model), torch.amp.GradScaler("cpu")
            for step in range(3):
                optimizer.zero_grad()
                loss = model(X).square().mean() * (float("inf") if step == 0 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            del optimizer

    (found,) = find_live(program, CODE)
    assert (found.value, found.evidence["steps"]) == (3, 2)
