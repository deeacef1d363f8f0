"""Replays where the call, or the thread that asks for it, is out of the ordinary."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.capture.active import slot
from tests.capture import Recorded


class Net(nn.Module):
    """Runs what it is given before it makes something that is not finite."""

    def __init__(self, last: Callable[[Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.run = lambda x: last(first(x) if first is not None else x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.linear(x))


def train(net: nn.Module, run: Callable[[Callable[[], Any]], Any]) -> Recorded:
    """Run one step: `run` has the forward and the step of the optimizer, not the backward."""
    records = Recorded()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with trace(out=records.append):
        run(lambda: net(torch.ones(8, 4)).sum()).backward()
        run(optimizer.step)
    assert records.actions("tracer_error") == []
    return records


def test_a_replay_in_a_thread_that_has_run_no_backward_finds_the_op() -> None:
    with ThreadPoolExecutor(1) as pool:
        records = train(Net(lambda x: (x * 0).sqrt()), lambda act: pool.submit(act).result())
    assert [a.detail["op"] for a in records.actions("replay")] == ["sqrt"]


def test_a_module_that_is_compiled_in_place_and_no_part_of_the_model_runs_in_a_replay() -> None:
    other = nn.Linear(4, 4)
    other.compile(backend="eager")

    def run(act: Callable[[], Any]) -> Any:
        # As a torch whose compiler leaves the hooks out has it taken in when it is met.
        slot.hooks[0].take_in(other)
        return act()

    records = train(Net(lambda x: (x * 0).log(), other), run)
    assert [a.detail.get("op") for a in records.actions("replay")] == ["log"]
