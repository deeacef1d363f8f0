"""What actions hold beside their fields is as it is described, and no check stumbles over it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrace import details, trace
from tensortrace.engine import Engine
from tensortrace.log import decode, encode
from tensortrace.records import Action, Record
from tests.durable.test_fuzzed import NASTY, leaves, put


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))


def a_loop() -> None:
    """Duplicates, kept losses, a foreign prefix, clipping, gradients that nobody clears."""
    model, other = network(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict({"module.0.weight": torch.zeros(8, 40)}, strict=False)
    data = TensorDataset(torch.randn(8, 40).repeat(4, 1), torch.arange(3).repeat(11)[:32])
    kept = []
    for _ in range(6):
        for x, y in DataLoader(data, batch_size=8):
            other(torch.ones(1, 2)).sum().backward()
            kept.append(loss := nn.functional.cross_entropy(model(x), y))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def a_scaled_loop() -> None:
    model = network().eval().train()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    x, y = torch.randn(8, 40), torch.arange(8) % 3
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


def a_replay() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x - x) + 1

    nn.Sequential(nn.Linear(3, 3), Log())(torch.ones(2, 3)).sum().backward()


def hooks_that_a_replay_leaves_out() -> None:
    """One makes NaN of an output, one of a gradient; a buffer is NaN from the start."""
    ahead, after, back = network(), network(), network()
    after[0].register_forward_hook(lambda module, args, output: output * float("nan"))
    ahead.register_forward_pre_hook(lambda module, args: (args[0] / 0,))
    back[1].register_full_backward_hook(lambda module, made, given: (made[0] * float("nan"),))
    norm = nn.BatchNorm1d(40).eval()
    norm.running_mean[0] = float("nan")
    for model in (ahead, after, back, norm):
        model(torch.ones(4, 40)).sum().backward()


def an_optimizer_that_waits() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(4, 40)).sum().backward()
        optimizer.zero_grad()


def shapes_that_do_not_fit() -> None:
    a, b = torch.ones(3, 4), torch.ones(3, 4)
    network()(a @ b)


def a_layer_that_does_not_fit() -> None:
    network()(torch.ones(3, 4))


def an_index_out_of_range() -> None:
    nn.Embedding(4, 2)(torch.tensor([1, 7]))


def a_checkpoint_that_does_not_fit() -> None:
    network().load_state_dict({"0.weight": torch.zeros(8, 41), "what": torch.zeros(1)})


def a_state_that_is_no_copy() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        state = model.state_dict()
        model(torch.ones(4, 40)).sum().backward()
        optimizer.step()
        model.load_state_dict(state)
        model.load_state_dict(model.state_dict())


def a_loop_in_two_threads() -> None:
    def job() -> None:
        model, barrier = network(), meeting
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            barrier.wait(10)
            model(torch.ones(4, 40)).sum().backward()
            optimizer.step()

    meeting = threading.Barrier(2)
    other = threading.Thread(target=job)
    other.start()
    job()
    other.join()


PROGRAMS = [
    a_loop, a_scaled_loop, a_replay, hooks_that_a_replay_leaves_out, an_optimizer_that_waits,
    a_loop_in_two_threads, shapes_that_do_not_fit, a_layer_that_does_not_fit,
    an_index_out_of_range, a_checkpoint_that_does_not_fit, a_state_that_is_no_copy,
]  # fmt: skip


def record(program: Callable[[], None]) -> list[Record]:
    records: list[Record] = []
    with contextlib.suppress(RuntimeError, IndexError), trace(out=records.append, every=1):
        program()
    return records


@pytest.mark.parametrize("program", PROGRAMS)
def test_details_are_as_they_are_described(program: Callable[[], None]) -> None:
    actions = [r for r in record(program) if isinstance(r, Action) and r.detail]
    assert actions
    for action in actions:
        read = decode(encode(action))
        assert isinstance(read, Action)
        assert read.detail == json.loads(encode(action))["detail"]
        types = details.DETAILS[action.action].__annotations__
        assert action.detail.keys() <= types.keys(), action.action


def test_the_details_of_a_replay_and_of_a_waiting_optimizer_are_all_met() -> None:
    programs = (a_replay, hooks_that_a_replay_leaves_out, an_optimizer_that_waits)
    actions = [r for program in programs for r in record(program) if isinstance(r, Action)]
    met = {(r.action, key) for r in actions for key in r.detail}
    assert {("replay", key) for key in details.Replay.__annotations__} <= met
    assert {("zero_grad", key) for key in ("still", "lr", "held")} <= met


def test_programs_of_this_file_have_all_actions_of_a_cpu() -> None:
    met = {r.action for program in PROGRAMS for r in record(program) if isinstance(r, Action)}
    rest = {"compiled", "kernel", "sync", "tracer_error"}
    assert details.DETAILS.keys() - met == rest


@pytest.mark.parametrize("name", sorted(details.DETAILS))
def test_every_described_type_can_be_told_from_others(name: str) -> None:
    for key, kind in details._TYPES[name].items():
        msgspec.json.Decoder(kind)  # raises for a type that msgspec cannot tell
        action = Action(step=0, seq=1, action=name, detail={key: object()})  # type: ignore[arg-type]
        assert key == "differs" or not details.well_typed(action).detail


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_check_stumbles_over_a_detail(program: Callable[[], None]) -> None:
    """One detail after the other, all that each of its places can become."""
    records = record(program)
    lines = [encode(r) for r in records]
    kinds = {(r.action, tuple(r.detail)): i for i, r in enumerate(records)
             if isinstance(r, Action) and r.detail}  # fmt: skip
    for at in kinds.values():
        for path in leaves(json.loads(lines[at])):
            if path[0] != "detail":
                continue
            for text in NASTY[len(path) % 3 :: 3]:
                spoilt = decode(put(lines[at], path, text))
                engine = Engine()
                for i, one in enumerate(records):
                    if i != at or isinstance(spoilt, Record):
                        engine.feed(spoilt if i == at else one)  # type: ignore[arg-type]
                assert engine.problems == [], (path, text)
