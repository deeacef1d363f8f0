"""Statistics of tensors on GPUs: one launch a tensor, and at a gate one copy and one wait.

A hot path. What a launch leaves is a row for each of its programs, in memory that belongs to the
stream it ran on. When that memory is full, and at the gate, one launch puts the rows of each tensor
together. As all this follows one another on the stream, the memory is used again without a wait,
and it does not grow with the number of tensors: 8 MiB a stream, and 128 bytes a tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

import torch

from tensortrace.capture.stats.cuda.driver import Driver
from tensortrace.capture.stats.cuda.launch import ROW, Launcher, divide
from tensortrace.capture.stats.kernels import Row

__all__ = ["MOST_NUMBERS", "CapturingError", "Entry", "Number", "Reducer"]

# Rows of parts that a stream holds before they are put together.
_PARTS = 1 << 16
# Tensors whose numbers travel in one copy.
_TENSORS = 1 << 13
_NOWHERE = 1 << 52
# Single numbers that are taken over at once.
MOST_NUMBERS = 1 << 12


class _Sheet:
    """What one page brought over: its numbers, or the error that kept them away."""

    __slots__ = ("error", "numbers")

    def __init__(self) -> None:
        self.numbers: Any = None
        self.error: Exception | None = None


class Entry:
    """Where the numbers of one tensor are, once its page has come over."""

    __slots__ = ("_at", "_counted", "_n", "_sheet")

    def __init__(self, sheet: _Sheet, at: int, n: int, counted: bool) -> None:
        self._sheet, self._at, self._n, self._counted = sheet, at, n, counted

    def row(self) -> Row:
        """The same row as from the other kernels.

        Raises:
            Exception: whatever kept it from coming over.
        """
        if self._sheet.error is not None:
            raise self._sheet.error
        return _finish(self._sheet.numbers[self._at].tolist(), self._n)

    def first_bad(self) -> int | None:
        """The first element in memory that is not finite."""
        first = int(self._sheet.numbers[self._at][9])
        return None if first >= _NOWHERE else first

    def number(self) -> int:
        """The only element, of a tensor of whole numbers."""
        return int(self._sheet.numbers[self._at][4])

    def exponents(self) -> tuple[int, ...] | None:
        """Elements of a sample by magnitude, if they were counted."""
        return tuple(map(int, self._sheet.numbers[self._at + 1])) if self._counted else None


class Number:
    """Where one number is, once its page has come over."""

    __slots__ = ("_at", "_sheet")

    def __init__(self, sheet: _Sheet, at: int) -> None:
        self._sheet, self._at = sheet, at

    def row(self) -> Row:
        """The row of one element.

        Raises:
            Exception: whatever kept it from coming over.
        """
        if self._sheet.error is not None:
            raise self._sheet.error
        x = float(self._sheet.numbers[self._at // ROW][self._at % ROW])
        if math.isfinite(x):
            return 0, 0, 0, int(x == 0), 1, x, x, x, 0.0, abs(x)
        bad = int(math.isnan(x)), int(x == math.inf), int(x == -math.inf)
        return *bad, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0

    def exponents(self) -> None:
        """One number has no distribution."""


class _Page:
    """Which rows belong to which tensor, and the memory that the results travel through."""

    def __init__(self, device: torch.device, driver: Driver) -> None:
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False):
            self.table = driver.pinned(_TENSORS, 2, torch.int32)
            self.numbers = driver.pinned(_TENSORS, ROW, torch.float64)
            self._table_there = torch.zeros((_TENSORS, 2), dtype=torch.int32, device=device)
            self._results = torch.empty((_TENSORS, ROW), dtype=torch.float64, device=device)
        self._lines = self.table.numpy()
        self.used = self._folded = 0
        self.sheet = _Sheet()

    def prepare(self, parts: torch.Tensor, launcher: Launcher) -> None:
        """Put nothing together: what cannot be compiled is known before anything waits for it."""
        launcher.combine(parts, self._table_there, self._results, 0, 1)

    def put(self, first: int, parts: int) -> int:
        """Say which rows belong together; the number of the result."""
        at = self.used
        self._lines[at] = first, parts
        self.used = at + 1
        return at

    def fold(self, parts: torch.Tensor, launcher: Launcher) -> None:
        """Put together what was reduced since the last time, on the current stream."""
        since, now = self._folded, self.used
        if since == now:
            return
        # Lines that were copied are not written again before the host has waited.
        self._table_there[since:now].copy_(self.table[since:now], non_blocking=True)
        launcher.combine(parts, self._table_there, self._results, since, now - since)
        self._folded = now

    def send(self) -> None:
        """Copy the results to the host, on the current stream."""
        self.numbers[: self.used].copy_(self._results[: self.used], non_blocking=True)

    def drop(self, error: Exception) -> bool:
        """Say why nothing came over, and begin again; False if a copy may still be under way."""
        self.sheet.error, self.sheet = error, _Sheet()
        self.used = 0
        return self._folded == 0

    def take(self) -> None:
        """Copy what came over, and begin again: the host has waited."""
        self.sheet.numbers = self.numbers[: self.used].numpy().copy()
        self.used = self._folded = 0
        self.sheet = _Sheet()


class _Lane:
    """The memory of one stream."""

    def __init__(self, device: torch.device, driver: Driver) -> None:
        with torch.inference_mode(False):
            self.parts = torch.empty((_PARTS, ROW), dtype=torch.float64, device=device)
        self.used = 0
        self.pages = [_Page(device, driver)]
        self.spare: _Page | None = None

    def reserve(self, rows: int, results: int, driver: Driver, launcher: Launcher) -> _Page:
        """Make room for so many rows and results; on the lane's own stream."""
        page = self.pages[-1]
        if self.used + rows > _PARTS or page.used + results > _TENSORS:
            page.fold(self.parts, launcher)
            self.used = 0
        if page.used + results > _TENSORS:
            page = _Page(self.parts.device, driver)
            self.pages.append(page)
        return page


