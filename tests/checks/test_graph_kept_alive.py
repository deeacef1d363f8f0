from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
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


def storing(store, count=12):
    """Train for some steps and keep something of each."""

    def run():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        stored = []
        for _ in range(count):
            tokens = sentences(2)
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            adam.zero_grad()
            loss.backward()
            adam.step()
            store(stored, loss, logits)

    return run


@pytest.mark.parametrize(
    ("store", "maker"),
    [
        (lambda stored, loss, logits: stored.append(loss), "cross_entropy"),
        (lambda stored, loss, logits: stored.append({"logits": logits}), ""),
        (lambda stored, loss, logits: stored.append(loss / 2), None),
    ],
)
@pytest.mark.parametrize("level", ["module", "op"])
def test_losses_and_outputs_in_a_list_with_their_graphs(store, maker, level):
    (found,) = find_live(storing(store), "TT703", level=level)
    assert (found.severity, found.value, found.limit) == ("warning", 8, 8)
    assert found.step == 9
    assert "are alive with their graphs" in found.message
    if maker is not None:
        assert found.location.file == __file__
        assert maker in (found.op, found.module)


@pytest.mark.parametrize(
    "store",
    [
        lambda stored, loss, logits: stored.append(loss.item()),
        lambda stored, loss, logits: stored.append((loss.detach(), logits.detach())),
        lambda stored, loss, logits: stored.append(logits.argmax(-1)),
        lambda stored, loss, logits: stored.__setitem__(slice(None), [*stored[-3:], loss]),
        lambda stored, loss, logits: stored.clear() if len(stored) > 5 else stored.append(loss),
    ],
)
def test_what_is_stored_without_a_graph_or_for_a_while_is_silent(store):
    assert find_live(storing(store, 30), "TT703") == []


def test_a_cached_embedding_is_silent():
    def run():
        encoder, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
        sgd = torch.optim.SGD(head.parameters(), lr=0.1)
        cache = [encoder(torch.randn(4)) for _ in range(16)]
        for i in range(20):
            loss = head(cache[i % 16].detach()).square().mean()
            loss.backward()
            sgd.step()
            sgd.zero_grad()

    assert find_live(run, "TT703") == []


def kept(count, by_step, full=True):
    for i in range(count):
        detail = {"value": 1.0}
        if by_step(i):
            detail["kept"] = {"tensors": by_step(i), "oldest": 0, "step": i - 2, "id": 3,
                              "shape": [], "grad_fn": "NllLossBackward0"}  # fmt: skip
        yield Action(step=i, seq=0, action="loss", detail=detail)
        yield optimizer(step=i)
        yield closing(i, full=full)


def test_without_a_full_step_before_it_no_line_is_known():
    (found,) = find(kept(9, lambda i: i and i + 1, full=False), "TT703")
    assert "one was made in step 6" in found.message
    assert found.location is None


def test_eight_steps_of_growth_are_the_edge_and_a_setting():
    assert find(kept(9, lambda i: i and i + 1), "TT703") != []
    assert find(kept(8, lambda i: i), "TT703") == []
    assert len(find(kept(8, lambda i: i), "TT703", growing=7)) == 1
    assert find(kept(40, lambda i: 10), "TT703") == []
    assert find(kept(40, lambda i: i % 8), "TT703") == []


def steps(count, *, name="add", trains=True, **changes):
    for i in range(count):
        fields = {"requires_grad": True, "grad_fn": "AddBackward0", **changes}
        old = ok(1, 1, **{"from_step": i - 1 if i else None, "min": float(i), **fields})
        new = ok(2, 1, requires_grad=True)
        made = ok(3, 1, **{**fields, "min": float(i + 1)})
        if trains:
            yield loss(0, 1.0, step=i)
            yield optimizer(step=i)
        yield op(1, name, [1, 2], [3], [old, new, made], step=i)
        yield closing(i)


def test_three_steps_are_the_edge_and_a_setting():
    assert find(steps(2), "TT703") == []
    assert brief(find(steps(3), "TT703")) == [("TT703", "warning", "add")]
    assert find(steps(3), "TT703", sustain=4) == []
    assert len(find(steps(4), "TT703", sustain=4)) == 1


def test_what_was_added_to_something_else_is_no_total():
    assert find(steps(9, min=0.5), "TT703") == []


SUMS = {
    "sum": lambda one, other: one + other,
    "other way round": lambda one, other: other + one,
    "sum of sums": lambda one, other: (one + one.square()) + (other + 1),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_sum_of_the_losses_of_two_optimizers_is_no_total(name):
    """After the step of one optimizer the next call begins a step: so does a GAN."""

    def run():
        models = [nn.Linear(4, 1), nn.Linear(4, 1)]
        adams = [torch.optim.Adam(model.parameters()) for model in models]
        sums = 0.0
        for _ in range(150):
            x = torch.randn(8, 4)
            losses = []
            for model, adam in zip(models, adams, strict=True):
                out = model(x)
                losses.append(out.square().mean() + out.abs().mean())
                adam.zero_grad()
                losses[-1].backward()
                adam.step()
            sums += SUMS[name](*losses).item()

    assert find_live(run, "TT703") == []


def micro_batches(kept, *, each):
    """Two of them to an update; what is kept of each, or the sum of both, joins a total."""

    def run():
        model = nn.Linear(8, 1)
        adam = torch.optim.Adam(model.parameters())
        total = 0.0
        for _ in range(6):
            update = 0.0
            for _ in range(2):
                loss = model(torch.randn(16, 8)).square().mean() / 2
                loss.backward()
                update = update + kept(loss)
                if each:
                    total = total + kept(loss)
            adam.step()
            adam.zero_grad()
            if not each:
                total = total + update

    return run


@pytest.mark.parametrize("each", [True, False])
def test_a_running_loss_over_micro_batches(each):
    (found,) = find_live(micro_batches(lambda loss: loss, each=each), "TT703")
    assert (found.value, found.step) == (3, 5)
    assert "total = total + " in found.location.code
    assert find_live(micro_batches(torch.Tensor.detach, each=each), "TT703") == []


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
