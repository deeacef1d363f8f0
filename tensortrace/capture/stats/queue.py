"""Tensor -> the numbers that the log keeps.

A hot path: `StatsQueue.add` is called for every traced tensor. On the CPU the numbers are there at
once; elsewhere they stay on their device until `StatsQueue.resolve`.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from tensortrace.capture import compiled
from tensortrace.capture.stats import kernels
from tensortrace.capture.stats.devices import CapturingError, Devices, OnDevice, first_bad_of
from tensortrace.capture.stats.exponents import HALF, LEAST, RUN, SAMPLE, count_exponents
from tensortrace.capture.stats.gather import Gathered, Ticket
from tensortrace.capture.stats.kernels import BOUNDS, FULL, LEAN, NUMPY, Kernels, Row
from tensortrace.capture.unwrap import (
    blocks,
    distinct,
    extent,
    is_backed,
    is_dense_cpu,
    plain,
    quiet,
)
from tensortrace.signal_handlers import is_of_handler, let_through

if TYPE_CHECKING:
    from tensortrace.capture.tensors import TensorTable

__all__ = ["Head", "Level", "Stats", "StatsQueue", "summarize"]

Level = Literal["full", "light", "minmax", "none"]


class Stats(NamedTuple):
    """Counts over all elements; min, max, mean, population std and L2 norm over the finite ones.

    None where no element is finite, or where `unmeasured` says why there are no statistics. The
    norm of doubles saturates at the largest double. At level "minmax" zeros, mean, std and norm
    are not taken, at level "light" min, max, mean and std of larger tensors. `first_bad` is where,
    in row-major order, the first NaN or infinity is: of dense CPU tensors, and of those on other
    devices if the queue `locates`. `exponents` are given if the queue counts them.
    """

    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    unmeasured: str | None = None
    first_bad: int | None = None
    exponents: tuple[int, ...] | None = None


# id, shape, stride, dtype, device, requires_grad, is_leaf, grad_fn, numel
Head: TypeAlias = tuple[
    int, tuple[int, ...] | None, tuple[int, ...] | None, str, str, bool, bool, str | None, int
]  # fmt: skip

_EMPTY = Stats()
_OFF = Stats(unmeasured="off")
_HUGE = sys.float_info.max
_make = tuple.__new__
_number = ctypes.c_float.from_address

# Larger CPU tensors are read in blocks: what a pass leaves in cache serves the next one.
_BLOCK = 1 << 20
# A device reduces so many bytes at once: its temporaries are up to four times as many.
_DEVICE_BYTES = 1 << 24
_HOST = {"cpu"}


compiled.prepare(small=kernels.SMALL, least=LEAST, sample=SAMPLE, run=RUN)
# How `look` measures: in full, in full with exponents, counts and norm.
_FULLY, _CLOSELY, _LEANLY = 0, 1, 2


def summarize(tensor: torch.Tensor) -> Stats:
    """Reduce one tensor to its statistics, at once.

    Args:
        tensor: any shape, dtype, layout, device; not modified, not kept. Complex: the modulus.
    """
    queue = StatsQueue()
    queue.add(tensor)
    return queue.resolve()[0]


class StatsQueue:
    """Statistics that are still on their device, until one transfer brings them over.

    Args:
        level: "full"; "light" is meant to be `lean` all the time, on every device; "minmax" leaves
            out zeros, mean, std and norm; "none" measures nothing.
        devices: measures what is not in host memory; several queues may share one.

    Attributes:
        light: whether the level is "light". Then tensors of more than 2048 elements on other
            devices than the CPU have counts and norm only, which takes half of torch's kernels.
        lean: whether min, max, mean and std of CPU tensors of more than 8192 elements are left
            out, unless the level is "minmax": that saves three reads of four. For steps of which
            the log keeps the step line only: that needs the counts, which stay exact, and the norm,
            to six digits. Such tensors that do hold a NaN or an infinity are measured in full.
        locates: whether `first_bad` is found of every tensor on other devices than the CPU, at six
            kernels each; of contiguous CUDA tensors our own kernel says it anyway.
        counts: whether `exponents` are counted, at level "full" and if not lean, of floats of at
            least 64 elements: by our own kernels, and without them of float16 and bfloat16 only,
            at a dozen kernels each.
        alarmed: whether anything since the last `resolve` is not finite, or not known before the
            next one.
    """

    __slots__ = (
        "_gathered", "_kernels", "_level", "_lock", "_results", "alarmed", "counts", "devices",
        "lean", "light", "locates",
    )  # fmt: skip

    def __init__(self, level: Level = "full", devices: Devices | None = None) -> None:
        self.devices = devices or Devices()
        self._level = level
        self._kernels = FULL if level in ("full", "light") else BOUNDS
        self.light = self.lean = level == "light"
        self.locates = self.counts = self.alarmed = False
        # Taken again by its own thread where the end of a run is met by garbage collection.
        self._lock = threading.RLock()
        self._results: list[Stats | OnDevice] = []
        self._gathered = Gathered()

    def __len__(self) -> int:
        return len(self._results)

    def add(self, tensor: torch.Tensor) -> Ticket:
        """Reduce a tensor now and hand out a ticket for its numbers; the tensor is not kept.

        Returns:
            What `stats_of` takes once the queue is resolved. Never raises: a failure becomes the
            statistics ``unmeasured="error: RuntimeError"``.
        """
        if self._level == "none":
            return self._put(_OFF)
        return self._add(tensor, self._ways, self.light)

    def add_other(self, tensor: torch.Tensor) -> Ticket:
        """As `add`, of a tensor that `look` said nothing of."""
        if self._level == "none":
            return self._put(_OFF)
        return self._add_other(tensor, self._ways, self.light)

    @property
    def measures(self) -> bool:
        """Whether anything is measured at all."""
        return self._level != "none"

    @property
    def _ways(self) -> Kernels:
        return LEAN if self.lean and self._kernels is FULL else self._kernels

    def look(self, tensor: torch.Tensor, number: int) -> tuple[Head | None, Any] | None:
        """Measure a tensor at once, and describe it too where that costs nothing more. Hot.

        Args:
            tensor: any; call it inside `DisableTorchFunction`.
            number: its id.
        Returns:
            The fields of a `Tensor` before its statistics, unless it has gaps or strides in an
            order of their own, and those of a `Stats`. None of all but ordinary CPU tensors, and
            without the compiled kernel: those are for `add_other`.
        """
        kernel = compiled.kernel
        if kernel is None or self._level == "none":
            return None
        mode = _FULLY
        if self._kernels is FULL:
            mode = _LEANLY if self.lean else _CLOSELY if self.counts else _FULLY
        found: tuple[Head | None, Any] | None = kernel.look(tensor, number, mode)
        if found is None:
            try:
                row = self._row(tensor, self._ways)
            except Exception as err:
                if is_of_handler(err):
                    raise
                return None  # who measures it otherwise meets it again, and says so
            if row is None:
                return None
            found = None, row if row[10] is None else _by_row(_make(Stats, row), tensor)
        if found[1][10] is not None:
            self.alarmed = True
        if self._level == "minmax":
            return found[0], _minmax(_make(Stats, found[1]))
        return found

    def look_all(
        self,
        make: Callable[..., Any],
        table: TensorTable,
        arrived: tuple[torch.Tensor | None, ...],
        made: tuple[torch.Tensor | None, ...],
    ) -> tuple[tuple[Any, ...], bool] | None:
        """Describe the gradients of a node at once, and read what two of them share once. Hot.

        Args:
            make: makes a `Tensor` of its first fields.
            table: gives the numbers.
            arrived: and `made`, as an autograd hook gets them, inside `DisableTorchFunction`.
        Returns:
            A `Tensor` each, None where there is none, its number of what is no ordinary CPU tensor;
            and whether there are such. None of all but the usual levels and numbers of gradients,
            and without the compiled kernel.
        """
        kernel = compiled.kernel
        if kernel is None or self._kernels is not FULL:
            return None
        mode = _LEANLY if self.lean else _CLOSELY if self.counts else _FULLY
        found = kernel.look_all(make, table, arrived, made, mode)
        if found is None:
            return None
        described, bad, rest = found
        if bad:
            self.alarmed = True
        return described, rest

    def add_scalars(self, values: Iterable[torch.Tensor]) -> list[Ticket]:
        """Queue tensors of one element, at any level: `min` is the value, None if not finite."""
        values = list(values)
        if len(values) > 1 and not values[0].is_cpu:
            try:
                with torch._C.DisableTorchFunction(), quiet():
                    found = self.devices.numbers(values)
            except Exception as err:
                let_through(err)
                found = None  # each is tried by itself, and says why it has none
            if found is not None:
                return [self._put(each) for each in found]
        return [self._add_scalar(value) for value in values]

    def add_number(self, value: float) -> Ticket:
        """As `add_scalars`, of a number that is known already."""
        return self._put(_of_one(value))

    def _add_scalar(self, value: torch.Tensor) -> Ticket:
        try:
            with torch._C.DisableTorchFunction():
                # Not `tensor.item()`: a dispatch mode of the user's would see it.
                address = value.data_ptr() if _is_plain_number(value) else 0
                if address:
                    return self._put(_of_one(_number(address).value))
        except Exception as err:
            return self._put(_failed(err))
        return self._add(value, FULL)

    def _add(self, tensor: torch.Tensor, ways: Kernels, light: bool = False) -> Ticket:
        if compiled.kernel is not None:
            try:
                with torch._C.DisableTorchFunction():
                    row = self._row(tensor, ways)
                    if row is not None:
                        stats = _make(Stats, row)
                        return self._put(stats if row[10] is None else _by_row(stats, tensor))
            except Exception as err:
                return self._put(_failed(err))
        return self._add_other(tensor, ways, light)

    def _add_other(self, tensor: torch.Tensor, ways: Kernels, light: bool = False) -> Ticket:
        try:
            with torch._C.DisableTorchFunction():
                ticket = self._gather(tensor)
                if ticket is not None:
                    return ticket
                counts = self.counts and ways is FULL
                result = _measure(tensor, ways) or self._begin(tensor, light, counts)
                if counts and tensor.dtype in HALF and isinstance(result, Stats):
                    result = _with_exponents(result, tensor)
                return self._put(result)
        except Exception as err:
            return self._put(_failed(err))

    def _row(self, tensor: torch.Tensor, ways: Kernels) -> tuple[Any, ...] | None:
        """The fields of a `Stats` by the compiled kernel; None of what it may not read. Hot."""
        kernel, lean = compiled.kernel, ways is LEAN
        assert kernel is not None
        row: tuple[Any, ...]
        place = compiled.place(tensor)
        if place is not None:
            if self.counts and ways is FULL and place[1] >= LEAST:
                row = kernel.measure_closely(*place, SAMPLE, RUN)
            elif lean and place[1] > kernels.SMALL:
                row = kernel.measure_lean(*place)
                if row[10] is not None:
                    row = kernel.measure(*place)
            else:
                row = kernel.measure(*place)
            return row
        gaps = compiled.rows_place(tensor)
        if gaps is None:
            return None
        lean = lean and gaps[1] * gaps[3] > kernels.SMALL
        row = kernel.measure_rows(*gaps, lean)
        return kernel.measure_rows(*gaps, False) if lean and row[10] is not None else row

    def _begin(self, tensor: torch.Tensor, light: bool, counts: bool) -> OnDevice:
        """Begin to measure what lies on another device, and is not empty."""
        with quiet():
            found = plain(tensor)
            assert isinstance(found, torch.Tensor)  # asked before
            found, times = distinct(found)
            return self.devices.measure(
                tensor, found, times, light=light, counts=counts, locates=self.locates,
                limit=_DEVICE_BYTES // max(4, found.element_size()),
            )  # fmt: skip

    def gather(self, tensor: torch.Tensor, head: Head) -> Ticket | None:
        """Copy a small f32 tensor now, to reduce it later, or leave it to `add_other`. Hot.

        Args:
            tensor: exactly a Tensor or Parameter, strided; call it inside `DisableTorchFunction`.
            head: how it was described a moment ago.
        Returns:
            None for any other kind, and where nothing is measured or the kernel is compiled.
        """
        n = head[8]
        if head[3] != "float32" or not 0 < n <= kernels.SMALL or head[4] != "cpu":
            return None
        if compiled.kernel is not None or self._level == "none":
            return None
        try:
            # What else is wrapped around its memory, functorch and functional tensors and zero
            # tensors, has no address: see `is_dense` of _statistics.c.
            return None if tensor.is_neg() else self._take_in(tensor, n, head[2])
        except Exception as err:
            if is_of_handler(err):
                raise
            return None  # `add_other` meets it again, and says so

    def _gather(self, tensor: torch.Tensor) -> Ticket | None:
        """The same of a tensor that nobody has described."""
        if not is_dense_cpu(tensor) or tensor.dtype is not torch.float32:
            return None
        n = tensor.numel()
        if not 0 < n <= kernels.SMALL:
            return None
        return self._take_in(tensor, n, None if tensor.is_contiguous() else tensor.stride())

    def _take_in(
        self, tensor: torch.Tensor, n: int, strides: tuple[int, ...] | None
    ) -> Ticket | None:
        end, gaps = n, None
        if strides is not None:
            end = extent(tensor.shape, strides)
            gaps = (tensor.shape, strides, end)
        address = tensor.data_ptr()
        if not address or (tensor.storage_offset() + end) * 4 > tensor.untyped_storage().nbytes():
            return None
        self.alarmed = True
        with self._lock:
            if not self._gathered.fits(n):
                self._reduce_gathered()
            results = self._results
            results.append(_EMPTY)  # until it is reduced
            ticket = results, len(results) - 1
            self._gathered.put(address, n, ticket, gaps)
            return ticket

    def _reduce_gathered(self) -> None:
        # Not `_results`: where the collector ends the run meanwhile, that is another list.
        for (results, i), fields in self._gathered.take():
            results[i] = _make(Stats, fields)

    def news(self) -> tuple[list[tuple[str, int]], str | None]:
        """Which kernels for devices were compiled since the last time, and why one could not be.

        Returns:
            Dtype and ns of each; None while all goes well.
        """
        launcher = self.devices.reducer.launcher
        prepared, launcher.prepared = launcher.prepared, []
        return prepared, launcher.trouble

    def _put(self, result: Stats | OnDevice) -> Ticket:
        if not isinstance(result, Stats) or _is_bad(result):
            self.alarmed = True
        with self._lock:
            results = self._results
            results.append(result)
            return results, len(results) - 1

    def resolve(self) -> list[Stats]:
        """Bring all statistics over, in the order of the tickets; the queue is empty afterwards.

        A ticket stays good: it holds the list that is filled in here, so what another thread adds
        meanwhile has its numbers now or with the next call.
        """
        with self._lock:
            self._reduce_gathered()
            results, self._results = self._results, []
            self.alarmed = False
        pending = [result for result in results if isinstance(result, OnDevice)]
        if pending:
            with quiet():
                self.devices.fetch(pending)
        out = [_fetched(result) if isinstance(result, OnDevice) else result for result in results]
        if self._level == "minmax":
            out = [_minmax(stats) for stats in out]
        results[:] = out
        return out


def stats_of(ticket: Ticket) -> Stats:
    """The statistics of a resolved queue by ticket. Hot."""
    results, i = ticket
    found: Stats = results[i]
    return found


def is_known_bad(ticket: Ticket) -> bool:
    """Whether what was queued holds a NaN or infinity, and that is known without a wait."""
    results, i = ticket
    return isinstance(results[i], Stats) and _is_bad(results[i])


def _fetched(result: OnDevice) -> Stats:
    if result.error is not None:
        return _failed(result.error)
    stats = _combine(result.rows, result.times)
    if result.first_bad is not None or result.exponents is not None:
        return stats._replace(first_bad=result.first_bad, exponents=result.exponents)
    return stats


def _with_exponents(stats: Stats, tensor: torch.Tensor) -> Stats:
    if type(tensor) not in compiled.EXACT or tensor.numel() < LEAST or stats.unmeasured is not None:
        return stats
    try:
        with quiet():
            counts = count_exponents(tensor)
    except (RuntimeError, NotImplementedError):
        return stats  # nested
    return stats if counts is None else stats._replace(exponents=tuple(counts.tolist()))


def _by_row(stats: Stats, tensor: torch.Tensor) -> Stats:
    """Say of `first_bad`, found in the order of memory, where it is row by row."""
    if tensor.is_contiguous():
        return stats
    with quiet():
        return stats._replace(first_bad=_index(first_bad_of(tensor)))


def _index(first: torch.Tensor | None) -> int | None:
    return None if first is None else int(first)


def _is_plain_number(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one element in host memory: reading it waits for nothing. Hot."""
    one = tensor.dtype is torch.float32 and tensor.numel() == 1
    return one and is_dense_cpu(tensor) and is_backed(tensor)


