from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace import trace
from tensortrace.checks import select
from tensortrace.engine import Engine
from tensortrace.records import Action, Finding, Step
from tests.capture import Recorded
from tests.checks import brief, call, closing, find, loss, ok, optimizer
from tests.checks.traced import find_live
from tests.healthy.adversarial import alternating_gan
from tests.neutral import one_thread

WORDS = 20


class Words(nn.Module):
    """A language model that hands its state back."""

    def __init__(self, cell=nn.LSTM):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.rnn = cell(8, 16, batch_first=True)
        self.head = nn.Linear(16, WORDS)

    def forward(self, tokens, state=None):
        hidden, state = self.rnn(self.embed(tokens), state)
        return self.head(hidden), state


class Remembering(Words):
    """The same, but the state is an attribute."""

    state = None

    def forward(self, tokens, state=None):
        logits, self.state = super().forward(tokens, self.state)
        return logits, self.state


def batches(count):
    text = torch.randint(WORDS, (4, 6 * count + 1))
    for i in range(0, 6 * count, 6):
        yield text[:, i : i + 6], text[:, i + 1 : i + 7]


def detached(state):
    return state.detach() if isinstance(state, torch.Tensor) else tuple(h.detach() for h in state)


def language_model(*, model=Words, fix=lambda state: state, retain=False, count=5, reaches=True):
    def run():
        network = model()
        sgd = torch.optim.SGD(network.parameters(), lr=0.1)
        state = None
        for x, y in batches(count):
            logits, state = network(x, state)
            state = fix(state)
            if not reaches:
                logits, _ = network(x, None)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            sgd.zero_grad()
            loss.backward(retain_graph=retain)
            sgd.step()

    return run


def find_stopped(program, *codes):
    """The exception leaves the traced block; a saved log says the same."""
    records = Recorded()
    with (
        one_thread(),
        pytest.raises(RuntimeError),
        trace(out=records.append, checks=list(codes) or None),
    ):
        torch.manual_seed(0)
        program()
    engine = Engine(select(codes or None))
    again = [finding for record in records for finding in engine.feed(record)]
    assert again == records.of(Finding)
    return records


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("model", [Words, Remembering, lambda: Words(nn.GRU)])
def test_a_state_with_its_graph_is_an_error_where_backward_raises(model, retain):
    records = find_stopped(language_model(model=model, retain=retain), "TT705")
    (found,) = records.of(Finding)
    assert (found.severity, found.step) == ("error", 1)
    assert found.evidence["from_step"] == 0
    assert "from step 0 with its graph (StackBackward0)" in found.message


@pytest.mark.parametrize("retain", [False, True])
def test_the_exception_is_explained_once_and_names_the_state(retain):
    records = find_stopped(language_model(retain=retain))
    (told,) = [f for f in records.of(Finding) if f.severity == "error"]
    assert told.code == "TT801"
    assert "input[1][0] of the model" in told.message
    assert "from step 0 with its graph" in told.message
    assert records.of(Step)[-1].repeats[told.id] >= 1


def test_a_state_that_the_loss_does_not_reach_is_a_warning_after_three_steps():
    (found,) = find_live(language_model(reaches=False), "TT705")
    assert (found.severity, found.step, found.value, found.limit) == ("warning", 3, 3, 3)
    assert found.module == ""


@pytest.mark.parametrize("model", [Words, lambda: Words(nn.GRU)])
@pytest.mark.parametrize("reaches", [True, False])
def test_a_detached_state_is_silent(model, reaches):
    run = language_model(model=model, fix=detached, reaches=reaches)
    assert find_live(run, "TT705") == []


def test_a_loader_makes_no_difference():
    data = torch.utils.data.DataLoader(torch.randint(WORDS, (20, 7)), batch_size=4)

    def run(fix):
        network = Words()
        adam = torch.optim.Adam(network.parameters())
        state = None
        for tokens in data:
            logits, state = network(tokens[:, :-1], state)
            adam.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            adam.step()
            state = fix(state)

    assert find_live(lambda: run(detached), "TT705") == []
    (found,) = find_stopped(lambda: run(lambda state: state), "TT705").of(Finding)
    assert found.severity == "error"


def test_truncated_backpropagation_over_several_batches_is_silent():
    """Three batches of a loader to one backward, then the state is cut."""
    data = torch.utils.data.DataLoader(torch.randint(WORDS, (48, 7)), batch_size=4)

    def run():
        network = Words()
        adam = torch.optim.Adam(network.parameters())
        state, total = None, 0.0
        for i, tokens in enumerate(data):
            logits, state = network(tokens[:, :-1], state)
            total = total + F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            if i % 3 == 2:
                adam.zero_grad()
                total.backward()
                adam.step()
                state, total = detached(state), 0.0

    assert find_live(run, "TT705") == []


