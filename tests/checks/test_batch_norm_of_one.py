from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.checks import brief, call, closing, find, module, ok
from tests.checks.traced import find_live
from tests.healthy.data import images, points
from tests.healthy.vision import convnet


def train(model, n, batch_size, **options):
    def program():
        net = model()
        sgd = torch.optim.SGD(net.parameters(), lr=0.01)
        data = TensorDataset(*images(n))
        for x, y in DataLoader(data, batch_size=batch_size, **options):
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            sgd.step()

    return program


def with_group_norm():
    return nn.Sequential(*[nn.GroupNorm(2, layer.num_features) if isinstance(layer, nn.BatchNorm2d)
                           else layer for layer in convnet()])  # fmt: skip


def test_convnet_trained_one_picture_at_a_time():
    (found,) = find_live(train(convnet, 5, 1), "TT707")
    assert (found.severity, found.module, found.step) == ("warning", "1", 2)
    assert "one sample" in found.message
    assert find_live(train(with_group_norm, 5, 1), "TT707") == []
    assert find_live(train(convnet, 40, 8), "TT707") == []


def test_last_batch_of_one_picture_is_a_note():
    (found,) = find_live(train(convnet, 17, 8), "TT707")
    assert (found.severity, found.step) == ("note", 2)
    assert find_live(train(convnet, 17, 8, drop_last=True), "TT707") == []


def test_two_rows_in_a_perceptron_are_plus_and_minus_one():
    def program(n):
        net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        sgd = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(4):
            x, y = points(n)
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            sgd.step()

    (found,) = find_live(lambda: program(2), "TT707")
    assert "2 values a channel (limit 2)" in found.message
    assert find_live(lambda: program(3), "TT707") == []


def test_single_samples_in_eval_mode_or_without_gradient_are_silent():
    def program():
        net = convnet()
        for _ in range(4):
            with torch.no_grad():
                net(images(1)[0])
        net.eval()
        for _ in range(4):
            net(images(1)[0]).sum().backward()

    assert find_live(program, "TT707") == []


def step(i, *shape, training=True, reached=True, cls="BatchNorm2d", **changes):
    yield module("bn", "weight", cls=cls, shape=(4,), step=i)
    x, y = ok(1, *shape), ok(2, *shape)
    yield call(1, "bn", [1], [2], [x, y], step=i, training=training, **changes)
    if reached:
        yield call(2, "bn", [3], [4], [], step=i, phase="backward", forward=1)
    yield closing(i)


def run(*shapes, **changes):
    return [record for i, shape in enumerate(shapes) for record in step(i, *shape, **changes)]


@pytest.mark.parametrize(
    ("shapes", "changes", "found"),
    [
        ([(1, 4, 8, 8)] * 3, {}, ["warning"]),
        ([(1, 4, 8, 8)] * 2, {}, []),
        ([(2, 4)] * 3, {}, ["warning"]),
        ([(3, 4)] * 3, {}, []),
        ([(1, 4, 8, 8)] * 2 + [(2, 4, 8, 8)] + [(1, 4, 8, 8)], {}, ["note"]),
        ([(1, 4)] * 3, {"reached": False, "exception": "ValueError"}, ["warning"]),
        ([(1, 4, 8, 8)] * 3, {"reached": False}, []),
        ([(1, 4, 8, 8)] * 3, {"training": False}, []),
        ([(1, 4, 8, 8)] * 3, {"cls": "GroupNorm"}, []),
    ],
)
def test_thresholds(shapes, changes, found):
    assert [f.severity for f in find(run(*shapes, **changes), "TT707")] == found


def test_empty_run_is_silent():
    assert brief(find([], "TT707")) == []
    assert find([closing()], "TT707") == []
