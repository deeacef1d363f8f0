from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.builders import HERE
from tests.capture import record
from tests.checks import brief, closing, find, module, ok, op, optimizer, row
from tests.checks.traced import find_live
from tests.healthy.data import images, line
from tests.healthy.vision import convnet
from tests.neutral import one_thread


def classify(model, steps, *, rate=lambda i: 0.05, loss=F.cross_entropy, labels=lambda y: y):
    def program(*_):
        torch.manual_seed(0)
        x, y = images(16)
        net = model()
        sgd = torch.optim.SGD(net.parameters(), lr=0.05, weight_decay=0.01)
        for i in range(steps):
            sgd.param_groups[0]["lr"] = rate(i)
            sgd.zero_grad()
            loss(net(x), labels(y)).backward()
            sgd.step()

    return program


def perceptron(bias):
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    nn.init.constant_(net[1].bias, bias)
    return net


def test_dead_activations_leave_the_loss_where_it_is_though_weight_decay_moves_weights():
    (found,) = find_live(classify(lambda: perceptron(-100.0), 12), "TT608")
    assert (found.severity, found.step, found.limit) == ("warning", 9, 10)
    assert found.value == pytest.approx(math.log(4))
    assert found.location.file == __file__
    assert find_live(classify(lambda: perceptron(0.0), 12), "TT608") == []


def test_rate_that_is_raised_a_thousandfold_makes_the_loss_leap():
    (found,) = find_live(classify(convnet, 30, rate=lambda i: 0.05 if i < 15 else 50.0), "TT608")
    assert "for 10 steps" in found.message
    assert find_live(classify(convnet, 30), "TT608") == []


def test_nll_of_logits_falls_below_zero():
    (found,) = find_live(classify(convnet, 6, loss=F.nll_loss), "TT608")
    assert found.op == "nll_loss"
    assert found.value < 0
    assert "holds no logarithms" in found.message
    log_softmax = classify(lambda: nn.Sequential(convnet(), nn.LogSoftmax(1)), 3, loss=F.nll_loss)
    assert find_live(log_softmax, "TT608") == []


def guess(**changes):
    with one_thread():
        return find(record(classify(convnet, 45, **changes)), "TT608", patience=20)


def test_labels_that_do_not_belong_to_their_images_leave_cross_entropy_at_chance():
    (found,) = guess(labels=lambda y: torch.randint(4, y.shape))
    assert "of the 1.39 that guessing gives" in found.message
    assert guess() == []


def test_regression_that_is_stuck_at_the_mean_has_the_variance_as_its_loss():
    def program(shuffle):
        torch.manual_seed(0)
        x, y = line(64)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        adam = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(45):
            target = y[torch.randperm(64)] if shuffle else y
            adam.zero_grad()
            F.mse_loss(net(x), target).backward()
            adam.step()

    with one_thread():
        stuck, learns = (record(lambda _, s=s: program(s)) for s in (True, False))
    (found,) = find(stuck, "TT608", patience=20, near=0.1)
    assert found.op == "mse_loss"
    assert find(learns, "TT608", patience=20, near=0.1) == []


def steps(losses, *, ratio=0.01, dtype="float32", others=0):
    """One loss a step, of one line, by one optimizer of several."""
    yield module("a", "weight")
    for i, value in enumerate(losses):
        yield Action(step=i, seq=1, action="loss", location=HERE,
                     detail={"value": value, "dtype": dtype})  # fmt: skip
        yield optimizer(2, step=i, index=i % (others + 1))
        yield closing(i, modules=row(update_ratio={"a": ratio}))


def test_ten_equal_losses_are_one_finding_and_nine_are_none():
    assert [f.step for f in find(steps([2.0] * 30), "TT608")] == [9]
    assert find(steps([2.0] * 9 + [1.99] + [2.0] * 9), "TT608") == []
    assert [f.step for f in find(steps([2.0] * 3), "TT608", constant=3)] == [2]


def test_loss_in_half_precision_is_coarse():
    assert find(steps([2.0] * 39, dtype="bfloat16"), "TT608") == []
    assert len(find(steps([2.0] * 40, dtype="bfloat16"), "TT608")) == 1


def test_what_has_converged_what_is_zero_and_what_nothing_moves_is_silent():
    assert find(steps([2.0] + [1.5] * 30), "TT608") == []
    assert find(steps([0.0] * 30), "TT608") == []
    assert find(steps([2.0] * 30, ratio=0.0), "TT608") == []
    assert find(steps([2.0] * 30, ratio=1e-6), "TT608") == []
    assert find(steps([2.0] * 30, ratio=None), "TT608") == []


def test_leap_that_stays_is_told_and_a_spike_is_not():
    low = [2.0, 1.5, 1.0]
    (found,) = find(steps([*low, *[6.1] * 5, *[7.0] * 5]), "TT608")
    assert (found.step, found.limit) == (12, 6.0)
    assert find(steps([*low, *[5.9] * 12]), "TT608", constant=99) == []
    assert find(steps([*low, *[9.0] * 9, 1.0, *[9.0] * 9]), "TT608", constant=99) == []


def test_losses_of_two_optimizers_and_densities_may_rise():
    assert find(steps([2.0, 1.5, 1.0, *range(10, 30)], others=1), "TT608") == []
    assert find(steps([-2.0, 1.5, 1.0, *range(10, 30)]), "TT608") == []


@pytest.mark.parametrize(("value", "count"), [(-0.002, 1), (-0.001, 0), (None, 0)])
def test_threshold_of_a_negative_loss(value, count):
    tensors = [ok(1, 4, 3), ok(2, 4), ok(3, numel=1, min=value)]
    call = op(1, "cross_entropy", [1, 2], [3], tensors)
    assert (
        brief(find([call, closing()], "TT608")) == [("TT608", "warning", "cross_entropy")][:count]
    )


def test_empty_and_nonfinite_runs_are_silent():
    assert find([], "TT608") == []
    assert find([closing()], "TT608") == []
    assert find(steps(["NaN"] * 30), "TT608") == []
