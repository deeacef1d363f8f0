from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.builders import make_tensor
from tests.checks import brief, call, closing, find, module, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images


def deep(activation):
    """A deep perceptron, as in LeCun's day or in ours."""

    def program():
        layers = [nn.Flatten(), nn.Linear(144, 32)]
        for _ in range(3):
            layers += [*activation(), nn.Linear(32, 32)]
        model = nn.Sequential(*layers, *activation(), nn.Linear(32, 4))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            x, y = images(16)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()

    return program


def shifted(make):
    def program():
        model = make()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(5):
            x, y = images(16)
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

    return program


class Shift(nn.Module):
    def forward(self, x):
        return x + 30.0


def convnet(*between):
    return lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3), *between, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def test_a_deep_stack_of_small_sigmoids_is_a_note():
    def normed():
        return nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()

    (found,) = find_live(deep(lambda: [nn.Sigmoid()]), "TT305")
    assert brief([found]) == [("TT305", "note", "9")]
    assert find_live(deep(normed), "TT305") == []
    assert find_live(deep(lambda: [nn.Tanh()]), "TT305") == []


def test_a_constant_in_front_of_a_convolution_is_a_note_and_a_norm_takes_it_away():
    (found,) = find_live(shifted(convnet(Shift())), "TT305")
    assert brief([found]) == [("TT305", "note", "3")]
    assert found.step == 3
    assert "what module 3 is given has mean 29.9 and std" in found.message
    assert find_live(shifted(convnet(Shift(), nn.BatchNorm2d(16))), "TT305") == []
    assert find_live(shifted(convnet()), "TT305") == []


def steps(means, *, full=True, trains=True, training=True, width=8, **changes):
    yield module("fc", "weight", shape=(4, width))
    for i, mean in enumerate(means):
        given = make_tensor(1, 8, 8, **{"mean": mean, "std": 1.0, "requires_grad": True, **changes})
        yield call(1, "fc", [1], [2], [given, make_tensor(2, 8, 4)], step=i, training=training)
        if trains:
            yield optimizer(step=i)
        yield closing(i, full=full)


@pytest.mark.parametrize("sign", [1, -1])
def test_four_of_six_full_steps_beyond_five_deviations(sign):
    far, near = 5.1 * sign, 5.0 * sign
    (found,) = find(steps([far] * 4), "TT305")
    assert (found.step, found.value, found.limit) == (3, 5.1, 5)
    assert len(find(steps([far, near, far, near, far, far]), "TT305")) == 1
    assert find(steps([far, near, far, near, near, far, far]), "TT305") == []
    assert find(steps([far] * 3), "TT305") == []
    assert find(steps([near] * 9), "TT305") == []
    assert len(find(steps([near] * 4), "TT305", ratio=4.0)) == 1


@pytest.mark.parametrize(
    "how",
    [{"full": False}, {"trains": False}, {"training": False}, {"width": 7}, {"std": 0.0},
     {"requires_grad": False}],
)  # fmt: skip
def test_inputs_of_the_model_evaluation_and_narrow_layers_are_silent(how):
    assert find(steps([99.0] * 9, **how), "TT305") == []
    assert find([], "TT305") == []
