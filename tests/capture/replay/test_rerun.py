"""What the hooks report to during a replay: it answers all that they ask of a recorder."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.capture import autograd_functions, gradients, modules
from tensortrace.capture.active import slot
from tensortrace.capture.ops import backward, calls, function_mode
from tensortrace.capture.replay.rerun import ReplayRecorder
from tests.capture import Recorded

# Those that are at work in a replay; not `ops.passed`, since it passes no op over.
HOOKS = [modules, gradients, autograd_functions, function_mode, calls, backward]


def asked_of(name: str, code: Any) -> set[str]:
    """Which attributes of a variable code reads."""
    return {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code))))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name) and node.value.id == name
    }  # fmt: skip


def known_to_a_replay() -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(ReplayRecorder.__init__)))
    stored = {n.attr for n in ast.walk(tree)
              if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}  # fmt: skip
    return stored | set(dir(ReplayRecorder))


@pytest.mark.parametrize("hooks", HOOKS, ids=lambda hooks: hooks.__name__.rpartition(".")[2])
def test_a_replay_has_all_that_hooks_ask_of_a_recorder(hooks: ModuleType) -> None:
    # Only roots are told of `seq`, of which a replay has none.
    todo = asked_of("recorder", hooks) - {"seq"}
    assert len(todo) > 3
    known, met = known_to_a_replay(), set[str]()
    while todo:
        name = todo.pop()
        assert name in known
        met.add(name)
        found = inspect.getattr_static(ReplayRecorder, name, None)
        method = found.fget if isinstance(found, property) else found
        if inspect.isfunction(method):  # what it inherits asks on
            todo |= asked_of("self", method) - met


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
