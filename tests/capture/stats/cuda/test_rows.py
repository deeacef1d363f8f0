"""How rows of CUDA tensors are kept, put together and fetched, on a device that is none."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensortrace import trace
from tensortrace.capture import compiled, tracer
from tensortrace.capture.stats import kernels
from tensortrace.capture.stats import queue as module
from tensortrace.capture.stats.cuda import rows as cuda_rows
from tensortrace.capture.stats.cuda.launch import divide
from tensortrace.capture.stats.queue import Stats, StatsQueue, stats_of
from tensortrace.records import Call, Finding, Optimizer
from tests.capture import Recorded
from tests.capture.stats.devices import Counted, OnHost, queue_on_host
from tests.capture.stats.test_queue import (
    LAYOUTS,
    VALUES,
    assert_same,
    oracle,
    random,
    views_with_one_bad,
)
from tests.neutral import one_thread


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is in host memory."""
    monkeypatch.setattr(compiled, "kernel", None)
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(module, "_HOST", frozenset())


@pytest.fixture
def driver() -> OnHost:
    return OnHost()


@pytest.fixture
def launcher() -> Counted:
    return Counted()


@pytest.fixture
def queue(driver: OnHost, launcher: Counted) -> StatsQueue:
    return queue_on_host(driver, launcher)


def measure(queue: StatsQueue, *tensors: torch.Tensor) -> list[Stats]:
    for tensor in tensors:
        queue.add(tensor)
    return queue.resolve()


def test_a_tensor_is_one_launch_and_a_gate_one_launch_and_one_wait(
    queue: StatsQueue, driver: OnHost, launcher: Counted
) -> None:
    tensors = [random(n) for n in (1, 100, 5000, 300_000)]
    measure(queue, random(3))  # what is done once
    launcher.launches.clear()
    driver.waits.clear()
    for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
        assert_same(got, oracle(tensor))
    assert launcher.launches == ["reduce"] * 4 + ["combine"]
    assert driver.waits == [["main"]]


def test_layouts_and_values_agree_with_the_oracle(queue: StatsQueue, launcher: Counted) -> None:
    tensors = [*VALUES.values(), *LAYOUTS.values()]
    for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
        assert_same(got, oracle(tensor.clone()))
    # Dense ones in any order of strides are read as they are; one launch does for several parts.
    assert launcher.launches.count("reduce") == len(tensors)


def test_nothing_is_waited_for_until_the_gate(queue: StatsQueue, driver: OnHost) -> None:
    queue.add_scalars([torch.tensor(2.0), torch.tensor(math.nan)])
    for _ in range(50):
        queue.add(random(70))
    assert driver.waits == []
    assert [stats.min for stats in queue.resolve()[:2]] == [2.0, None]
    assert len(driver.waits) == 1
    assert queue.resolve() == []
    assert len(driver.waits) == 1