def _of_one(x: float) -> Stats:
    """The statistics of a single f32."""
    if x - x == 0:
        return _make(Stats, (0, 0, 0, int(x == 0), x, x, x, 0.0, abs(x), None, None, None))
    return Stats(int(x != x), int(x == math.inf), int(x == -math.inf), first_bad=0)  # noqa: PLR0124 NaN


def _minmax(stats: Stats) -> Stats:
    return stats._replace(zeros=0, mean=None, std=None, norm=None)


def _measure(tensor: torch.Tensor, ways: Kernels) -> Stats | None:
    """Measure what lies in host memory, or say that there is nothing to; None for the rest."""
    small, block_rows = ways
    n = tensor.numel() if is_dense_cpu(tensor) else -1
    if 0 < n <= kernels.SMALL and tensor.dtype in NUMPY and is_backed(tensor):
        array = kernels.as_array(tensor)
        stats = _stats(small(array))
        return stats._replace(first_bad=kernels.first_bad(array)) if _is_bad(stats) else stats
    with quiet():
        found = plain(tensor)
        if isinstance(found, str):
            return Stats(unmeasured=found)
        found, times = distinct(found)
        if found.numel() == 0:
            return _EMPTY
        if found.device.type in _HOST:
            rows: list[Row] = []
            for block in blocks(found, _BLOCK):
                rows += block_rows(block)
            stats = _combine(rows, times)
            if _is_bad(stats) and n > 0:
                return stats._replace(first_bad=_index(first_bad_of(tensor)))
            return stats
        return None


