from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images


class Autoencoder(nn.Module):
    """Divides by a norm that is 0 for the padding in the batch: the gradient is NaN."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.encode, self.decode = nn.Linear(144, 16), nn.Linear(16, 144)

    def forward(self, x):
        code = F.relu(self.encode(x))
        return self.decode(code / (code.square().sum(1, keepdim=True) + self.eps).sqrt())


def train(eps):
    def program():
        model = Autoencoder(eps)
        nn.init.zeros_(model.encode.bias)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(30):
            x = images(8)[0].flatten(1)
            x[-1] = 0.0
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.mse_loss(model(x)[:-1], x[:-1])
            sgd.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(sgd)
            scaler.update()

    return program


def test_gradients_that_are_always_nan_are_an_error_at_last():
    found = find_live(train(0.0), "TT506")
    assert brief(found) == [("TT506", "error", None)]
    assert found[0].step == 19
    assert "in 20 steps running (limit 20)" in found[0].message


def test_the_repaired_program_is_silent():
    assert find_live(train(1e-6), "TT506") == []


def steps(skipped, scale=lambda s: 2.0):
    for step, skip in enumerate(skipped):
        yield Action(step=step, seq=1, action="scale", detail={"scale": scale(step)})
        yield optimizer(10, step=step, skipped=bool(skip), grad_norm="NaN" if skip else 1.0)
        yield closing(step)


def test_the_edges_of_the_thresholds():
    assert find(steps([1] * 19), "TT506") == []
    (found,) = find(steps([1] * 20), "TT506")
    assert (found.severity, found.value) == ("warning", 20)
    assert [f.severity for f in find(steps([1] * 20, lambda s: 0.9), "TT506")] == ["error"]
    assert len(find(steps([1] * 5), "TT506", running=5)) == 1


def test_every_second_step_is_too_many_once_it_is_more_than_half():
    assert find(steps([1, 0] * 40), "TT506") == []
    (found,) = find(steps([1, 1, 0] * 40), "TT506")
    assert found.severity == "warning"
    assert "34 of its last 50 steps (limit 50%)" in found.message
    assert found.step == 49


def test_a_start_that_is_too_high_and_rare_skips_are_silent():
    assert find(steps([1] * 16 + [0] * 60), "TT506") == []
    assert find(steps([0] * 40 + [1] + [0] * 40), "TT506") == []


def test_a_scale_that_is_no_number_and_empty_runs_say_nothing():
    assert find([], "TT506") == []
    assert find(steps([0] * 99, lambda s: "Infinity"), "TT506") == []
