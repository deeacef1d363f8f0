from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.builders import make_tensor
from tests.checks import brief, call, closing, find, module, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images


class Attention(nn.Module):
    """One head; the softmax is a module of its own."""

    def __init__(self, width, scale):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax, self.scale = nn.Softmax(dim=-1), scale

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(self.softmax(q @ k.transpose(-2, -1) * self.scale) @ v)


def attend(scale):
    def program():
        model = nn.Sequential(nn.Embedding(20, 64), Attention(64, scale), nn.Linear(64, 20))
        nn.init.normal_(model[1].qkv.weight, std=0.5)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            tokens = torch.stack([torch.randperm(20)[:12] for _ in range(8)])
            adam.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
            adam.step()

    return program


def test_scores_that_are_not_divided_by_the_root_of_the_width_are_told():
    (found,) = find_live(attend(1.0), "TT302")
    assert brief([found]) == [("TT302", "warning", "1.softmax")]
    assert found.step == 3
    assert "the mean slope of softmax in 1.softmax is" in found.message
    assert find_live(attend(1 / 64), "TT302") == []


def classify(scale, activation, *, functional=False):
    """A convolutional classifier of images in 0..255 that were or were not scaled to 0..1."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 8, 3), activation()
            self.head = nn.Linear(800, 4)

        def forward(self, x):
            x = torch.tanh(self.conv(x)) if functional else self.act(self.conv(x))
            return self.head(x.flatten(1))

    def program():
        model = Net()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(5):
            x, y = images(8)
            pixels = 255 * torch.sigmoid(4 * x)
            sgd.zero_grad()
            F.cross_entropy(model(pixels * scale), y).backward()
            sgd.step()

    return program


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
def test_pixels_up_to_255_saturate_and_scaled_ones_do_not(activation):
    (found,) = find_live(classify(1.0, activation), "TT302")
    assert (found.step, found.module) == (3, "act")
    assert "on an input of rms" in found.message
    assert find_live(classify(1 / 255, activation), "TT302") == []


def test_functional_calls_are_seen_at_op_level():
    program = classify(1.0, nn.Identity, functional=True)
    assert find_live(program, "TT302") == []
    (found,) = find_live(program, "TT302", level="op")
    assert (found.module, found.op) == ("", "tanh")
    assert found.location.file == __file__


def test_a_sure_output_is_silent():
    """What the last activation of a model gives may be as sure as it likes."""

    def program():
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 1), nn.Sigmoid())
        nn.init.normal_(model[1].weight)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(5):
            x, _ = images(8)
            sgd.zero_grad()
            F.binary_cross_entropy(model(20 * x), torch.ones(8, 1)).backward()
            sgd.step()

    assert find_live(program, "TT302") == []


def of_slope(kind, slope):
    """An output with this mean slope, relative to the greatest; a softmax has 10 classes."""
    square, mean = {
        "Softmax": (0.1 * (1 - 0.9 * slope), 0.1), "Sigmoid": (0.5 - slope / 4, 0.5),
    }.get(kind, (1 - slope, 0.0))  # fmt: skip
    norm = math.sqrt(100 * square)
    return make_tensor(2, 10, 10, norm=norm, mean=mean, requires_grad=True)


def steps(kind, slopes, *, full=True, grad=True, training=True, trains=True, last=False):
    yield module("act", cls=kind)
    yield module("fc", "weight")
    for i, slope in enumerate(slopes):
        made = of_slope(kind, slope)
        yield call(1, "", [1], [3], [make_tensor(1, 10, 10), make_tensor(3, 10)], step=i)
        yield call(2, "act", [1], [2], [made], step=i, parent=1, training=training,
                   grad_enabled=grad)  # fmt: skip
        if not last:
            yield call(3, "fc", [2], [3], step=i, parent=1)
        if trains:
            yield optimizer(step=i)
        yield closing(i, full=full)


@pytest.mark.parametrize("kind", ["Sigmoid", "Tanh", "Softmax"])
def test_four_of_six_full_steps_below_the_limit(kind):
    low, high = 0.0199, 0.0201
    (found,) = find(steps(kind, [low] * 4), "TT302")
    assert (found.step, found.limit) == (3, 0.02)
    assert found.value == pytest.approx(low)
    assert len(find(steps(kind, [low, high, low, high, low, low]), "TT302")) == 1
    assert find(steps(kind, [low, high, low, high, high, low, low]), "TT302") == []
    assert find(steps(kind, [low] * 3), "TT302") == []
    assert find(steps(kind, [high] * 9), "TT302") == []
    assert len(find(steps(kind, [high] * 4), "TT302", slope=0.03)) == 1


@pytest.mark.parametrize(
    "how",
    [{"full": False}, {"grad": False}, {"training": False}, {"trains": False}, {"last": True}],
)
def test_what_does_not_train_or_is_the_last_is_silent(how):
    assert find(steps("Tanh", [0.0] * 9, **how), "TT302") == []


def test_a_slope_is_never_below_0():
    (found,) = find(steps("Tanh", [-2e-16] * 4), "TT302")
    assert found.value == 0
    assert "the mean slope of tanh in act is 0 of" in found.message


def test_what_cannot_be_the_output_of_a_tanh_is_silent():
    assert find(steps("Tanh", [-7.0] * 9), "TT302") == []


def test_relu_and_empty_input_are_silent():
    assert find(steps("ReLU", [0.0] * 9), "TT302") == []
    assert find([], "TT302") == []
