"""Loops without grad inside a turn of the training, which are of that, and those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.capture import Net, record
from tests.capture.loop.test_steps import root_calls, sgd, train


def fixed_point(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(5):
            z = 0.1 * model(z)
    return z


def settled(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
    turns = 0
    with torch.no_grad():
        while turns < 5:
            z, turns = 0.1 * model(z), turns + 1
    return z


def turn_round(solve: Callable[..., torch.Tensor], cell: nn.Module, optimizer: Any) -> None:
    z = solve(cell, torch.rand(2, 4))
    if not z.isfinite().all():
        raise ValueError
    train(cell, optimizer, z)


@pytest.mark.parametrize("solve", [fixed_point, settled])
@pytest.mark.parametrize("way", ["inline", "function", "method"])
def test_a_fixed_point_is_looked_for_inside_the_turn(way: str, solve: Any) -> None:
    cell = nn.Linear(4, 4)
    optimizer = sgd(cell, lr=0.01)

    class Trainer:
        def step(self) -> None:
            turn_round(solve, cell, optimizer)

    def program(t: Any) -> None:
        trainer = Trainer()
        for _ in range(4):
            if way == "function":
                turn_round(solve, cell, optimizer)
            elif way == "method":
                trainer.step()
            else:
                z = torch.rand(2, 4)
                with torch.no_grad():
                    for _ in range(5):
                        z = 0.1 * cell(z)
                train(cell, optimizer, z)

    calls = [call.step for call in record(program).modules(module="")]
    # Before its first backward nobody knows that the loop trains.
    assert calls == [0, 1, 2, 3, 4, 5, *[6] * 6, *[7] * 6, *[8] * 6]


def test_a_game_is_of_the_turn_that_learns_from_it() -> None:
    policy = Net()
    optimizer = sgd(policy)

    def program(t: Any) -> None:
        for _ in range(4):
            states = []
            for _ in range(3):
                states.append(torch.rand(1, 4))
                with torch.no_grad():
                    policy(states[-1])
            train(policy, optimizer, torch.cat(states))

    steps = [step for step, _ in root_calls(record(program))]
    assert steps == [0, 1, 2, 3, *[4] * 4, *[5] * 4, *[6] * 4]


def test_what_plays_on_and_learns_now_and_then_has_a_step_for_each_turn() -> None:
    policy = Net()
    optimizer = sgd(policy)

    def program(t: Any) -> None:
        for turn in range(12):
            with torch.no_grad():
                policy(torch.rand(1, 4))
            if turn % 4 == 3:
                train(policy, optimizer, torch.rand(2, 4))

    assert Counter(step for step, _ in root_calls(record(program))) == {
        step: 1 + (step % 4 == 3) for step in range(12)
    }


def test_a_turn_that_may_be_left_before_its_backward_is_not_relied_on() -> None:
    policy = Net()
    optimizer = sgd(policy)

    def program(t: Any) -> None:
        for turn in range(6):
            for _ in range(3):
                with torch.no_grad():
                    policy(torch.rand(1, 4))
            if turn % 3:
                continue
            train(policy, optimizer, torch.rand(2, 4))

    steps = [step for step, _ in root_calls(record(program))]
    assert steps == list(range(20))


def test_a_turn_that_an_exception_ends_before_its_backward_is_a_step() -> None:
    policy = Net()
    optimizer = sgd(policy)

    def play() -> None:
        with torch.no_grad():
            policy(torch.rand(1, 4))

    def program(t: Any) -> None:
        for turn in range(6):
            try:
                play()
                if turn % 2:
                    raise KeyError
                train(policy, optimizer, torch.rand(2, 4))
            except KeyError:
                pass

    steps = [step for step, _ in root_calls(record(program))]
    assert steps == [0, 0, 1, 2, 2, 3, 4, 4, 5]


def test_a_game_that_several_batches_learn_from_has_a_step_for_each_move() -> None:
    policy = Net()
    optimizer = sgd(policy)

    def program(t: Any) -> None:
        for _ in range(3):
            for _ in range(4):
                with torch.no_grad():
                    policy(torch.rand(1, 4))
            for _ in range(2):
                train(policy, optimizer, torch.rand(2, 4))

    steps = [step for step, _ in root_calls(record(program))]
    assert steps == list(range(18))


def test_an_evaluation_before_the_training_of_its_turn_has_a_step_for_each_batch() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(3):
            model.eval()
            with torch.no_grad():
                for _ in range(3):
                    model(torch.rand(2, 4))
            model.train()
            train(model, optimizer, torch.rand(2, 4))

    steps = [step for step, _ in root_calls(record(program))]
    assert steps == list(range(12))


def test_a_teacher_that_is_asked_in_a_loop_before_the_backward_is_of_the_turn() -> None:
    student, teacher = Net(), Net().eval()
    optimizer = sgd(student)

    def program(t: Any) -> None:
        for _ in range(3):
            views = [torch.rand(2, 4) for _ in range(3)]
            out = student(torch.cat(views))
            with torch.no_grad():
                targets = []
                for view in views:
                    targets.append(teacher(view))
            optimizer.zero_grad()
            (out - torch.cat(targets)).square().mean().backward()
            optimizer.step()

    calls = record(program).modules()
    roots = Counter(call.step for call in calls if call.parent is None)
    assert list(roots.values())[-2:] == [4, 4]
    assert sum(roots.values()) == 12


def observe(world: nn.Module, x: torch.Tensor) -> torch.Tensor:
    total = x
    for _ in range(3):
        total = world(total)
    return total


def imagine(actor: nn.Module, world: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = world(actor(x))
    return x


@pytest.mark.parametrize("way", ["inline", "functions", "of a method"])
def test_a_rollout_through_what_the_turn_has_trained_is_of_the_turn(way: str) -> None:
    world, actor = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizers = sgd(world, lr=0.01), sgd(actor, lr=0.01)

    def update(i: int, loss: torch.Tensor) -> None:
        optimizers[i].zero_grad()
        loss.backward()
        optimizers[i].step()

    def turn() -> None:
        update(0, observe(world, torch.rand(2, 4)).sum())
        update(1, imagine(actor, world, torch.rand(2, 4)).sum())

    def program(t: Any) -> None:
        for _ in range(4):
            if way == "of a method":
                turn()
            elif way == "functions":
                update(0, observe(world, torch.rand(2, 4)).sum())
                update(1, imagine(actor, world, torch.rand(2, 4)).sum())
            else:
                x = torch.rand(2, 4)
                for _ in range(3):
                    x = world(x)
                update(0, x.sum())
                x = torch.rand(2, 4)
                for _ in range(3):
                    x = world(actor(x))
                update(1, x.sum())

    calls = Counter(call.step for call in record(program).modules() if call.parent is None)
    # In the first turn nobody knows that another backward follows.
    assert list(calls.values())[-3:] == [9, 9, 9]
    assert len(calls) <= 6


def test_two_backwards_of_one_function_are_of_its_turn_and_of_no_other() -> None:
    world = nn.Linear(4, 4)
    optimizer = sgd(world, lr=0.01)

    def program(t: Any) -> None:
        for _ in range(5):
            made = observe(world, torch.rand(2, 4))
            kept = made.detach().requires_grad_()
            optimizer.zero_grad()
            made.sum().backward()
            optimizer.step()
            kept.sum().backward()

    calls = record(program).modules()
    assert Counter(call.step for call in calls if call.parent is None) == dict.fromkeys(range(5), 3)


def test_each_epoch_that_ends_with_another_backward_has_a_step_for_each_batch() -> None:
    model, head = Net(), nn.Linear(4, 1)
    optimizers = sgd(model), sgd(head)
    batches = [torch.rand(2, 4) for _ in range(3)]

    def program(t: Any) -> None:
        for _ in range(3):
            for x in batches:
                train(model, optimizers[0], x)
            train(head, optimizers[1], torch.rand(2, 4))

    assert len(record(program).steps()) == 12


def test_a_second_program_with_loops_of_its_own_is_not_taken_for_the_first() -> None:
    model = Net()
    optimizer = sgd(model)

    def learn() -> None:
        for _ in range(2):
            train(model, optimizer, torch.rand(2, 4))

    def judge() -> None:
        for _ in range(2):
            for _ in range(3):
                with torch.no_grad():
                    model(torch.rand(2, 4))

    def program(t: Any) -> None:
        learn()
        judge()

    assert [step for step, _ in root_calls(record(program))] == list(range(8))
