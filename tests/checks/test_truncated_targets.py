from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import brief, call, closing, find, module, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import images, line
from tests.healthy.vision import convnet


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.lstm(x[..., None])[0][:, -1])


def forecast(prepare, loss):
    def program():
        model = Forecaster()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        x, y = line(32)
        for _ in range(2):
            adam.zero_grad()
            loss(model(x), prepare(y)).backward()
            adam.step()

    return program


@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss()])
def test_prices_cast_to_long_and_back_lose_their_fraction(loss):
    (found,) = find_live(forecast(lambda y: (10 * y).long().view(-1, 1).float(), loss), "TT508")
    assert (found.severity, found.op, found.step) == ("warning", "long", 0)
    assert "makes i64 of targets with a fraction" in found.message
    assert found.location.file == __file__
    assert find_live(forecast(lambda y: (10 * y).view(-1, 1), loss), "TT508") == []


def test_integers_that_come_as_floats_lose_nothing():
    rounded = forecast(lambda y: (10 * y).round().to(torch.int32).float(), F.mse_loss)
    assert find_live(rounded, "TT508") == []


def classify(labels):
    def program():
        model = convnet()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(2):
            x, y = images(16)
            adam.zero_grad()
            F.cross_entropy(model(x), labels(y)).backward()
            adam.step()

    return program


def test_soft_labels_all_become_class_zero():
    (found,) = find_live(classify(lambda y: (0.3 * y).long()), "TT508")
    assert "16 of 16 are 0" in found.message
    assert find_live(classify(lambda y: F.one_hot(y, 4).float() * 0.9 + 0.025), "TT508") == []


def test_numbers_put_into_classes_are_silent():
    assert find_live(classify(lambda y: (y * 1.1 + 0.05).long()), "TT508") == []


def run(before, after, *, name="mse_loss", dtype="int64", cast="long"):
    """A cast and then a loss; the statistics of the tensors before and after the cast."""
    tensors = [ok(1, **{"min": 0.0, "max": 10.0, "mean": 5.0, "norm": 20.0, **before}),
               ok(2, dtype=dtype, **{"min": 0.0, "max": 10.0, "mean": 5.0, "norm": 20.0, **after}),
               ok(3), ok(4)]  # fmt: skip
    yield module("loss", cls="MSELoss")
    yield op(1, cast, [1], [2], tensors[:2])
    yield op(2, name, [3, 2], [4], tensors[2:])
    yield closing()


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"after": {"mean": 4.9989}}, 1),
        ({"after": {"mean": 4.9991}}, 0),
        ({"after": {"norm": 19.99}}, 1),
        ({"after": {}}, 0),
        ({"after": {"mean": 4.5}, "dtype": "float16"}, 0),
        ({"after": {"mean": 4.5}, "before": {"dtype": "int64"}}, 0),
        ({"after": {"mean": 4.5}, "before": {"nan": 1}}, 0),
        ({"after": {"mean": None, "norm": None}}, 0),
        ({"after": {"mean": 4.5}, "cast": "add"}, 0),
        ({"after": {"mean": 4.5}, "name": "cross_entropy"}, 0),
        ({"after": {"mean": 0.0}, "before": {"max": 1.0}, "name": "cross_entropy"}, 1),
        ({"after": {"mean": 4.5}, "name": "softmax"}, 0),
    ],
)
def test_thresholds(changes, count):
    assert len(find(run(changes.pop("before", {}), **changes), "TT508")) == count


def test_loss_module_counts_too_and_empty_runs_are_silent():
    records = list(run({}, {"mean": 4.5}))
    records[2] = call(2, "loss", [3, 2], [4], records[2].tensors)
    assert brief(find(records, "TT508")) == [("TT508", "warning", "long")]
    assert find([], "TT508") == []
    assert find([closing()], "TT508") == []
