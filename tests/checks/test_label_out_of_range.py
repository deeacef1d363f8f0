from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, call, closing, find, module, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel
from tests.healthy.vision import convnet


def tagging(targets, loss=F.binary_cross_entropy_with_logits):
    def run():
        model = convnet()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            x, y = images(8)
            sgd.zero_grad()
            loss(model(x), targets(F.one_hot(y, 4).float())).backward()
            sgd.step()

    return run


LABELS = {
    "-1 and 1": (lambda y: 2 * y - 1, -1, 0),
    "1 and 2": (lambda y: y + 1, 2, 1),
    "a mask of bytes": (lambda y: 255 * y, 255, 1),
}


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("name", LABELS)
def test_binary_labels_that_are_none(name, loss):
    targets, value, limit = LABELS[name]
    (found,) = find_live(tagging(targets, loss), "TT603")
    assert (found.severity, found.value, found.limit, found.step) == ("error", value, limit, 0)
    assert "binary cross entropy wants 0 to 1" in found.message


def masked(logits, y):
    known = y >= 0
    return (F.binary_cross_entropy_with_logits(logits, y, reduction="none") * known).mean()


def weighted(logits, y):
    return F.binary_cross_entropy_with_logits(logits, y, weight=(y >= 0).float())


def test_labels_in_range_noisy_ones_and_masked_ones_are_silent():
    assert find_live(tagging(lambda y: y), "TT603") == []
    assert find_live(tagging(lambda y: 1.2 * y), "TT603") == []
    assert find_live(tagging(lambda y: 2 * y - 1, masked), "TT603") == []
    assert find_live(tagging(lambda y: 2 * y - 1, weighted), "TT603") == []


def language(make, loss=F.cross_entropy):
    """Batches that fail are skipped, as long runs on a cluster do."""

    def run():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i in range(3):
            tokens, labels = make(i, sentences(n=4))
            adam.zero_grad()
            try:
                value = loss(model(tokens).flatten(0, 1), labels.flatten())
            except IndexError:
                continue
            value.backward()
            adam.step()

    return run


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_class_that_the_network_does_not_have(loss):
    (found,) = find_live(language(lambda i, t: (t, t + i), loss), "TT603")
    assert (found.value, found.limit) == (20, 19) or (found.value, found.limit) == (21, 19)
    assert found.evidence["raised"] == "IndexError"
    assert find_live(language(lambda i, t: (t, t), loss), "TT603") == []
    ignoring = lambda i, t: (t, t.masked_fill(t == 0, -100))  # noqa: E731
    assert find_live(language(ignoring, loss), "TT603") == []


@pytest.mark.parametrize("mark", [255, -1])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_label_that_marks_what_has_none_is_one_to_ignore(loss, mark):
    (found,) = find_live(language(lambda i, t: (t, t.masked_fill(t == 0, mark)), loss), "TT603")
    assert found.value == mark
    assert f"(..., ignore_index={mark}) if it marks what to leave out" in found.fix
    ignoring = partial(F.cross_entropy, ignore_index=mark)
    assert find_live(language(lambda i, t: (t, t.masked_fill(t == 0, mark)), ignoring)) == []


def test_word_that_the_embedding_does_not_have():
    (found,) = find_live(language(lambda i, t: (t + 10 * (i == 1), t)), "TT603")
    assert (found.module, found.limit, found.step) == ("embed", 19, 1)


def test_an_exception_that_is_caught_is_told_and_one_that_leaves_is_left_to_its_own_check():
    def run():
        with pytest.raises(IndexError):
            F.cross_entropy(convnet()(images(8)[0]), torch.full((8,), 7))

    (caught,) = find_live(run, "TT603")
    assert (caught.value, caught.limit) == (7, 3)
    leaves = Action(step=0, seq=1, action="exception")
    assert len(classes(0, 10)) == 1
    assert classes(0, 10, also=[leaves]) == []


def binary(low, high, out=1):
    target = ok(2, 8, min=low, max=high)
    made = op(0, "binary_cross_entropy", [1, 2], [3], [ok(1, 8), target, ok(3, out)])
    return find([made, closing()], "TT603")


def test_half_a_label_beyond_is_the_edge():
    assert binary(-0.5, 1.5) == []
    assert [f.value for f in binary(-0.51, 1.0)] == [-0.51]
    assert [f.value for f in binary(0.0, 1.51)] == [1.51]
    assert binary(-1.0, 1.0, out=8) == []


def classes(low, high, cls=None, also=(), **changes):
    tensors = [ok(1, 8, 10), ok(2, 8, dtype="int64", min=low, max=high)]
    if cls:
        records = [module("loss", cls=cls), call(0, "loss", [1, 2], [], tensors, **changes)]
    else:
        records = [op(0, "cross_entropy", [1, 2], [], tensors, **changes)]
    return brief(find([*records, *also, closing()], "TT603"))


def test_ignored_labels_are_no_classes():
    assert classes(0, 9) == classes(-100, 9) == []
    assert classes(0, 10) == classes(-1, 9) == [("TT603", "error", "cross_entropy")]
    assert classes(0, 255, arguments={"ignore_index": 255}) == []
    assert classes(-1, 9, arguments={"ignore_index": -1}) == []
    assert classes(0, 255, "CrossEntropyLoss") == []
    assert len(classes(0, 255, "CrossEntropyLoss", exception="IndexError")) == 1


def test_nothing_says_nothing():
    assert find([], "TT603") == []
    empty = [op(0, "cross_entropy", [1, 2], []), op(1, "binary_cross_entropy", [], []), closing()]
    assert find(empty, "TT603") == []
