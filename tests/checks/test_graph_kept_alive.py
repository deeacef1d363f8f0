from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import brief, closing, find, loss, ok, op, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, loader, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def epoch(add, start, with_loader=True):
    def run():
        model = convnet(4)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        total = start()
        for x, y in loader(80) if with_loader else [images(16) for _ in range(5)]:
            loss = F.cross_entropy(model(x), y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            total = add(total, loss)

    return run


def in_place(total, loss):
    total += loss
    return total


FAULTS = {
    "sum": (lambda total, loss: total + loss, lambda: 0.0),
    "in place": (in_place, lambda: torch.zeros(())),
    "other way round": (lambda total, loss: loss + total, lambda: 0),
}


@pytest.mark.parametrize("with_loader", [True, False])
@pytest.mark.parametrize("name", FAULTS)
def test_a_running_loss_with_its_graph(name, with_loader):
    (found,) = find_live(epoch(*FAULTS[name], with_loader), "TT703")
    assert (found.severity, found.value, found.limit) == ("warning", 3, 3)
    assert found.evidence["from_step"] == found.step - 1
    assert found.location.file == __file__


@pytest.mark.parametrize(
    "add",
    [
        lambda total, loss: total + loss.item(),
        lambda total, loss: total + loss.detach(),
        lambda total, loss: 0.9 * total + 0.1 * loss.detach(),
    ],
)
def test_a_number_without_a_graph_is_silent(add):
    assert find_live(epoch(add, lambda: torch.zeros(())), "TT703") == []


def test_terms_and_micro_batches_that_are_summed_before_backward_are_silent():
    def run():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(4):
            total = 0.0
            for _ in range(2):
                total = total + next_word_loss(model, sentences(2))
            total = total + 1e-4 * sum(p.square().sum() for p in model.parameters())
            adam.zero_grad()
            total.backward()
            adam.step()

    assert find_live(run, "TT703") == []


def steps(count, *, name="add", trains=True, **changes):
    for i in range(count):
        fields = {"requires_grad": True, "grad_fn": "AddBackward0", **changes}
        old = ok(1, 1, **{"from_step": i - 1 if i else None, **fields})
        if trains:
            yield loss(0, 1.0, step=i)
            yield optimizer(step=i)
        yield op(1, name, [1, 2], [3], [old, ok(2, 1, requires_grad=True)], step=i)
        yield closing(i)


def test_three_steps_are_the_edge_and_a_setting():
    assert find(steps(2), "TT703") == []
    assert brief(find(steps(3), "TT703")) == [("TT703", "warning", "add")]
    assert len(find(steps(2), "TT703", sustain=2)) == 1


def test_what_keeps_no_graph_is_silent():
    assert find(steps(5, requires_grad=False), "TT703") == []
    assert find(steps(5, is_leaf=True), "TT703") == []
    assert find(steps(5, from_step=None), "TT703") == []
    assert find(steps(5, numel=8), "TT703") == []
    assert find(steps(5, name="mul"), "TT703") == []
    assert find(steps(5, trains=False), "TT703") == []


def test_nothing_says_nothing():
    assert find([], "TT703") == []
    assert find([optimizer(), loss(0, 1.0), closing()], "TT703") == []
