"""Turns of loops that an installed package goes round, or goes through for the program's own."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.capture import record

INSTALLED = """
import torch
from torch import nn


class Agent:
    def __init__(self):
        self.policy, self.target, self.critic = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.policy.parameters(), 0.1)
        self.critic_optimizer = torch.optim.SGD(self.critic.parameters(), 0.1)

    def aim(self, states):
        with torch.no_grad():
            best = self.policy(states).argmax(1)
            return self.target(states)[range(len(states)), best] + self.value(states).mean()

    def value(self, states):
        return self.policy(states).amax(1)

    def update(self, states):
        aim = self.aim(states)
        loss = (self.policy(states).amax(1) - aim).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def learn(self, turns):
        for _ in range(turns):
            states = torch.rand(2, 4)
            self.critic_optimizer.zero_grad()
            self.critic(states).mean().backward()
            self.critic_optimizer.step()
            self.optimizer.zero_grad()
            self.critic(self.policy(states)).mean().backward()
            self.optimizer.step()

    def fit(self, epochs):
        for _ in range(epochs):
            for _ in range(3):
                self.update(torch.rand(2, 4))
            with torch.no_grad():
                for _ in range(2):
                    self.policy(torch.rand(2, 4))

    def run(self, jobs):
        for job in jobs:
            job()

    def act(self, states):
        with torch.no_grad():
            return self.policy(states)
"""


@pytest.fixture
def agent(install: Callable[[str], ModuleType]) -> Any:
    return install(INSTALLED).Agent()


def updates(program: Callable[[Any], None]) -> list[int]:
    """How many optimizer steps came before the end of each step."""
    return [step.update for step in record(program).steps()]


def test_what_a_package_calls_twice_without_grad_in_one_turn_is_one_step(agent: Any) -> None:
    def program(t: Any) -> None:
        for _ in range(5):
            agent.update(torch.rand(2, 4))

    assert updates(program) == [1, 2, 3, 4, 5]


def test_several_optimizers_in_a_turn_of_a_package_are_one_step(agent: Any) -> None:
    assert updates(lambda t: agent.learn(3)) == [2, 4, 6]


def test_batches_that_a_package_trains_and_judges_on_are_steps(agent: Any) -> None:
    assert updates(lambda t: agent.fit(2)) == [1, 2, 3, 3, 3, 4, 5, 6, 6, 6]


def test_a_package_that_runs_the_program_in_a_loop_of_its_own_trains_nothing(agent: Any) -> None:
    """As what parses a command line does, or runs the cells of a notebook."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train() -> None:
        model(torch.rand(2, 4)).sum().backward()
        optimizer.step()

    def job() -> None:
        train()
        train()

    assert updates(lambda t: agent.run([job])) == [1, 2]


def test_calls_that_a_package_makes_for_turns_of_the_program_are_steps(agent: Any) -> None:
    def program(t: Any) -> None:
        for _ in range(4):
            agent.act(torch.rand(2, 4))
        for _ in range(2):
            agent.update(torch.rand(2, 4))

    assert updates(program) == [0, 0, 0, 0, 1, 2]


def test_a_turn_of_the_program_that_calls_a_package_twice_is_one_step(agent: Any) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def program(t: Any) -> None:
        for _ in range(3):
            aim = agent.act(torch.rand(2, 4))
            optimizer.zero_grad()
            (model(torch.rand(2, 4)) - aim).square().mean().backward()
            optimizer.step()
            agent.update(torch.rand(2, 4))

    assert updates(program) == [2, 4, 6]
