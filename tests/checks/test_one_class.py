from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.checks import call, closing, find, module, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import images, points
from tests.healthy.vision import convnet


def epoch(arrange, loss=F.cross_entropy, **options):
    """One epoch of a convnet over images whose order is `arrange(labels)`."""

    def program():
        x, y = images(192)
        order = arrange(y)
        model = convnet()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for a, b in DataLoader(TensorDataset(x[order], y[order]), batch_size=8, **options):
            adam.zero_grad()
            loss(model(a), b).backward()
            adam.step()

    return program


def test_folders_read_one_after_the_other_are_told_when_the_second_class_begins():
    exactly = torch.arange(4).repeat_interleave(48)
    fault = epoch(lambda y: y.copy_(exactly).argsort())
    (found,) = find_live(fault, "TT607")
    assert (found.severity, found.op, found.step) == ("warning", "cross_entropy", 6)
    assert "all 8 labels" in found.message
    assert "its loader does not shuffle" in found.message
    assert found.location.file == __file__


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_loader_that_shuffles_mends_it(loss):
    sort = torch.Tensor.argsort
    assert len(find_live(epoch(sort, loss), "TT607")) == 1
    assert find_live(epoch(sort, loss, shuffle=True), "TT607") == []


def test_one_class_in_all_batches_is_told_after_twenty():
    (found,) = find_live(epoch(lambda y: (y * 0 + int((y == 2).nonzero()[0])).long()), "TT607")
    assert (found.severity, found.step) == ("note", 19)
    assert "class 2" in found.message
    assert "a contrastive loss" in found.explanation
    assert "shuffle" not in found.fix


def test_loader_of_the_validation_says_nothing_of_labels_that_are_shuffled():
    def program():
        zeros = torch.zeros(160, dtype=torch.long)
        training = DataLoader(TensorDataset(torch.randn(160, 6), zeros), 8, shuffle=True)
        validation = DataLoader(TensorDataset(torch.randn(32, 6)), 8)
        model = nn.Linear(6, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            for x, y in training:
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                sgd.step()
            with torch.no_grad():
                for (x,) in validation:
                    model(x)

    (found,) = find_live(program, "TT607")
    assert "does not shuffle" not in found.message


def test_labels_of_a_discriminator_are_no_data():
    def program():
        judge = convnet()
        adam = torch.optim.Adam(judge.parameters(), lr=1e-3)
        ones = torch.ones(8, 1)
        for _ in range(22):
            score = judge(images(8)[0])[:, :1]
            adam.zero_grad()
            real = F.binary_cross_entropy_with_logits(score, ones)
            (real + F.binary_cross_entropy_with_logits(-score, torch.zeros(8, 1))).backward()
            adam.step()

    assert find_live(program, "TT607") == []


def test_rows_chosen_from_a_resident_data_set_are_data():
    def program():
        x, y = points(256)
        order = y.argsort()
        x, y = x[order], y[order]
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for i in range(24):
            rows = torch.arange(8) + 8 * (i % 2) * 31
            adam.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            adam.step()

    (found,) = find_live(program, "TT607")
    assert "[0.0, 1.0]" in found.message


def steps(labels, *, count=8, shape=(8, 4), name="cross_entropy", dtype="int64", **changes):
    yield module("loss", cls="CrossEntropyLoss")
    for i, (low, high) in enumerate(labels):
        tensors = [
            ok(1, *shape, requires_grad=True),
            ok(2, count, dtype=dtype, min=float(low), max=float(high), **changes),
        ]
        yield op(1, name, [1, 2], [3], [*tensors, ok(3, numel=1)], step=i)
        yield closing(i)


def sort(found):
    return [(f.step, f.severity) for f in found]


def test_six_batches_of_one_class_each_are_the_limit():
    one = [(0, 0)] * 3 + [(1, 1)] * 3
    assert sort(find(steps(one), "TT607")) == [(5, "warning")]
    assert find(steps(one[:5]), "TT607") == []
    assert find(steps(one, count=7), "TT607") == []
    assert len(find(steps(one[:4]), "TT607", sustain=4)) == 1


def test_batches_in_which_a_class_ends_are_half_as_many_at_most():
    sorted_by_class = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2)]
    assert sort(find(steps(sorted_by_class), "TT607")) == [(7, "warning")]
    assert find(steps([(0, 0), (0, 1), (1, 1), (1, 2)] * 5), "TT607") == []


def test_classes_that_do_not_fill_their_batches_are_told():
    exactly = torch.arange(4).repeat_interleave(45)  # five batches of eight and five samples
    fault = epoch(lambda y: y[:180].copy_(exactly).argsort())
    (found,) = find_live(fault, "TT607")
    assert (found.severity, found.op) == ("warning", "cross_entropy")


def test_rare_class_that_is_absent_for_long_is_a_note():
    none = [(0, 0)] * 20
    assert sort(find(steps(none), "TT607")) == [(19, "note")]
    name = "binary_cross_entropy_with_logits"
    assert sort(find(steps(none, shape=(8,), name=name), "TT607")) == [(19, "note")]
    assert find(steps(none[:19]), "TT607") == []
    assert find(steps([*none[:18], (0, 1), *none[:18]], shape=(8, 2)), "TT607") == []


def test_soft_labels_and_labels_of_earlier_steps_are_silent():
    one = [(0, 0)] * 3 + [(1, 1)] * 3
    assert find(steps(one, dtype="float32"), "TT607") == []
    assert find(steps(one, from_step=0), "TT607") == []


def test_loss_module_counts_too_and_empty_runs_are_silent():
    one = [(0, 0)] * 3 + [(1, 1)] * 3
    records = list(steps(one))
    calls = [
        call(1, "loss", [1, 2], [3], r.tensors, step=r.step) if hasattr(r, "op") else r
        for r in records
    ]
    assert len(find(calls, "TT607")) == 1
    assert find([], "TT607") == []
    assert find([closing()], "TT607") == []
