"""What stands in for CUDA and for its kernels where there is neither."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from tensortrace.capture.stats.cuda import launch as cuda_launch
from tensortrace.capture.stats.cuda.launch import Launcher, divide
from tensortrace.capture.stats.cuda.rows import Reducer
from tensortrace.capture.stats.devices import Devices
from tensortrace.capture.stats.queue import StatsQueue


class OnHost:
    """Answers for CUDA: streams have names, and host memory is as good as pinned.

    Attributes:
        stream: the current one.
        waits: the streams of each time that the host waited.
    """

    def __init__(self) -> None:
        self.stream = "main"
        self.capturing: set[str] = set()
        self.waits: list[list[str]] = []
        self.held: list[tuple[int, str]] = []

    def current(self, device: torch.device) -> str:
        return self.stream

    def at(self, device: torch.device) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def on(self, stream: str) -> Any:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def is_capturing(self) -> bool:
        return self.stream in self.capturing

    def hold(self, tensor: torch.Tensor, stream: str) -> None:
        self.held.append((tensor.data_ptr(), stream))

    def pinned(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, columns), -7, dtype=dtype)

    def wait(self, streams: Any) -> None:
        self.waits.append([*dict.fromkeys(streams)])


class Counted(Launcher):
    """The kernels in NumPy, as they are divided among programs.

    Attributes:
        launches: the name of each, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds = dict(cuda_launch._KINDS)
        self.launches: list[str] = []

    def _reduce(self, tensor: torch.Tensor, rows: torch.Tensor, first: int, counts: bool) -> None:
        self.launches.append("reduce")
        x = _in_memory(tensor)
        parts, tiles = divide(len(x))
        share = tiles * cuda_launch._BLOCK
        shift = x[0] if np.isfinite(x[0]) else 0.0
        for part in range(parts):
            rows[first + part, :12] = torch.tensor(_row(x, part * share, share, shift))
        if counts:
            rows[first + parts] = torch.arange(16.0)

    def combine(
        self, rows: torch.Tensor, table: torch.Tensor, out: torch.Tensor, since: int, count: int
    ) -> None:
        self.launches.append("combine")
        pairs = table[since : since + count].tolist()
        for (first, parts), result in zip(pairs, out[since:], strict=False):
            block = rows[first : first + parts]
            if parts:
                result.copy_(block.sum(0))
            if parts > 1:
                result[4], result[5] = block[:, 4].min(), block[:, 5].max()
                result[9:] = block[:, 9:].amin(0)


def _in_memory(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.to(torch.float64).numpy()


def _row(whole: Any, begin: int, share: int, shift: float) -> list[float]:
    x = whole[begin : begin + share]
    finite = np.isfinite(x)
    y = x[finite]
    bad = begin + int(finite.argmin()) if not finite.all() else 1 << 52
    return [
        np.isnan(x).sum(), (x == np.inf).sum(), (x == -np.inf).sum(), (x == 0).sum(),
        y.min(initial=np.inf), y.max(initial=-np.inf),
        (y - shift).sum(), ((y - shift) ** 2).sum(), (y**2).sum(), bad, shift, 1.0,
    ]  # fmt: skip


def queue_on_host(driver: OnHost | None = None, launcher: Launcher | None = None) -> StatsQueue:
    """A queue for which CPU tensors are on a device that `launcher` has kernels for."""
    reducer = Reducer(driver or OnHost(), launcher or Counted())  # type: ignore[arg-type]
    return StatsQueue(devices=Devices(reducer, served=("cpu",)))
