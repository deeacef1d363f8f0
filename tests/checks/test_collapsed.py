from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.builders import make_tensor
from tests.checks import brief, call, closing, find, module, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import Encoder


def classify(rate):
    """A convolutional classifier; a rate that is far too high kills its ReLUs in a few steps."""

    def program():
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 32), nn.ReLU(),
            nn.Linear(32, 4),
        )  # fmt: skip
        sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for _ in range(81):
            x, y = images(8)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()

    return program


def test_a_learning_rate_that_kills_the_network_is_told_and_a_lower_one_is_silent():
    (found,) = find_live(classify(3.0), "TT304", every=1)
    assert brief([found]) == [("TT304", "warning", "")]
    assert "the 8 rows of the output [8, 4] of Sequential are alike: apart by" in found.message
    assert find_live(classify(0.01), "TT304", every=1) == []


def hidden_from(hide_all):
    """A sentence classifier whose head gets nothing of the sentence, by a factor left at 0."""

    def program():
        model = Encoder()
        if hide_all:
            model.head.register_forward_pre_hook(lambda head, given: (0 * given[0],))
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(81):
            tokens = sentences()
            adam.zero_grad()
            F.cross_entropy(model(tokens), (tokens[:, 0] > 10).long()).backward()
            adam.step()

    return program


def test_a_classifier_that_sees_nothing_of_its_input_is_told():
    (found,) = find_live(hidden_from(True), "TT304", every=1)
    assert (found.step, found.value) == (80, pytest.approx(0, abs=1e-6))
    assert find_live(hidden_from(False), "TT304", every=1) == []


def test_a_network_that_starts_at_zero_is_told_of_that_and_not_of_its_outputs():
    def program():
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 4))
        for p in model.parameters():
            nn.init.zeros_(p)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(81):
            x, y = images(8)
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

    assert [f.code for f in find_live(program, "TT304", every=1)] == ["TT304"]
    assert [f.code for f in find_live(program, "TT304", "TT403", every=1)] == ["TT403"]


def steps(
    spreads, *, full=True, trains=True, training=True, rows=8, columns=4, given=None, start=50,
    **fields,
):  # fmt: skip
    yield module("", "weight", cls="Net")
    for i, spread in enumerate(spreads, start):
        x = make_tensor(1, 8, 4, **(given or {}))
        made = make_tensor(2, rows, columns, row_spread=spread, **fields)
        yield call(1, "", [1], [2], [x, made], step=i, training=training)
        if trains:
            yield optimizer(step=i)
        yield closing(i, full=full)


def test_four_of_six_looks_below_the_limit():
    low, high = 0.00099, 0.001
    (found,) = find(steps([low] * 4), "TT304")
    assert (found.step, found.value, found.limit) == (53, low, 0.001)
    assert find(steps([low] * 3), "TT304") == []
    assert len(find(steps([low, high, low, high, low, low]), "TT304")) == 1
    assert find(steps([low, high] * 9), "TT304") == []
    # A deep network may start so.
    assert find(steps([low] * 50 + [high] * 9, start=0), "TT304") == []
    # A full step without a look counts for nothing.
    assert len(find(steps([low] * 2 + [None] * 9 + [low] * 2), "TT304")) == 1
    assert find(steps([high] * 9), "TT304") == []
    assert len(find(steps([high] * 4), "TT304", alike=0.002)) == 1


def test_a_single_column_may_be_far_from_zero():
    assert find(steps([2e-5] * 9, columns=1), "TT304") == []
    assert len(find(steps([0.9e-5] * 4, columns=1), "TT304")) == 1
    assert find(steps([0.0] * 9, columns=1, grad_fn="SigmoidBackward0"), "TT304") == []


@pytest.mark.parametrize(
    "how",
    [{"full": False}, {"trains": False}, {"training": False}, {"rows": 3},
     {"given": {"min": 0.0, "max": 0.0}}],
)  # fmt: skip
def test_evaluation_few_rows_and_constant_inputs_are_silent(how):
    assert find(steps([0.0] * 9, **how), "TT304") == []
    assert find([], "TT304") == []
