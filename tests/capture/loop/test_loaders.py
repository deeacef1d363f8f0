"""A batch that no other follows: each turn over it is a step, as if there were no loader."""

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
from tensortrace.capture.tracer import Trace
from tensortrace.records import Step
from tests.capture import Recorded, record

TURNS = 6
Batches = DataLoader[tuple[Tensor, ...]]


def make_loader(**options: Any) -> Batches:
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


@pytest.mark.parametrize(
    "train",
    [
        fetched_at_once,
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


def asked_for(loader: Batches) -> Iterator[tuple[Tensor, ...]]:
    batches = iter(loader)
    for _ in range(len(loader)):
        yield next(batches)


def made_anew(loader: Batches) -> Iterator[tuple[Tensor, ...]]:
    for _ in range(len(loader)):
        yield next(iter(loader))


@pytest.mark.parametrize("ways", [iter, asked_for, made_anew])
def test_a_turn_of_two_models_stays_whole_while_batches_come(
    ways: Callable[[Batches], Iterator[tuple[Tensor, ...]]],
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

    def ahead(loader: Batches) -> Iterator[tuple[Tensor, ...]]:
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


class Kept:
    """Stands for an iteration of a loader."""

    def __init__(self, loaders: Loaders) -> None:
        self._loaders = loaders

    def __iter__(self) -> Kept:
        return self

    def __next__(self) -> int:
        self._loaders.fetched(self, sys._getframe(1))
        return 0


LONG = "def run(batches):\n    for _ in batches:\n        if done(): return\n" + "".join(
    f"        a{i} = b{i} = {i}\n" for i in range(200)
)


def test_the_head_of_a_long_loop_is_known() -> None:
    loaders = Loaders()
    loaders.stepped(0)
    batches, left = Kept(loaders), iter([False, True])
    space: dict[str, Any] = {"done": lambda: next(left)}
    exec(LONG, space)
    space["run"](batches)
    assert not loaders.steps_again(0)
    del batches
    gc.collect()
    assert loaders.steps_again(0)


def test_no_iteration_is_kept_alive() -> None:
    loaders = Loaders()
    for _ in range(100):
        next(Kept(loaders))
    loaders.stepped(0)
    assert loaders.steps_again(0)
    assert not loaders._open
