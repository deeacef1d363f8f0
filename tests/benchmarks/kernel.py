"""The statistics alone: nanoseconds an element and microseconds a tensor, by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tensortrace.capture import compiled
from tensortrace.capture.stats.queue import StatsQueue

# One element; in the second cache; in the third; in memory (400 MB of f32).
_COUNTS = (1, 10_000, 1_000_000, 100_000_000)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HEAD = (
    f"{'dtype':9s}{'elements':>12s}{'compiled':>10s}{'torch':>10s}{'read':>10s}"
    f"{'closely':>11s}{'all NaN':>10s}"
)


def kernel_table(counts: tuple[int, ...] = _COUNTS) -> str:
    """Measure both kernels beside a plain read of the same memory, the best of several turns.

    Args:
        counts: numbers of elements; of 1 the table has microseconds, else nanoseconds an element.
    """
    lines = [_HEAD]
    for n in counts:
        for dtype in _DTYPES if n <= 1_000_000 else _DTYPES[:1]:
            tensor = torch.ones(n, dtype=dtype)
            tensor[n // 3 :] = -0.5
            cells = [
                _seconds(_measure, tensor),
                _without_kernel(tensor),
                _seconds(_read, tensor),
                _seconds(_measure_closely, tensor),
                _seconds(_measure, tensor.fill_(torch.nan)),
            ]
            unit = 1e6 if n == 1 else 1e9 / n
            widths = (10, 10, 10, 11, 10)
            numbers = (f"{c * unit:{w}.3f}" for c, w in zip(cells, widths, strict=True))
            name = str(dtype).removeprefix("torch.")
            unit_name = " us" if n == 1 else " ns an element"
            lines.append(f"{name:9s}{n:12,d}{''.join(numbers)}{unit_name}")
    return "\n".join(lines)


def kernel_call_us() -> float | None:
    """Microseconds of a call of the compiled kernel by itself, for one element."""
    tensor = torch.ones(1)
    kernel, place = compiled.kernel, compiled.place(tensor)
    if kernel is None or place is None:
        return None
    return 1e6 * _seconds(lambda _: kernel.measure(*place), tensor)


def _measure(tensor: torch.Tensor) -> None:
    queue = StatsQueue()
    queue.add(tensor)
    queue.resolve()


def _measure_closely(tensor: torch.Tensor) -> None:
    queue = StatsQueue()
    queue.counts = True
    queue.add(tensor)
    queue.resolve()


def _read(tensor: torch.Tensor) -> None:
    memory = tensor.view(torch.uint8).numpy()
    whole = len(memory) - len(memory) % 8
    np.bitwise_or.reduce(memory[:whole].view(np.int64))


@contextmanager
def _torch_only() -> Iterator[None]:
    kernel, compiled.kernel = compiled.kernel, None
    try:
        yield
    finally:
        compiled.kernel = kernel


def _without_kernel(tensor: torch.Tensor) -> float:
    with _torch_only():
        return _seconds(_measure, tensor)


def _seconds(call: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> float:
    """The least time of a call, in a loop that is long enough for the clock."""
    n = tensor.numel()
    repeats = max(1, 1000 // n)
    best = float("inf")
    for _ in range(10 if n < 10_000_000 else 4):
        start = time.perf_counter()
        for _ in range(repeats):
            call(tensor)
        best = min(best, time.perf_counter() - start)
    return best / repeats
