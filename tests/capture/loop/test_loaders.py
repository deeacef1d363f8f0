"""Batches that a loop asks for, and those that are kept: there each turn is a step of its own."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tensortrace import trace
from tensortrace.capture.loop.loaders import Loaders
from tensortrace.capture.loop.rounds import Rounds
from tensortrace.capture.tracer import Trace
from tensortrace.records import Step
from tests.capture import Recorded, record

TURNS = 6
Loader = DataLoader[tuple[Tensor, ...]]


def make_loader(**options: Any) -> Loader:
    data = TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
    return DataLoader(data, batch_size=4, **options)


class Learner:
    """A small model, and turns of its training."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 3))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def turn(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()

    def turns(self, x: Tensor, y: Tensor) -> None:
        for _ in range(TURNS):
            self.turn(x, y)


def fetched_at_once(learner: Learner) -> None:
    learner.turns(*next(iter(make_loader())))


def fetched_from_what_is_kept(learner: Learner) -> None:
    batches = iter(make_loader())
    learner.turns(*next(batches))


def left_a_loop_with(learner: Learner) -> None:
    loader = make_loader()
    for batch in loader:  # noqa: B007
        break
    learner.turns(*batch)


def kept_in_a_list(learner: Learner) -> None:
    batches = list(make_loader())
    for x, y in itertools.islice(itertools.cycle(batches), TURNS):
        learner.turn(x, y)


def cycled(learner: Learner) -> None:
    for x, y in itertools.islice(itertools.cycle(make_loader()), TURNS):
        learner.turn(x, y)


def evaluated_between(learner: Learner) -> None:
    x, y = next(iter(make_loader()))
    for _ in range(TURNS):
        with torch.no_grad():
            learner.net(x)
        learner.turn(x, y)


def behind_a_frozen_module(learner: Learner) -> None:
    frozen = nn.Linear(4, 4).requires_grad_(False)
    x, y = next(iter(make_loader()))
    for _ in range(TURNS):
        learner.turn(frozen(x), y)


def with_a_closure(learner: Learner) -> None:
    x, y = next(iter(make_loader()))
    optimizer = torch.optim.LBFGS(learner.net.parameters(), max_iter=2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(learner.net(x), y)
        loss.backward()
        return loss.item()

    for _ in range(TURNS):
        optimizer.step(closure)


def kept_with_another(learner: Learner) -> None:
    batches = iter(make_loader())
    x, y = next(batches)
    next(batches)
    learner.turns(x, y)


def an_input_that_is_learnt(learner: Learner) -> None:
    x, _ = next(iter(make_loader()))
    image = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([image, *learner.net.parameters()], lr=0.01)
    for _ in range(TURNS):
        optimizer.zero_grad()
        learner.net(image).square().mean().backward()
        optimizer.step()


def a_head_alone(learner: Learner) -> None:
    """The rest is in no optimizer, and not frozen either."""
    x, y = next(iter(make_loader()))
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net[1].parameters(), lr=0.01)
    for _ in range(TURNS):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def of_an_actor_and_its_critic(learner: Learner) -> None:
    """The critic is called again after its own update, for the actor's loss."""
    x, _ = next(iter(make_loader()))
    actor, critic = nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1))
    ours = torch.optim.SGD(actor.parameters(), lr=0.01)
    theirs = torch.optim.SGD(critic.parameters(), lr=0.01)
    for _ in range(TURNS):
        theirs.zero_grad()
        critic(x).square().mean().backward()
        theirs.step()
        chosen = actor(x)
        ours.zero_grad()
        (chosen * critic(x).detach()).mean().backward()
        ours.step()


def of_two_models(learner: Learner) -> None:
    play(itertools.repeat(next(iter(make_loader())), TURNS))


