"""What tracing costs on a GPU: time, launches and waits of a step, and the statistics alone.

Wall time between two waits for the device, in pairs as in `measure`. Nobody has run this yet: there
was no GPU where it was written. Without one it says so.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from tensortrace.capture.stats.devices import Devices
from tensortrace.capture.stats.queue import StatsQueue
from tests.benchmarks.measure import Way, tracing, untraced
from tests.benchmarks.workloads import Workload, build

NO_GPU = "tests.benchmarks --gpu needs a CUDA device, and torch sees none here."
_STEPS = {"mlp": 100, "resnet": 40, "gpt2": 40, "lstm": 10}
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_COUNTS = (1_000, 1_000_000, 100_000_000)


@contextmanager
def without_triton() -> Iterator[None]:
    """Statistics by torch's operators, as where Triton is not installed."""
    with patch("tensortrace.capture.stats.cuda.launch.Launcher._load", lambda self: False):
        yield


def by_torch(way: Way) -> Way:
    """Run a way without Triton."""

    @contextmanager
    def changed(work: Workload) -> Iterator[Any]:
        with without_triton(), way(work) as turn:
            yield turn

    return changed


WAYS: dict[str, Way] = {
    "nothing against nothing (noise)": untraced,
    "`trace(every=1)`": tracing(every=1),
    "`trace(every=1)` without Triton": by_torch(tracing(every=1)),
    '`trace(every=1, level="op")`': tracing(every=1, level="op"),
    '`trace()`, `every="auto"`, after step 1000': tracing(every="auto", after=1001),
    '`trace(every=1, stats="none")`': tracing(every=1, stats="none"),
}


def print_gpu(names: Iterable[str], pairs: int, device: str = "cuda") -> None:
    """Measure the workloads and the statistics, and print three tables.

    Args:
        names: of the workloads.
        pairs: how many each ratio is the median of.
        device: "cpu" only shows that it runs.
    """
    names = list(names)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    print(f"{'ratio of wall time, median [quartiles]':44s}" + "".join(f"{n:>22s}" for n in names))
    for title, way in WAYS.items():
        cells = [_cell(on_device(name, device), way, pairs, wait) for name in names]
        print(f"{title:44s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)
    print(f"\n{'launches and waits of one step':44s}" + "".join(f"{n:>22s}" for n in names))
    for title, way in WAYS.items():
        cells = [f"{a} / {b}" for a, b in (calls(on_device(n, device), way) for n in names)]
        print(f"{title:44s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)
    print(f"\n{statistics_table(_COUNTS, device, wait)}")


def machine() -> str:
    """Say what it ran on."""
    name = torch.cuda.get_device_name()
    return f"{name}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def on_device(name: str, device: str) -> Workload:
    """Make a workload whose model and data are there."""
    with torch.device(device):
        return build(name)


def _cell(work: Workload, way: Way, pairs: int, wait: Callable[[], None]) -> str:
    ratios = []
    for i in range(pairs):
        turns = (untraced, way) if i % 2 == 0 else (way, untraced)
        first, second = (_timed(turn, work, wait) for turn in turns)
        ratios.append(second / first if i % 2 == 0 else first / second)
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def _timed(way: Way, work: Workload, wait: Callable[[], None]) -> float:
    """Seconds of one step; the first two of the block, in which kernels compile, are left out."""
    steps = _STEPS[work.name]
    with way(work) as turn:
        turn.run()
        turn.run()
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            turn.run()
        wait()
        return (time.perf_counter() - start) / steps


def calls(work: Workload, way: Way) -> tuple[int, int]:
    """How many kernels one step launches, and how often it waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with way(work) as turn:
        turn.run()
        turn.run()
        with profile(activities=kinds) as profiler:
            turn.run()
    return counted(event.name for event in profiler.events())


def counted(names: Iterable[str]) -> tuple[int, int]:
    """Count launches and waits among the names of what the profiler saw."""
    seen = Counter(names)
    return sum(seen[name] for name in _LAUNCHES), sum(seen[name] for name in _WAITS)


def statistics_table(counts: Iterable[int], device: str, wait: Callable[[], None]) -> str:
    """Microseconds of a tensor: until `add` returns, and until the device is done with it.

    The last column is the norm alone of a list of tensors, `torch._foreach_norm`: one launch for
    many, but they have to be there at the same time.
    """
    lines = [f"{'us a tensor':10s}{'elements':>13s}{'Triton':>18s}{'torch':>18s}{'foreach':>18s}"]
    for n in counts:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(n, device=device).to(dtype) for _ in range(20)]
            cells = [_added(tensors, wait)]
            with without_triton():
                cells.append(_added(tensors, wait))
            cells.append(_run(partial(torch._foreach_norm, tensors), len(tensors), wait))
            name = str(dtype).removeprefix("torch.")
            told = "".join(f"{f'{host:.1f} {done:.1f}':>18s}" for host, done in cells)
            lines.append(f"{name:10s}{n:13,d}{told}")
    return "\n".join(lines)


def _added(tensors: list[torch.Tensor], wait: Callable[[], None]) -> tuple[float, float]:
    queue = StatsQueue(devices=Devices())

    def add() -> None:
        for tensor in tensors:
            queue.add(tensor)

    add()
    queue.resolve()
    found = _run(add, len(tensors), wait)
    queue.resolve()
    return found


def _run(work: Callable[[], object], share: int, wait: Callable[[], None]) -> tuple[float, float]:
    best = [1e9, 1e9]
    for _ in range(7):
        wait()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        wait()
        done = time.perf_counter() - start
        best = [min(best[0], host), min(best[1], done)]
    return best[0] / share * 1e6, best[1] / share * 1e6
