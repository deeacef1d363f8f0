from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import call, closing, find, loss, module, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import images
from tests.healthy.vision import convnet


def train(under, *, scaled=False, model=convnet):
    def program():
        net = model()
        sgd = torch.optim.SGD(net.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            x, y = images(8)
            sgd.zero_grad()
            with under():
                value = F.cross_entropy(net(x), y)
            scaler.scale(value).backward()
            scaler.step(sgd)
            scaler.update()

    return program


def half():
    return torch.autocast("cpu", dtype=torch.float16)


def test_scaler_around_a_step_in_float32():
    (found,) = find_live(train(contextlib.nullcontext, scaled=True), "TT507")
    assert (found.severity, found.step) == ("note", 1)
    assert "nothing is under autocast" in found.message
    assert find_live(train(half, scaled=True), "TT507") == []
    assert find_live(train(contextlib.nullcontext), "TT507") == []


class Written(nn.Linear):
    """A linear layer that writes into a buffer of its own, which autocast does not see."""

    def forward(self, x):
        out = self.weight.new_zeros(x.shape[0], self.out_features)
        return out.addmm_(x.float(), self.weight.t()) + self.bias


def written():
    Written.__name__ = "Linear"
    return nn.Sequential(*list(convnet())[:-1], Written(16, 4))


def test_layer_that_multiplies_in_place_is_a_note():
    (found,) = find_live(train(lambda: torch.autocast("cpu"), model=written), "TT507")
    assert (found.severity, found.module) == ("note", "10")
    assert "on the same device" in found.message


@pytest.mark.parametrize("level", ["module", "op"])
def test_norms_losses_and_blocks_without_autocast_are_meant(level):
    class Head(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    def model():
        return nn.Sequential(*list(convnet())[:-1], nn.LayerNorm(16), Head(16, 4))

    program = train(lambda: torch.autocast("cpu"), model=model)
    assert find_live(program, "TT507", level=level) == []


def steps(count, *, autocast="cuda:float16", device="cpu", dtype="float32", cls="Linear", **more):
    for i in range(count):
        yield module("fc", "weight", cls=cls, step=i)
        tensors = [ok(1, dtype=more.get("given", "float32"), device=device),
                   ok(2, dtype=dtype, device=device)]  # fmt: skip
        if cls == "op":
            yield op(1, "matmul", [1], [2], tensors, step=i, autocast=autocast)
        else:
            yield call(1, "fc", [1], [2], tensors, step=i, autocast=autocast)
        if more.get("scaled"):
            yield Action(step=i, seq=2, action="scale")
        yield loss(3, 1.0, step=i)
        yield closing(i)


@pytest.mark.parametrize(
    ("changes", "severities"),
    [
        ({}, ["warning"]),
        ({"cls": "op"}, ["warning"]),
        ({"device": "cuda:0"}, ["note"]),
        ({"autocast": "cpu:bfloat16,cuda:float16"}, ["note"]),
        ({"dtype": "float16"}, []),
        ({"cls": "LayerNorm"}, []),
        ({"autocast": None}, []),
        ({"given": "float64"}, []),
        ({"autocast": None, "scaled": True}, ["note"]),
        ({"autocast": None, "scaled": True, "dtype": "float16"}, []),
    ],
)
def test_two_steps_are_the_limit(changes, severities):
    assert [f.severity for f in find(steps(2, **changes), "TT507")] == severities
    assert find(steps(1, **changes), "TT507") == []


def test_empty_run_is_silent():
    assert find([], "TT507") == []
    assert find([closing()], "TT507") == []
