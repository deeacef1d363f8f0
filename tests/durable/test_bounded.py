"""Nothing that the tracer holds grows with the number of steps."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.capture.loop import optimizers
from tensortrace.log import decode
from tensortrace.records import End, Finding, Optimizer, Step
from tests.capture.lifecycle import Poison, of, process_state, read
from tests.durable import X, make_model, measure, turn

Turn = Callable[[nn.Module, torch.optim.Optimizer], None]
WARM = 100


def fresh_module(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A module of its own in every step, with parameters that get gradients."""
    extra = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    extra(X).square().mean().backward()
    turn(model, optimizer)


def fresh_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    turn(model, torch.optim.SGD(model.parameters(), lr=1e-3))


def fresh_both(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    extra = nn.Linear(8, 4)
    extra(X).square().mean().backward()
    torch.optim.Adam(extra.parameters()).step()
    turn(model, optimizer)


def fresh_thread(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    thread = threading.Thread(target=model, args=(X,))
    thread.start()
    thread.join()
    turn(model, optimizer)


def fresh_code(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A function compiled anew in every step, as a notebook cell is that runs again."""
    names: dict[str, Any] = {"model": model, "X": X}
    exec(compile("def run():\n    return model(X).mean()\n", "<stdin>", "exec"), names)
    names["run"]().backward()
    optimizer.step()


def non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    (model(X) * float("nan")).mean().backward()


def without_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model(X).mean()


def raising(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    turn(model, optimizer)


def keeping_graph(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = model(X).mean()
    (grad,) = torch.autograd.grad(loss, [next(model.parameters())], create_graph=True)
    grad.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


TURNS: list[Turn] = [
    turn, fresh_module, fresh_optimizer, fresh_both, fresh_thread, fresh_code, non_finite,
    without_grad, raising, keeping_graph,
]  # fmt: skip


@pytest.fixture
def traced_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def repeat(one: Turn, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(steps):
        one(model, optimizer)


def grown(one: Turn, steps: int, folder: Path, **options: Any) -> int:
    """Small objects that so many steps leave behind, after a hundred to warm up.

    Counted in blocks of the interpreter's allocator, since tracemalloc takes ten times as long.
    A leak grows in every window; a cache of torch or of the interpreter that fills up, or a
    table that doubles, does so in some (up to a thousand blocks, seen in a full run of the
    tests). So it is the least of three windows, the first that shows no leak ending it.
    """
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    least = sys.maxsize
    with trace(folder / "log.jsonl", **options):
        repeat(one, WARM, model, optimizer)
        for _ in range(3):
            gc.collect()
            before = sys.getallocatedblocks()
            repeat(one, steps, model, optimizer)
            gc.collect()
            least = min(least, sys.getallocatedblocks() - before)
            if least < steps // 2:
                break
    return least


def leaking(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One block a step: the least leak there is."""
    LEAKED.append(object())
    turn(model, optimizer)


LEAKED: list[object] = []


def test_the_least_leak_is_seen(tmp_path: Path) -> None:
    # What tests before it left behind may be freed meanwhile: `grown` takes the least of three.
    assert any(grown(leaking, 600, tmp_path) >= 300 for _ in range(3))


@pytest.mark.parametrize("one", TURNS, ids=lambda one: one.__name__)
def test_no_object_is_left_behind_by_a_step(one: Turn, tmp_path: Path) -> None:
    assert grown(one, 600, tmp_path) < 300


@pytest.mark.parametrize("options", [{"level": "op"}, {"every": 1}, {"narrow": False}], ids=str)
def test_no_object_is_left_behind_whatever_is_written(
    options: dict[str, Any], tmp_path: Path
) -> None:
    assert grown(turn, 600, tmp_path, **options) < 300


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("one", [turn, fresh_both, non_finite], ids=lambda one: one.__name__)
def test_ten_thousand_steps_take_no_more_memory_than_a_hundred(one: Turn, tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with trace(tmp_path / "log.jsonl"):
        repeat(one, WARM, model, optimizer)
        gc.collect()
        before = resident()
        repeat(one, 10_000 - 1000 - WARM, model, optimizer)
        gc.collect()
        after = resident()
        tracemalloc.start()
        repeat(one, WARM, model, optimizer)
        left = measure(lambda: repeat(one, 900, model, optimizer))
        tracemalloc.stop()
    assert left < 900 * 40  # one small object a step would be more
    print(f"{one.__name__}: resident {before >> 10} KiB at step 100, {after >> 10} at 9,000")
    # This sees what Python's allocator does not: 240 bytes a step. Measured: 60 to 250 KiB in all.
    assert after - before < 2 << 20


def test_an_optimizer_made_anew_has_the_number_of_the_one_before_it() -> None:
    records: list[Any] = []
    model = make_model()
    with trace(out=records.append):
        for _ in range(5):
            turn(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert [o.index for o in of(Optimizer, records)] == [0] * 5


def test_optimizers_that_live_side_by_side_keep_their_numbers() -> None:
    records: list[Any] = []
    model = make_model()
    both = [torch.optim.SGD(model.parameters(), lr=1e-3) for _ in range(2)]
    with trace(out=records.append):
        for _ in range(3):
            for optimizer in both:
                turn(model, optimizer)
    assert [o.index for o in of(Optimizer, records)] == [0, 1] * 3


def test_an_optimizer_of_other_parameters_gets_a_number_of_its_own() -> None:
    records: list[Any] = []
    with trace(out=records.append):
        for features in (8, 4):
            model = nn.Linear(features, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            model(torch.ones(2, features)).sum().backward()
            optimizer.step()
            del optimizer
            gc.collect()
    assert [o.index for o in of(Optimizer, records)] == [0, 1]


def trained_anew(steps: int, times: int) -> list[int]:
    """The numbers of optimizers that train a model each, one after the other has died."""
    records: list[Any] = []
    with trace(out=records.append, every=1):
        for _ in range(times):
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            repeat(turn, steps, model, optimizer)
            del model, optimizer
            gc.collect()
    return [o.index for o in of(Optimizer, records)]


def test_an_optimizer_of_a_new_model_gets_a_number_of_its_own() -> None:
    assert trained_anew(25, 3) == [0] * 25 + [1] * 25 + [2] * 25


def test_an_optimizer_of_a_new_tensor_at_the_same_address_gets_a_number_of_its_own() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=1):
        for _ in range(2):
            x = torch.zeros(3, requires_grad=True)
            optimizer = torch.optim.SGD([x], lr=1e-3)
            for _ in range(25):
                x.sum().backward()
                optimizer.step()
            del x, optimizer
            gc.collect()
    assert [o.index for o in of(Optimizer, records)] == [0] * 25 + [1] * 25


def test_a_second_optimizer_of_the_same_model_keeps_the_number() -> None:
    records: list[Any] = []
    model = make_model()
    with trace(out=records.append, every=1):
        for _ in range(3):
            repeat(turn, 25, model, torch.optim.SGD(model.parameters(), lr=1e-3))
            gc.collect()
    assert {o.index for o in of(Optimizer, records)} == {0}


def test_optimizers_of_thousands_of_short_trainings_share_a_number() -> None:
    assert trained_anew(2, 5) == [0] * 10


def test_there_are_only_so_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_MOST_MET", 2)
    assert trained_anew(25, 4)[::25] == [0, 1, 0, 0]


def test_no_hook_or_mode_or_thread_is_left_behind(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    turn(model, optimizer)
    before, threads = process_state(), threading.active_count()
    for number in range(3):
        with trace(tmp_path / f"{number}.jsonl"):
            repeat(turn, 3, model, optimizer)
    assert process_state() == before
    assert threading.active_count() == threads
    assert not any(p._backward_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("max_bytes", [20_000, 100_000])
@pytest.mark.parametrize("every", [1, "auto"])
def test_the_file_never_outgrows_max_bytes(tmp_path: Path, max_bytes: int, every: Any) -> None:
    """With a new finding every few steps, and a reader that looks after each one."""
    path = tmp_path / "log.jsonl"
    sizes = []
    with trace(path, every=every, max_bytes=max_bytes, source=False) as t:
        for number in range(300):
            net = nn.Sequential(nn.Linear(8, 8), Poison([0] if number % 5 == 0 else []))
            net(X).mean().backward()
            t.step()
            sizes.append(path.stat().st_size)
    sizes.append(path.stat().st_size)
    assert max(sizes) <= max_bytes
    records = read(path)
    end = of(End, records)[0]
    assert end.steps == 300
    assert end.dropped > 0
    assert end.records == len(records) - 1  # the end line does not count itself
    assert of(Finding, records)
    assert len(of(Step, records)) <= 300


class Block(nn.Module):
    """Three modules and itself: with 500 of them a model has 2,001."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.fc(self.norm(x)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("traced_memory")
def test_a_model_of_2000_modules_is_held_in_tens_of_megabytes(tmp_path: Path) -> None:
    """README, "What it costs", has the number that this prints."""
    model = nn.Sequential(*[Block() for _ in range(500)])
    assert sum(1 for _ in model.modules()) == 2001
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    turn(model, optimizer)
    path = tmp_path / "log.jsonl"
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    with trace(path):
        repeat(turn, 24, model, optimizer)  # beyond step 20 the step before is kept too
        gc.collect()
        held, peak = (n - before for n in tracemalloc.get_traced_memory())
    print(f"2,001 modules: {held / 1e6:.1f} MB between steps, {peak / 1e6:.1f} MB at most")
    assert peak < 64e6
    assert decode(path.read_bytes().splitlines()[-1])
