from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import brief, closing, find, module, optimizer, row
from tests.checks.traced import find_live
from tests.healthy.data import images

DEPTH = 10


def train(std):
    """A deep convolutional network without norms; kaiming's gain for ReLU or a fixed std."""

    def program():
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
        for _ in range(DEPTH - 1):
            layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.bias)
                if std is None:
                    nn.init.kaiming_normal_(layer.weight)
                else:
                    nn.init.normal_(layer.weight, std=std)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-9)
        for _ in range(5):
            x, y = images(8)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()

    return program


@pytest.mark.parametrize(("std", "word"), [(0.02, "shrinks"), (1.0, "grows")])
def test_weights_of_a_fixed_scale_are_told_and_kaiming_is_silent(std, word):
    (found,) = find_live(train(std), "TT303")
    assert brief([found]) == [("TT303", "warning", str(2 * (DEPTH - 1)))]
    assert found.step == 3
    assert f"output rms {word} from" in found.message
    assert (found.value > 1000) == (word == "grows")
    assert find_live(train(None), "TT303") == []


def steps(profile, count=4, **changes):
    paths = [f"layers.{i}" for i in range(len(profile))]
    shape = changes.pop("shape", (4, 4))
    yield from (module(path, "weight", shape=shape) for path in paths)
    for step in range(count):
        yield optimizer(step=step, **changes)
        yield closing(step, modules=row(output_rms=dict(zip(paths, profile, strict=True))))


GROWS = [4.0 * 6**i for i in range(5)]  # 1296 in all


def test_both_directions_and_four_steps():
    (found,) = find(steps(GROWS), "TT303")
    assert (found.step, found.value, found.limit, found.module) == (3, 1296, 1000, "layers.4")
    (found,) = find(steps(GROWS[::-1]), "TT303")
    assert (found.value, found.limit) == (1 / 1296, 1 / 1000)
    assert find(steps(GROWS, 3), "TT303") == []


def test_steps_at_rest_are_none_of_those_that_count():
    looked_at = [[*steps(GROWS, 40)][i] for i in range(5)]
    for step in range(40):
        looked_at.append(optimizer(step=step))
        known = {f"layers.{i}": rms for i, rms in enumerate(GROWS)} if step % 10 == 0 else {}
        looked_at.append(closing(step, rested=step % 10 > 0, modules=row(output_rms=known)))
    (found,) = find(looked_at, "TT303")
    assert found.step == 30


@pytest.mark.parametrize(
    "profile",
    [
        [1.0, 6.0, 36.0, 216.0, 1000.0],  # at the limit
        GROWS[1:],  # four layers are no depth
        [1.0, 1.1, 1.2, 1.3, 5000.0],  # one jump: parts on two scales
        [1.0, 90.0, 9.0, 900.0, 90.0, 9000.0],  # to and fro
        [1.0, None, None, None, 9000.0],
        [],
    ],
)
def test_other_profiles_are_silent(profile):
    assert find(steps(profile or [None]), "TT303") == []


def test_limit_is_a_setting_and_evaluation_and_norms_are_silent():
    assert len(find(steps(GROWS), "TT303", ratio=1295.0)) == 1
    assert find(steps(GROWS), "TT303", ratio=1296.0) == []
    assert find(steps(GROWS, shape=(4,)), "TT303") == []
    assert find(steps(GROWS, skipped=True), "TT303") == []
    assert find([], "TT303") == []