def _is_bad(stats: Stats) -> bool:
    return bool(stats.nan or stats.posinf or stats.neginf)


def _failed(err: Exception) -> Stats:
    if is_of_handler(err):
        raise err
    if isinstance(err, CapturingError):
        return Stats(unmeasured="capturing")
    if isinstance(err, torch.OutOfMemoryError) or "can't allocate memory" in str(err):
        return Stats(unmeasured="out of memory")
    return Stats(unmeasured=f"error: {type(err).__name__}")


def _stats(row: Row) -> Stats:
    nan, posinf, neginf, zeros, count, low, high, mean, std, norm = row
    if count:
        norm = norm if norm < _HUGE else _HUGE
        if math.isnan(mean):  # a lean row
            return Stats(nan, posinf, neginf, zeros, norm=norm)
        # A third of the time of Stats(...), which is a function in Python.
        numbers = (nan, posinf, neginf, zeros, low, high, mean, std, norm)
        return _make(Stats, (*numbers, None, None, None))
    return Stats(nan, posinf, neginf)


def _combine(rows: list[Row], times: int) -> Stats:
    """Put the blocks of a tensor together; `times` is how often an expanded tensor repeats it.

    `math.hypot` scales, so that doubles near the end of their range do not overflow.
    Source: the parallel variance of Chan, Golub and LeVeque (1983).
    """
    if len(rows) == 1 and times == 1:
        return _stats(rows[0])
    nan, posinf, neginf, zeros, count = (
        int(sum(column)) * times for column in list(zip(*rows, strict=True))[:5]
    )
    rows = [row for row in rows if row[4]]
    if not rows:
        return Stats(nan, posinf, neginf)
    share = [row[4] * times / count for row in rows]
    mean = math.fsum(w * row[7] for w, row in zip(share, rows, strict=True))
    std = math.hypot(
        *(math.sqrt(w) * row[8] for w, row in zip(share, rows, strict=True)),
        *(math.sqrt(w) * (row[7] - mean) for w, row in zip(share, rows, strict=True)),
    )
    norm = math.hypot(*(row[9] for row in rows)) * math.sqrt(times)
    if math.isnan(mean):
        return Stats(nan, posinf, neginf, zeros, norm=min(norm, _HUGE))
    return Stats(
        nan, posinf, neginf, zeros, min(row[5] for row in rows), max(row[6] for row in rows), mean,
        std, min(norm, _HUGE),
    )  # fmt: skip
