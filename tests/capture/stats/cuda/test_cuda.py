"""What only a GPU can show: that nothing waits, that a captured graph stays as it is, that it fits.

Without one all this is skipped; what it rests on is held by test_rows, test_kernel and
../../test_cuda_time on the CPU.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.capture.recorder import Recorder
from tensortrace.capture.stats.cuda.rows import Reducer
from tensortrace.capture.stats.devices import Devices
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.records import Action, Call, Optimizer
from tests.capture import Recorded
from tests.capture.stats.test_queue import (
    EXTREMES,
    FLOATS,
    INTEGERS,
    LARGE,
    LAYOUTS,
    VALUES,
    assert_same,
    oracle,
    random,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture(params=["triton", "torch"])
def queue(request: pytest.FixtureRequest) -> StatsQueue:
    """A queue that measures CUDA tensors this way."""
    if request.param == "torch":
        return StatsQueue(devices=Devices(served=()))
    pytest.importorskip("triton")
    made = StatsQueue()
    assert made.devices.reducer.launcher.works()
    return made


class Net(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(64, width), nn.ReLU()
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.act(self.first(x))))


def training(model: nn.Module, *, amp: bool = False) -> Callable[[], None]:
    """One step of training on the GPU, that waits for nothing by itself."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=amp)
    generator = torch.Generator("cuda").manual_seed(0)

    def step() -> None:
        x = torch.randn(32, 64, device="cuda", generator=generator)
        with torch.autocast("cuda", torch.float16, enabled=amp):
            loss = model(x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def seeded(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**options).cuda()


def measure(queue: StatsQueue, *tensors: torch.Tensor) -> list[Any]:
    for tensor in tensors:
        queue.add(tensor)
    return queue.resolve()


def test_numbers_are_those_of_the_host(queue: StatsQueue) -> None:
    tensors = [values.to(dtype) for values in VALUES.values() for dtype in FLOATS]
    tensors += [make(100_001).to(dtype) for make in LARGE.values() for dtype in FLOATS]
    tensors += [*EXTREMES.values(), *INTEGERS, torch.randn(3, dtype=torch.complex64)]
    moved = [tensor.cuda() for tensor in tensors]
    for got, tensor in zip(measure(queue, *moved), tensors, strict=True):
        assert_same(got, oracle(tensor), bounds=1e-7)
    assert queue.devices.reducer.launcher.trouble is None


def test_strides_do_not_matter(queue: StatsQueue) -> None:
    for tensor in LAYOUTS.values():
        base = tensor if tensor._base is None else tensor._base
        if base._is_zerotensor() or tensor.is_neg():
            continue
        whole = base.cuda()
        view = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        assert_same(measure(queue, view)[0], oracle(tensor.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_elements_are_summed_exactly_enough(queue: StatsQueue, dtype: torch.dtype) -> None:
    x = torch.randn(30_000_001, device="cuda", dtype=dtype)
    (got,) = measure(queue, x)
    wide = x.double()
    assert got.mean == pytest.approx(wide.mean().item(), rel=1e-6, abs=1e-9)
    assert got.std == pytest.approx(wide.std(correction=0).item(), rel=1e-6)
    assert got.norm == pytest.approx(wide.norm().item(), rel=1e-6)


def test_adding_never_waits(queue: StatsQueue) -> None:
    tensors = [make(100_001).cuda() for make in LARGE.values()]
    tensors += [random(7).cuda(), random(40, 50).cuda().t(), random(40, 50).cuda()[:, ::2]]
    measure(queue, *tensors)  # compiled, and memory pinned
    queue.counts = queue.locates = True
    torch.cuda.set_sync_debug_mode("error")
    for tensor in tensors:
        queue.add(tensor)
    queue.add_scalars([tensors[0].sum()])
    torch.cuda.set_sync_debug_mode("default")
    assert all(stats.unmeasured is None for stats in queue.resolve())


class Waits:
    """Counts how often the host waited for a device, outside and inside of gates."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.outside = self.inside = self.gates = 0
        self._at_gate = False
        for cls in (torch.cuda.Stream, torch.cuda.Event):
            patch.setattr(cls, "synchronize", self._counting(cls.synchronize))
        patch.setattr(torch.cuda, "synchronize", self._counting(torch.cuda.synchronize))
        fetch = Reducer.fetch

        def at_gate(reducer: Reducer, also: Any = ()) -> None:
            before, self._at_gate = self._at_gate, True
            waited = self.inside
            fetch(reducer, also)
            self.gates += self.inside > waited
            self._at_gate = before

        patch.setattr(Reducer, "fetch", at_gate)

    def _counting(self, real: Any) -> Any:
        def wait(*args: Any, **kwargs: Any) -> Any:
            self.inside += self._at_gate
            self.outside += not self._at_gate
            return real(*args, **kwargs)

        return wait


@pytest.mark.parametrize("level", ["module", "op"])
def test_a_traced_step_waits_once_a_gate_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, level: Any
) -> None:
    model = seeded()
    step = training(model)
    step()
    records = Recorded()
    with trace(out=records.append, every=1, level=level):
        step()  # kernels are compiled
        waits = Waits(monkeypatch)
        hand_on = Recorder.hand_on

        def allowed(recorder: Recorder) -> None:
            torch.cuda.set_sync_debug_mode("default")
            hand_on(recorder)
            torch.cuda.set_sync_debug_mode("error")

        monkeypatch.setattr(Recorder, "hand_on", allowed)
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(5):
            step()
        torch.cuda.set_sync_debug_mode("default")
        monkeypatch.setattr(Recorder, "hand_on", hand_on)
        assert waits.outside == 0
        assert waits.inside == waits.gates
        assert 5 <= waits.gates <= 6
    assert not records.actions("tracer_error")


def test_what_torch_itself_counts_as_waiting_is_nothing() -> None:
    model = seeded()
    step = training(model)
    with trace(out=[].append, every=1):
        step()
        step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
    # The copy is asynchronous, and the wait for its stream is none of what torch warns of.
    assert [str(w.message) for w in waited if "synchronizing" in str(w.message)] == []


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("level", ["module", "op"])
def test_training_gives_the_same_bits_as_untraced(amp: bool, level: Any) -> None:
    found = []
    for traced in (False, True):
        model = seeded()
        step = training(model, amp=amp)
        if traced:
            records = Recorded()
            with trace(out=records.append, every=1, level=level):
                for _ in range(6):
                    step()
            assert not records.actions("tracer_error")
            assert bool(records.actions("scale")) == amp
        else:
            for _ in range(6):
                step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_captured_graph_holds_nothing_of_ours() -> None:
    model = seeded().eval()
    inputs = torch.ones(8, 64, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(inputs)
        torch.cuda.current_stream().wait_stream(side)
        records = Recorded()
        graph = torch.cuda.CUDAGraph()
        with trace(out=records.append, every=1) as t:
            model(inputs)
            with torch.cuda.graph(graph):
                outputs = model(inputs)
            reducer = t._recorder.queue.devices.reducer
            used = [lane.pages[-1].used for lane in reducer._lanes.values()]
            for _ in range(3):
                inputs.add_(1.0)
                graph.replay()
            assert used == [lane.pages[-1].used for lane in reducer._lanes.values()]
            model(inputs)
        torch.cuda.synchronize()
        assert torch.equal(outputs, model(inputs))
    told = [{t.unmeasured for c in records.modules(module="", step=s.step) for t in c.tensors}
            for s in records.steps()]  # fmt: skip
    # Those of the first call were to be fetched when the second one was captured.
    assert told[1:] == [{"capturing"}, {None}]
    assert not records.actions("tracer_error")


def test_tensors_of_two_streams_are_measured_where_they_were_made(queue: StatsQueue) -> None:
    side = torch.cuda.Stream()
    for _ in range(20):
        here = torch.full((1 << 20,), 2.0, device="cuda")
        queue.add(here)
        del here  # its memory is given out again, on the same stream
        with torch.cuda.stream(side):
            there = torch.full((1 << 20,), 3.0, device="cuda")
            queue.add(there)
            del there
    told = [(stats.min, stats.max) for stats in queue.resolve()]
    assert told == [(2.0, 2.0), (3.0, 3.0)] * 20


def test_temporaries_take_at_most_64_mb(queue: StatsQueue) -> None:
    x = torch.ones(1 << 27, device="cuda")
    gaps = torch.ones((1 << 26, 2), device="cuda")[:, 0]
    measure(queue, x[:5])
    for tensor in (x, gaps, x.view(torch.complex64), x.view(torch.int64)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (got,) = measure(queue, tensor)
        assert got.unmeasured is None
        # Beside the rows, which are there for the whole run.
        assert torch.cuda.max_memory_allocated() - before <= (64 << 20) + (18 << 20)


def test_running_out_of_memory_costs_the_tensor_that_needed_it(queue: StatsQueue) -> None:
    gaps = torch.ones((1 << 27, 2), device="cuda")[:, 0]
    small = torch.ones(10, device="cuda")
    measure(queue, small)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    try:
        told = [stats.unmeasured for stats in measure(queue, small, gaps, small)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told == [None, "out of memory", None]
    assert queue.devices.reducer.launcher.trouble is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one(queue: StatsQueue) -> None:
    tensors = [random(5000, seed=i).to(f"cuda:{i % 2}") for i in range(6)]
    for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
        assert_same(got, oracle(tensor.cpu()))
    assert torch.cuda.current_device() == 0


def test_device_time_of_a_module_is_what_the_gpu_took() -> None:
    class Multiply(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = torch.tanh(x @ x)
            return x

    model = nn.Sequential(Multiply(2), Multiply(40)).cuda()
    x = torch.randn(1024, 1024, device="cuda") / 32
    records = Recorded()
    torch.cuda.synchronize()
    with torch.no_grad(), trace(out=records.append, every=1):
        model(x)
        torch.cuda.synchronize()
        started = time.perf_counter_ns()
        model(x)
        torch.cuda.synchronize()
        wall = time.perf_counter_ns() - started
    last = records.steps()[-1].step
    took = {c.module: c.device_ns for c in records.of(Call) if c.step == last}
    assert all(took.values())
    assert 5 * took["0"] < took["1"] < took[""] <= wall


@pytest.mark.parametrize("compiled", ["boundary", "eager"])
def test_a_compiled_model_is_traced_at_its_boundary(compiled: Any) -> None:
    model = seeded()
    wrapped = torch.compile(model)
    step = training(wrapped)
    step()
    records = Recorded()
    with trace(out=records.append, every=1, compiled=compiled):
        for _ in range(3):
            step()
    assert not records.actions("tracer_error")
    outputs = [t for c in records.of(Call) for t in c.tensors]
    assert outputs
    assert all(t.unmeasured is None for t in outputs)
    assert all(r.grad_norm is not None for r in records.of(Optimizer))


def test_the_log_says_what_compiling_a_kernel_took() -> None:
    pytest.importorskip("triton")
    records = Recorded()
    with trace(out=records.append, every=1):
        for _ in range(3):
            training(seeded())()
    told = [a.detail for a in records.of(Action) if a.action == "kernel"]
    assert {detail["dtype"] for detail in told} >= {"float32"}
    assert all(detail["host_ns"] > 0 for detail in told)
    # Once for memory that begins at a multiple of 16, and once for other memory.
    assert len(told) <= 2 * len({detail["dtype"] for detail in told})