class Reducer:
    """Reduces tensors of all GPUs.

    Args:
        driver: streams and pinned memory.
        launcher: the kernels.
    """

    def __init__(self, driver: Driver | None = None, launcher: Launcher | None = None) -> None:
        self._driver = driver or Driver()
        self.launcher = launcher or Launcher()
        self._lanes: dict[Any, _Lane] = {}
        # Two threads may share a stream: what is put together was all started before.
        self._lock = threading.RLock()
        # What one gate has sent may be what another one is after.
        self._gate = threading.RLock()

    def add(self, tensor: torch.Tensor, *, counts: bool) -> Entry | None:
        """Start to reduce a tensor whose elements lie side by side, in any order. Hot.

        Args:
            tensor: not empty, not modified, not kept; nobody waits for it.
            counts: whether its exponents are counted too.
        Returns:
            None if the kernels do not take it: another dtype, or they do not work here.
        Raises:
            RuntimeError: there is no memory for the rows, or the device has died.
        """
        launcher = self.launcher
        if not launcher.takes(tensor):
            return None
        device, driver = tensor.device, self._driver
        stream = driver.current(device)
        n = tensor.numel()
        parts, _ = divide(n)
        with self._lock, driver.at(device):
            try:
                lane = self._lane(stream, device)
                page = lane.reserve(parts + 1, 2, driver, launcher)
                launcher.reduce(tensor, lane.parts, lane.used, counts=counts)
                driver.hold(tensor, stream)
            except Exception as error:
                launcher.refuse(tensor.dtype, error)
                return None
            at = page.put(lane.used, parts)
            if counts:
                page.put(lane.used + parts, 1)
            lane.used += parts + counts
        return Entry(page.sheet, at, n, counts)

    def add_numbers(self, values: list[torch.Tensor]) -> list[Number]:
        """Take over tensors of one element, of one device and dtype, in a few launches for all.

        Args:
            values: at most `MOST_NUMBERS`; not modified, not kept.
        Raises:
            RuntimeError: there is no memory for the rows, or a kernel failed.
        """
        device, driver = values[0].device, self._driver
        stream = driver.current(device)
        count = len(values)
        rows = -(-count // ROW)
        with self._lock, driver.at(device):
            lane = self._lane(stream, device)
            page = lane.reserve(rows, rows, driver, self.launcher)
            begin = lane.used * ROW
            lane.parts.view(-1)[begin : begin + count].copy_(
                torch.stack([value.reshape(()) for value in values])
            )
            at = page.used * ROW
            for row in range(lane.used, lane.used + rows):
                page.put(row, 1)
            lane.used += rows
            return [Number(page.sheet, at + i) for i in range(count)]

    def _lane(self, stream: Any, device: torch.device) -> _Lane:
        lane = self._lanes.get(stream)
        if lane is None:
            lane = _Lane(device, self._driver)
            lane.pages[0].prepare(lane.parts, self.launcher)
            self._lanes[stream] = lane
        return lane

    def fetch(self, also: Iterable[Any] = ()) -> None:
        """Bring all numbers over: one copy for each stream and one wait for each device.

        Entries have theirs afterwards, also those of other threads that were made before this.

        Args:
            also: streams that have something else on its way to the host.
        """
        with self._gate:
            self._fetch(also)

    def _fetch(self, also: Iterable[Any]) -> None:
        with self._lock:
            used = [(stream, lane) for stream, lane in self._lanes.items() if lane.pages[0].used]
            # Then nobody may wait, for whichever stream.
            capturing = bool(used) and self._driver.is_capturing()
            sent = [
                (stream, lane, pages)
                for stream, lane in used
                if (pages := self._send(stream, lane, capturing))
            ]
        streams = [*also, *(stream for stream, _, _ in sent)]
        if not streams:
            return
        self._driver.wait(streams)
        with self._lock:
            for _, lane, pages in sent:
                for page in pages:
                    page.take()
                lane.spare = pages[0]

    def _send(self, stream: Any, lane: _Lane, capturing: bool) -> list[_Page]:
        """Put the rows of a stream together and start their way to the host; others may follow."""
        pages = lane.pages
        with self._driver.on(stream):
            try:
                if capturing or self._driver.is_capturing():
                    raise CapturingError
                for page in pages:
                    page.fold(lane.parts, self.launcher)
                    page.send()
                lane.pages = [lane.spare or _Page(lane.parts.device, self._driver)]
            except Exception as error:
                reusable = [page.drop(error) for page in pages]
                if not all(reusable):
                    del self._lanes[stream]  # nothing is written to this memory again
                lane.used = 0
                return []
        lane.spare, lane.used = None, 0
        return pages


class CapturingError(Exception):
    """A kernel or a copy to the host would break the CUDA graph that is being captured."""


def _finish(numbers: list[float], n: int) -> Row:
    """Finish on the host what the kernels began.

    Of the sums of squares around the first element and around zero the smaller one has lost fewer
    digits to the mean.
    """
    nan, posinf, neginf, zeros = map(int, numbers[:4])
    count = n - nan - posinf - neginf
    if not count:
        return nan, posinf, neginf, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
    low, high, total, squares, whole, _, shift, scale = numbers[4:12]
    distance = total / count
    mean = shift + distance
    if low == high:
        mean, scatter = low / scale, 0.0
    elif squares <= whole:
        scatter = squares - count * distance * distance
    else:
        scatter = whole - count * mean * mean
    std = math.sqrt(scatter / count) * scale if scatter > 0 else 0.0
    norm = math.sqrt(whole) * scale
    return nan, posinf, neginf, zeros, count, low, high, mean * scale, std, norm