def fetched_in_each_of_two_calls(learner: Learner) -> None:
    def half() -> None:
        x, y = next(iter(loader))
        for _ in range(TURNS // 2):
            learner.turn(x, y)

    loader = make_loader()
    half()
    half()


def fetched_from_what_is_made_for_each_rate(learner: Learner) -> None:
    loader = make_loader()
    for _ in (0.1, 0.01):
        batches = iter(loader)
        x, y = next(batches)
        for _ in range(TURNS // 2):
            learner.turn(x, y)


def several_are_kept(learner: Learner) -> None:
    batches = iter(make_loader())
    kept = [next(batches) for _ in range(3)]
    for _ in range(TURNS // 3):
        for x, y in kept:
            learner.turn(x, y)


def one_of_a_generator(learner: Learner) -> None:
    def endless(loader: Loader) -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield from loader

    batches = endless(make_loader())
    learner.turns(*next(batches))


def left_a_loop_that_lives_on(learner: Learner) -> None:
    batches = iter(make_loader())
    for i, batch in enumerate(batches):  # noqa: B007
        if i == 1:
            break
    learner.turns(*batch)


def gathered_until_there_are_enough(learner: Learner) -> None:
    batches, kept = iter(make_loader()), []
    for _ in range(TURNS):
        if len(kept) < 2:
            kept.append(next(batches))
        learner.turn(*kept[-1])


def over_what_the_model_is_given_is_learnt(learner: Learner) -> None:
    x, y = next(iter(make_loader()))
    shift = nn.Parameter(torch.zeros(1, 4))
    optimizer = torch.optim.SGD([shift, *learner.net.parameters()], lr=0.01)
    for _ in range(TURNS):
        optimizer.zero_grad()
        F.cross_entropy(learner.net(x + shift), y).backward()
        optimizer.step()


def beside_one_that_nobody_trains(learner: Learner) -> None:
    x, _ = next(iter(make_loader()))
    features = nn.Linear(3, 3)
    for _ in range(TURNS):
        learner.optimizer.zero_grad()
        (features(learner.net(x)) - features(x[:, :3])).square().mean().backward()
        learner.optimizer.step()


def of_gradients_that_add_up(learner: Learner) -> None:
    for i, (x, y) in enumerate(list(make_loader()) + list(make_loader())[: TURNS - 4]):
        F.cross_entropy(learner.net(x), y).backward()
        if i % 3 == 2:
            learner.optimizer.step()
            learner.optimizer.zero_grad()


def of_a_new_model_each(learner: Learner) -> None:
    x, y = next(iter(make_loader()))
    for _ in range(TURNS):
        Learner().turn(x, y)


def of_a_prediction(learner: Learner) -> None:
    x, _ = next(iter(make_loader()))
    with torch.no_grad():
        for _ in range(TURNS):
            learner.net(x)


def of_weights_without_a_module(learner: Learner) -> None:
    x, y = next(iter(make_loader()))
    weight = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(TURNS):
        optimizer.zero_grad()
        F.cross_entropy(x @ weight, y).backward()
        optimizer.step()


def that_ends_with_an_evaluation(learner: Learner) -> None:
    x, y = next(iter(make_loader()))
    for _ in range(TURNS):
        learner.turn(x, y)
        with torch.no_grad():
            learner.net(x)


def of_an_image_and_its_judge(learner: Learner) -> None:
    """What the judge is given is made by no module that learns."""
    x, _ = next(iter(make_loader()))
    judge, image = nn.Linear(4, 1), nn.Parameter(torch.zeros(4, 4))
    theirs = torch.optim.SGD(judge.parameters(), lr=0.1)
    ours = torch.optim.SGD([image], lr=0.1)
    for _ in range(TURNS):
        theirs.zero_grad()
        (F.softplus(-judge(x)) + F.softplus(judge(image.detach().sin()))).mean().backward()
        theirs.step()
        ours.zero_grad()
        F.softplus(-judge(image.sin())).mean().backward()
        ours.step()


@pytest.mark.parametrize(
    "train",
    [
        fetched_at_once,
        fetched_in_each_of_two_calls,
        fetched_from_what_is_made_for_each_rate,
        several_are_kept,
        one_of_a_generator,
        left_a_loop_that_lives_on,
        gathered_until_there_are_enough,
        over_what_the_model_is_given_is_learnt,
        beside_one_that_nobody_trains,
        of_gradients_that_add_up,
        of_a_new_model_each,
        of_a_prediction,
        of_weights_without_a_module,
        that_ends_with_an_evaluation,
        of_an_image_and_its_judge,
        fetched_from_what_is_kept,
        left_a_loop_with,
        kept_in_a_list,
        cycled,
        evaluated_between,
        behind_a_frozen_module,
        with_a_closure,
        kept_with_another,
        an_input_that_is_learnt,
        a_head_alone,
        of_an_actor_and_its_critic,
        of_two_models,
    ],
)
def test_each_turn_over_a_batch_is_a_step(train: Callable[[Learner], None]) -> None:
    learner = Learner()
    got = record(lambda _: train(learner))
    assert len(got.of(Step)) == TURNS


def play(batches: Iterator[tuple[Tensor, ...]]) -> None:
    """Train a generator and a discriminator: two updates and three calls of one of them a turn."""
    made, judge = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 1))
    ours = torch.optim.SGD(made.parameters(), lr=0.01)
    theirs = torch.optim.SGD(judge.parameters(), lr=0.01)
    for x, *_ in batches:
        theirs.zero_grad()
        fake = made(torch.randn(4, 2))
        (F.softplus(-judge(x)) + F.softplus(judge(fake.detach()))).mean().backward()
        theirs.step()
        ours.zero_grad()
        F.softplus(-judge(fake)).mean().backward()
        ours.step()


def asked_for(loader: Loader) -> Iterator[tuple[Tensor, ...]]:
    batches = iter(loader)
    for _ in range(len(loader)):
        yield next(batches)


def made_anew(loader: Loader) -> Iterator[tuple[Tensor, ...]]:
    for _ in range(len(loader)):
        yield next(iter(loader))


class Iterated:
    """Asks in a method of its own."""

    def __init__(self, loader: Loader) -> None:
        self._batches = iter(loader)

    def __iter__(self) -> Iterated:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        return next(self._batches)


@pytest.mark.parametrize("ways", [iter, asked_for, made_anew, Iterated])
def test_a_turn_of_two_models_stays_whole_while_batches_come(
    ways: Callable[[Loader], Iterator[tuple[Tensor, ...]]],
) -> None:
    got = record(lambda _: play(ways(make_loader())))
    assert len(got.of(Step)) == 4


def test_updates_over_the_batch_of_a_loop_are_one_step() -> None:
    learner = Learner()

    def program(_: Trace) -> None:
        for x, y in make_loader():
            learner.turns(x, y)

    got = record(program)
    assert [step.update for step in got.of(Step)] == [TURNS, 2 * TURNS, 3 * TURNS, 4 * TURNS]


def test_updates_over_batches_that_are_asked_for_one_by_one_are_one_step_each() -> None:
    learner = Learner()

    def program(_: Trace) -> None:
        loader = make_loader()
        batches = iter(loader)
        for _ in range(8):
            try:
                x, y = next(batches)
            except StopIteration:
                batches = iter(loader)
                x, y = next(batches)
            for _ in range(3):
                learner.turn(x, y)

    assert [step.update for step in record(program).of(Step)] == list(range(3, 27, 3))


def test_a_loop_that_asks_for_no_more_is_no_step_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tensortrace.capture.loop.steps._MOST_UPDATES", 4)
    learner = Learner()

    def program(_: Trace) -> None:
        batches, kept = iter(make_loader()), []
        for _ in range(4):
            if len(kept) < 2:
                kept.append(next(batches))
            for _ in range(3):
                learner.turn(*kept[-1])

    updates = [step.update for step in record(program).of(Step)]
    assert updates == [3, 7, 11, 12]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(12, 4))


