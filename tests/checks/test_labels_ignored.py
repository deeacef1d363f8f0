from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Step
from tests.checks import call, find, module, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import sentences
from tests.healthy.language import LanguageModel


def summed(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum().clamp_min(1)


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(reduction="sum")

    def forward(self, logits, labels):
        return self.loss(logits, labels) / (labels != -100).sum().clamp_min(1)


def tuning(prompt, loss, count=4):
    """Only the answer behind a prompt is learnt; the longest sentences are cut."""

    def run():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i in range(count):
            tokens = sentences(n=4, length=8)
            labels = tokens[:, 1:].clone()
            labels[:, : prompt(i)] = -100
            adam.zero_grad()
            loss(model(tokens[:, :-1]).flatten(0, 1), labels.flatten()).backward()
            adam.step()

    return run


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("loss", [summed, Summed()], ids=["function", "module"])
def test_a_prompt_as_long_as_the_sentence(loss, level):
    (found,) = find_live(tuning(lambda i: 7, loss), "TT613", level=level)
    assert (found.severity, found.step, found.value, found.limit) == ("warning", 2, 3, 3)
    assert "all 28 labels of" in found.message
    assert find_live(tuning(lambda i: 4, loss), "TT613", level=level) == []


def test_a_batch_without_labels_now_and_then_is_normal():
    assert find_live(tuning(lambda i: 7 if i % 3 else 3, summed, 8), "TT613") == []


def steps(labels, losses, *, cls=None, **changes):
    for i, loss in enumerate(losses):
        tensors = [ok(1, 8, 10), ok(2, 8, dtype="int64", min=labels[0], max=labels[1])]
        if cls:
            yield module("loss", cls=cls, step=i)
            yield call(0, "loss", [1, 2], [], tensors, step=i)
        else:
            yield op(0, "cross_entropy", [1, 2], [], tensors, step=i, **changes)
        yield Step(step=i, seq=9, loss=loss)


def test_the_loss_must_be_exactly_zero_three_times_running():
    assert len(find(steps((-100, -100), [0.0] * 3), "TT613")) == 1
    assert find(steps((-100, -100), [0.0] * 2), "TT613") == []
    assert find(steps((-100, -100), [0.0, 0.0, 1e-30, 0.0]), "TT613") == []
    assert len(find(steps((-100, -100), [0.0, 0.0]), "TT613", sustain=2)) == 1


def test_labels_that_count_are_silent():
    assert find(steps((-100, 3), [0.0] * 5), "TT613") == []
    assert find(steps((3, 3), [0.0] * 5), "TT613") == []
    assert len(find(steps((3, 3), [0.0] * 5, arguments={"ignore_index": 3}), "TT613")) == 1
    assert find(steps((3, 3), [0.0] * 5, cls="NLLLoss"), "TT613") == []
    assert len(find(steps((255, 255), [0.0] * 5, cls="NLLLoss"), "TT613")) == 1


def test_nothing_says_nothing():
    assert find([], "TT613") == []
    assert find([Step(step=i, seq=1) for i in range(5)], "TT613") == []
    assert find([Step(step=i, seq=1, loss=0.0) for i in range(5)], "TT613") == []