def test_many_single_numbers_are_taken_over_together(
    queue: StatsQueue, launcher: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the host they are read at once: these are said to be elsewhere.
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    values = [1.5, math.nan, math.inf, -math.inf, 0.0, -2.0] * 7
    numbers = [torch.tensor(value) for value in values]
    for _ in range(2):
        queue.add(random(40))
        tickets = queue.add_scalars([*numbers[:-1], numbers[-1].reshape(1, 1)])
        queue.resolve()
        for ticket, number in zip(tickets, numbers, strict=True):
            assert_same(stats_of(ticket), oracle(number))
    assert launcher.launches == ["combine", *["reduce", "combine"] * 2]
    mixed = queue.add_scalars([torch.tensor(1.0), torch.tensor(2), torch.tensor([3.0])])
    queue.resolve()
    assert [stats_of(ticket).min for ticket in mixed] == [1.0, 2.0, 3.0]


def test_memory_is_bounded_and_used_again(
    queue: StatsQueue, launcher: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_rows, "_PARTS", 12)
    monkeypatch.setattr(cuda_rows, "_TENSORS", 5)
    queue.counts = True
    for _ in range(3):
        tensors = [random(n, seed=n) for n in (5, 40_000, 100, 20_000, 1, 30_001, 64, 3, 9, 5000)]
        for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
            assert_same(got, oracle(tensor))
            assert got.exponents == (tuple(range(16)) if tensor.numel() >= 64 else None)
    (lane,) = queue.devices.reducer._lanes.values()
    assert lane.parts.shape == (12, 16)
    assert len(lane.pages) == 1
    assert lane.spare is not None


def test_a_tensor_never_has_more_rows_than_there_is_room_for() -> None:
    for n in (1, 1024, 4096, 4097, 10**6, 10**9, 2**40):
        parts, tiles = divide(n)
        assert parts + 1 <= cuda_rows._PARTS // 2
        assert (parts - 1) * tiles * 1024 < n <= parts * tiles * 1024
    # Rows, and those of the page that is filled while another one travels.
    assert (cuda_rows._PARTS + 2 * cuda_rows._TENSORS) * 16 * 8 <= 16 << 20


def test_each_stream_has_its_own_memory_and_the_gate_waits_once(
    queue: StatsQueue, driver: OnHost
) -> None:
    first, second, third = random(10), random(20), random(30)
    queue.add(first)
    driver.stream = "side"
    queue.add(second)
    driver.stream = "main"
    queue.add(third)
    for got, tensor in zip(queue.resolve(), (first, second, third), strict=True):
        assert_same(got, oracle(tensor))
    assert driver.waits == [["main", "side"]]
    assert driver.held == [
        (first.data_ptr(), "main"), (second.data_ptr(), "side"), (third.data_ptr(), "main"),
    ]  # fmt: skip
    assert driver.stream == "main"


def test_a_stream_that_is_captured_at_the_gate_costs_its_own_statistics(
    queue: StatsQueue, driver: OnHost
) -> None:
    queue.add(random(10))
    driver.stream = "side"
    queue.add(random(20))
    driver.capturing = {"side"}
    driver.stream = "main"
    assert [stats.unmeasured for stats in queue.resolve()] == [None, "capturing"]
    driver.capturing = set()
    driver.stream = "side"
    assert_same(measure(queue, random(20))[0], oracle(random(20)))


def test_while_a_graph_is_captured_nobody_is_waited_for(
    queue: StatsQueue, driver: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_rows, "_PARTS", 6)
    for sizes in ((10, 20), (10, 20, 9000, 30)):  # some are put together before the gate
        tensors = [random(n) for n in sizes]
        for tensor in tensors:
            queue.add(tensor)
        driver.capturing = {"graph"}
        driver.stream = "graph"
        assert {stats.unmeasured for stats in queue.resolve()} == {"capturing"}
        assert driver.waits == []
        driver.capturing, driver.stream = set(), "main"
        for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
            assert_same(got, oracle(tensor))
        driver.waits.clear()


def test_without_memory_for_the_rows_a_tensor_has_no_statistics(
    queue: StatsQueue, driver: OnHost, launcher: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "pinned", refuse)
        assert measure(queue, random(5))[0].unmeasured == "out of memory"
    assert_same(measure(queue, random(5))[0], oracle(random(5)))
    assert launcher.trouble is None


class Broken(Counted):
    """Kernels that cannot be compiled for some dtypes."""

    def __init__(self, *dtypes: torch.dtype, error: str = "no C compiler") -> None:
        super().__init__()
        self.dtypes, self.error = dtypes, error

    def _reduce(self, tensor: torch.Tensor, *args: Any) -> None:
        if tensor.dtype in self.dtypes:
            raise RuntimeError(self.error)
        super()._reduce(tensor, *args)


def test_a_dtype_whose_kernel_cannot_be_compiled_is_left_to_torch_and_then_cast() -> None:
    launcher = Broken(torch.bfloat16)
    queue = queue_on_host(launcher=launcher)
    tensors = [random(5000), random(5000).bfloat16(), random(5000), random(5000).bfloat16()]
    for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
        assert_same(got, oracle(tensor))
    assert launcher.launches.count("reduce") == 3
    assert queue.news()[1] == "RuntimeError: no C compiler"


def test_if_the_first_kernel_fails_none_is_tried_again() -> None:
    launcher = Broken(torch.float32)
    queue = queue_on_host(launcher=launcher)
    tensors = [random(9), random(9).double()]
    for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
        assert_same(got, oracle(tensor))
    assert "reduce" not in launcher.launches


def test_a_dead_device_is_not_taken_for_a_broken_kernel() -> None:
    queue = queue_on_host(launcher=Broken(torch.float32, error="CUDA error: device-side assert"))
    assert measure(queue, random(9))[0].unmeasured == "error: RuntimeError"
    assert queue.news()[1] is None


def test_what_was_compiled_is_told_once(queue: StatsQueue) -> None:
    measure(queue, random(5), random(5), random(5).half(), random(5)[1:])
    prepared, trouble = queue.news()
    assert [dtype for dtype, _ in prepared] == ["float32", "float16", "float32"]
    assert trouble is None
    assert queue.news() == ([], None)


def test_light_statistics_are_counts_and_norm(queue: StatsQueue) -> None:
    light = queue_on_host()
    light.light = light.lean = True
    (got,) = measure(light, random(5000))
    want = oracle(random(5000))
    assert (got.nan, got.zeros, got.min, got.mean, got.std) == (0, 0, None, None, None)
    assert got.norm == pytest.approx(want.norm)


@pytest.mark.parametrize("index", range(15))
def test_first_bad_element_of_what_is_contiguous_costs_nothing(
    queue: StatsQueue, launcher: Counted, index: int
) -> None:
    tensor, expected = views_with_one_bad()[index]
    (got,) = measure(queue, tensor)
    assert got.first_bad == (expected if tensor.is_contiguous() else None)
    queue.locates = True
    assert measure(queue, tensor)[0].first_bad == expected


def test_threads_share_a_stream(queue: StatsQueue) -> None:
    tickets: list[tuple[Any, int]] = []

    def work(start: int) -> None:
        for number in range(start, start + 30):
            tickets.append((queue.add(torch.full((3,), float(number))), number))
            if number % 10 == 0:  # a gate of another thread
                queue.resolve()

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.resolve()
    assert len(tickets) == 120
    assert all(stats_of(ticket).max == number for ticket, number in tickets)


class Launches(TorchDispatchMode):
    """Counts what of torch's operators starts a kernel on a device: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("way", "dtype", "most"),
    [
        (kernels.device_row, torch.float32, 23), (kernels.device_row, torch.float64, 29),
        (kernels.lean_device_row, torch.float32, 10), (kernels.lean_device_row, torch.float64, 18),
    ],
)  # fmt: skip
def test_without_triton_a_tensor_takes_some_twenty_launches(
    way: Any, dtype: torch.dtype, most: int
) -> None:
    with Launches() as launches:
        block = torch.zeros(5000, dtype=dtype)
        way(block)
    assert launches.count - 1 <= most


def trained(monkeypatch: pytest.MonkeyPatch, make: Any) -> Recorded:
    monkeypatch.setattr(tracer, "StatsQueue", make)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 70), nn.ReLU(), nn.Linear(70, 2))
    optimizer = torch.optim.Adam(model.parameters())
    records = Recorded()
    with one_thread(), trace(out=records.append, every=1):
        for step in range(10):
            x = torch.randn(32, 4)
            loss = model(x / (0 if step == 9 else 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return records


def test_a_training_run_on_a_device_says_what_it_says_on_the_host(
    monkeypatch: pytest.MonkeyPatch, driver: OnHost
) -> None:
    on_device = trained(monkeypatch, lambda level: queue_on_host(driver))
    monkeypatch.undo()
    on_host = trained(monkeypatch, StatsQueue)
    pairs = list(zip(on_device.of(Call), on_host.of(Call), strict=True))
    assert len(pairs) > 50
    for got, want in pairs:
        for one, other in zip(got.tensors, want.tensors, strict=True):
            assert (one.nan, one.posinf, one.neginf, one.zeros) == (
                other.nan, other.posinf, other.neginf, other.zeros
            )  # fmt: skip
            assert (one.min, one.max) == (other.min, other.max)
            assert one.norm == pytest.approx(other.norm, rel=1e-6)
            assert (one.first_bad, one.dead) == (other.first_bad, other.dead)
    codes = [[f.code for f in records.of(Finding)] for records in (on_device, on_host)]
    assert codes[0] == codes[1]
    assert "TT101" in codes[0]
    gates = len(on_host.of(Optimizer)) + len(on_host.actions("gate")) + len(on_host.steps())
    assert len(driver.waits) <= gates + 1


def test_the_log_says_what_was_compiled_within_a_step(
    monkeypatch: pytest.MonkeyPatch, driver: OnHost
) -> None:
    records = trained(monkeypatch, lambda level: queue_on_host(driver))
    (told,) = records.actions("kernel")
    assert told.detail["dtype"] == "float32"
    assert told.detail["host_ns"] > 0


def test_a_run_is_told_once_that_triton_failed(
    monkeypatch: pytest.MonkeyPatch, driver: OnHost, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken(torch.float32, torch.int64)
    records = trained(monkeypatch, lambda level: queue_on_host(driver, broken))
    assert capsys.readouterr().err.count("Triton failed with RuntimeError: no C compiler") == 1
    assert not records.actions("tracer_error")
    assert all(t.unmeasured is None for call in records.of(Call) for t in call.tensors)