def test_several_updates_over_a_batch_of_a_stream_are_one_step() -> None:
    learner = Learner()

    def program(_: Trace) -> None:
        for x in DataLoader(Stream(), 4):
            learner.turns(x, torch.zeros(4, dtype=torch.long))

    assert len(record(program).of(Step)) == 3


def test_a_batch_that_was_fetched_ahead_is_one_step() -> None:
    """As accelerate does, which has to know the last one."""

    def ahead(loader: Loader) -> Iterator[tuple[Tensor, ...]]:
        batches = iter(loader)
        batch = next(batches)
        while True:
            try:
                following = next(batches)
            except StopIteration:
                yield batch
                return
            yield batch
            batch = following

    learner = Learner()

    def program(_: Trace) -> None:
        for _ in range(2):
            for x, y in ahead(make_loader()):
                learner.turns(x, y)

    assert len(record(program).of(Step)) == 8


@pytest.mark.usefixtures("closing_folder")
def test_by_hand_and_with_a_decorator_nothing_else_counts() -> None:
    learner = Learner()

    def program(t: Trace) -> None:
        t.step()
        for _ in range(2):
            learner.turns(*next(iter(make_loader())))
            t.step()

    updates = [step.update for step in record(program).of(Step)]
    assert updates[-2:] == [TURNS, 2 * TURNS]
    assert TURNS - 1 not in updates
    decorated = Recorded()
    trace(out=decorated.append)(fetched_at_once)(learner)
    assert len(decorated.of(Step)) == 1


class Batches:
    """Stands for an iteration of a loader, which is asked in the code that is here."""

    def __init__(self, loaders: Loaders) -> None:
        self._loaders = loaders
        loaders.began(self, sys._getframe())

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> int:
        self._loaders.fetched(self, sys._getframe(1))
        return 0


LONG = "def run(batches):\n    for _ in batches:\n        if asks(): return\n" + "".join(
    f"        a{i} = b{i} = {i}\n" for i in range(200)
)


def test_the_head_of_a_long_loop_is_known() -> None:
    loaders = Loaders(Rounds(lambda code: True))
    batches, seen = Batches(loaders), []

    def asks() -> bool:
        seen.append(loaders.asking(sys._getframe()))
        return True

    space: dict[str, Any] = {"asks": asks}
    exec(LONG, space)
    space["run"](batches)
    assert seen[0].always
    assert loaders.asking(sys._getframe()) is None


def test_no_iteration_is_kept_alive() -> None:
    loaders = Loaders(Rounds(lambda code: True))
    for _ in range(100):
        next(Batches(loaders))
        gc.collect(0)  # all of them would take half a second, a hundred times
        assert loaders.asking(sys._getframe()) is None
    assert not loaders._met