def test_images_that_the_next_step_uses_are_silent():
    assert find_live(lambda: alternating_gan(12), "TT705") == []


def test_features_that_are_kept_with_their_graph_on_purpose_are_silent():
    def run():
        encoder, heads = nn.Linear(4, 8), [nn.Linear(8, 1) for _ in range(6)]
        parameters = [p for head in heads for p in head.parameters()]
        sgd = torch.optim.SGD(parameters, lr=0.1)
        features = encoder(torch.randn(16, 4))
        for head in [*heads, *heads]:
            loss = head(features).square().mean()
            loss.backward(retain_graph=True)
            sgd.step()
            sgd.zero_grad()

    assert find_live(run, "TT705") == []


def test_a_learnt_optimizer_that_unrolls_its_steps_is_silent():
    """The state keeps its graph over five inner steps, each with a backward, by design."""

    def run():
        learner = nn.LSTMCell(1, 4)
        read = nn.Linear(4, 1)
        meta = torch.optim.Adam([*learner.parameters(), *read.parameters()], lr=1e-2)
        for _ in range(3):
            weight, total, state = torch.randn(6, 1, requires_grad=True), 0.0, None
            for _ in range(5):
                loss = (weight - 1).square().sum()
                loss.backward(retain_graph=True, inputs=[weight])
                state = learner(weight.grad.detach(), state)
                weight = (weight - 0.1 * read(state[0])).detach().requires_grad_()
                total = total + (read(state[0]) - 1).square().mean()
            meta.zero_grad()
            total.backward()
            meta.step()

    assert find_live(run, "TT705") == []


def test_a_second_backward_in_one_step_is_not_a_carried_state():
    def run():
        generator, judge = nn.Linear(4, 4), nn.Linear(4, 1)
        sgd = torch.optim.SGD(judge.parameters(), lr=0.1)
        for _ in range(2):
            fake = generator(torch.randn(8, 4))
            judge(fake.detach()).mean().backward()
            sgd.step()
            loss = judge(fake).square().mean()
            loss.backward()
            loss.backward()

    assert find_stopped(run, "TT705").of(Finding) == []


def test_a_generated_image_is_not_blamed_for_a_change_in_place():
    """It is used with its graph in the next step, as it should be; the fault is elsewhere."""

    def run():
        generator, judge = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        sgd = torch.optim.SGD(judge.parameters(), lr=0.1)
        fake = generator(torch.randn(8, 4))
        judge(fake.detach()).mean().backward()
        sgd.step()
        told = judge(fake)
        told += 1
        told.mean().backward()

    assert find_stopped(run, "TT705").of(Finding) == []


def carried(count, *, trains=True, full=True, **changes):
    """A recurrent module: tensor 1 comes in, made by the step before as 2."""
    for i in range(count):
        likeness = {"requires_grad": True, "grad_fn": "TanhBackward0", **changes}
        old = ok(1, 4, norm=float(i), **{"from_step": i - 1 if i else None, **likeness})
        new = ok(2, 4, norm=float(i + 1), **likeness)
        if trains:
            yield loss(5, 1.0, step=i)
            yield optimizer(6, step=i)
        yield call(1, "cell", [1], [2], [old, new], step=i)
        yield closing(i, full=full)


def test_three_steps_are_the_edge_and_a_setting():
    assert find(carried(3), "TT705") == []
    assert brief(find(carried(4), "TT705")) == [("TT705", "warning", "cell")]
    assert len(find(carried(3), "TT705", sustain=2)) == 1


def test_what_carries_no_graph_or_does_not_go_on_is_silent():
    assert find(carried(9, requires_grad=False), "TT705") == []
    assert find(carried(9, is_leaf=True), "TT705") == []
    assert find(carried(9, grad_fn=None), "TT705") == []
    assert find(carried(9, from_step=None), "TT705") == []
    assert find(carried(9, trains=False), "TT705") == []
    assert find(carried(9, full=False), "TT705") == []


def test_another_exception_is_silent():
    def raised(message):
        detail = {"type": "RuntimeError", "message": message}
        return [*carried(2), loss(1, 1.0, step=2),
                call(2, "cell", [1], [2], [ok(1, 4, requires_grad=True, grad_fn="TanhBackward0",
                                              norm=2.0, from_step=1)], step=2),
                Action(step=2, seq=3, action="exception", detail=detail), closing(2)]  # fmt: skip

    assert find(raised("mat1 and mat2 shapes cannot be multiplied"), "TT705") == []
    again = raised("Trying to backward through the graph a second time")
    assert [f.severity for f in find(again, "TT705")] == ["error"]
    assert find([again[-2], again[-1]], "TT705") == []


def test_nothing_says_nothing():
    assert find([], "TT705") == []
    assert find([optimizer(), loss(0, 1.0), closing()], "TT705") == []
