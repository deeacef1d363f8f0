from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn

from tests.checks import brief, call, closing, find, module, ok
from tests.checks.traced import find_live
from tests.healthy.data import images, loader


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc, self.head = nn.Linear(256, 32), nn.Linear(32, 4)
        self.act = act

    def forward(self, x):
        x = self.act(self.conv1(x))
        x = F.max_pool2d(self.act(self.conv2(x)), 2).flatten(1)
        return self.head(self.act(self.fc(x)))


def training(act, lr, prepare=lambda net: None):
    def run():
        net = Net(act)
        prepare(net)
        adam = torch.optim.Adam(net.parameters(), lr=lr)
        for _ in range(4):
            for x, y in loader():
                adam.zero_grad()
                F.cross_entropy(net(x), y).backward()
                adam.step()

    return run


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("act", [nn.ReLU(), F.relu])
def test_a_step_too_far_kills_a_layer_and_a_shorter_one_does_not(act, level):
    found = find_live(training(act, 1.0), "TT301", level=level)
    assert [(f.code, f.severity) for f in found] == [("TT301", "warning")]
    assert found[0].value > found[0].limit == 0.7
    assert 1 <= found[0].evidence["since"] <= found[0].step - 7
    assert "are dead (limit 70%)" in found[0].message
    assert find_live(training(act, 3e-3), "TT301", level=level) == []


@pytest.mark.parametrize("act", [F.relu, nn.ReLU6(), nn.ReLU(inplace=True)])
def test_a_whole_layer_that_never_lived(act):
    def sink(net):
        with torch.no_grad():
            net.fc.bias.fill_(-100.0)

    (found,) = find_live(training(act, 1e-3, sink), "TT301")
    assert (found.module, found.value) == ("head" if act is F.relu else "act", 1.0)
    assert found.message.startswith("all 32 units of")
    assert "since step 0" in found.message


def test_units_that_live_for_a_few_inputs_only_are_silent():
    """Each answers to one of 64 words: in a batch of 16 most of them are 0."""

    def run():
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        with torch.no_grad():
            net[0].weight.copy_(torch.eye(64))
            net[0].bias.fill_(-0.5)
        sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(20):
            sgd.zero_grad()
            net(F.one_hot(torch.randperm(64)[:16], 64).float()).square().mean().backward()
            sgd.step()

    assert find_live(run, "TT301") == []


@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.GELU(), nn.Hardtanh(), nn.Tanh()])
def test_other_activations_are_silent(act):
    assert find_live(training(act, 0.3), "TT301") == []


def test_a_tiny_batch_is_not_enough_to_tell():
    def run():
        net = Net(F.relu)
        with torch.no_grad():
            net.fc.bias.fill_(-100.0)
        sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(15):
            x, y = images(2)
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            sgd.step()

    assert find_live(run, "TT301") == []


def test_evaluation_is_silent():
    def run():
        net = Net(F.relu)
        with torch.no_grad():
            net.fc.bias.fill_(-100.0)
            for _ in range(20):
                net(images(64)[0])

    assert find_live(run, "TT301") == []


def rectified(dead, units=16, **changes):
    fields = {"units": units, "dead": dead, "dead_since": 2, "grad_fn": "ReluBackward0"}
    made = ok(2, 4, units, **{"min": 0.0, **fields, **changes})
    return [module("act", cls="ReLU"), call(1, "act", [1], [2], [ok(1), made]), closing()]


def test_seven_of_ten_units_are_the_edge_and_a_setting():
    assert find(rectified(14, 20), "TT301") == []
    assert brief(find(rectified(15, 20), "TT301")) == [("TT301", "warning", "act")]
    assert len(find(rectified(9, 20), "TT301", share=0.4)) == 1
    assert find(rectified(6, 7), "TT301") == []
    assert len(find(rectified(6, 7), "TT301", least=7)) == 1


def test_what_goes_below_zero_or_was_not_counted_is_silent():
    assert find(rectified(16, min=-1.0), "TT301") == []
    assert find(rectified(None), "TT301") == []
    assert find(rectified(0), "TT301") == []


def test_what_is_pooled_or_flattened_is_the_same_layer():
    fields = {"units": 16, "dead": 12, "dead_since": 2, "min": 0.0}
    flat = ok(3, 4, 64, grad_fn="ViewBackward0", **fields)
    twice = [*rectified(12)[:-1], call(2, "head", [3], [4], [flat, ok(4)]), closing()]
    assert brief(find(twice, "TT301")) == [("TT301", "warning", "act")]
    assert brief(find(twice[2:], "TT301")) == [("TT301", "warning", "head")]


def test_a_relu_outside_modules_is_called_by_its_name():
    (_, made, _) = rectified(16)
    (found,) = find([structs.replace(made, module=None, op="relu"), closing()], "TT301")
    assert found.message.startswith("all 16 units of output[0] of relu have not")


def test_nothing_says_nothing():
    assert find([], "TT301") == []
    assert find([closing()], "TT301") == []
