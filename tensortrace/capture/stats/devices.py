"""Statistics of tensors that are not in host memory: begun now, fetched at the gate.

Of CUDA tensors by one kernel each, where Triton is; of others, and without it, by operators of
torch that have no branch on a value, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tensortrace.capture.compiled import is_packed
from tensortrace.capture.stats.cuda.rows import MOST_NUMBERS, CapturingError, Reducer
from tensortrace.capture.stats.exponents import HALF, LEAST, count_exponents
from tensortrace.capture.stats.kernels import Row, device_row, host_row, lean_device_row, lean_of
from tensortrace.capture.unwrap import blocks, plain
from tensortrace.records import BUCKETS

__all__ = ["CapturingError", "Devices", "OnDevice", "first_bad_of"]


class OnDevice:
    """The numbers of one tensor, on their device until they were fetched.

    Attributes:
        times: how often an expanded tensor repeats what was measured.
        error: why there are none, else `rows`, `first_bad` and `exponents`; once fetched.
    """

    __slots__ = (
        "by_kernel", "counts", "device", "error", "exponents", "first", "first_bad", "lengths",
        "light", "pieces", "rows", "stream", "times",
    )  # fmt: skip

    def __init__(self, found: torch.Tensor, times: int, light: bool) -> None:
        self.device, self.times, self.light = found.device, times, light
        self.by_kernel = False
        # For each piece of the tensor an `Entry` of the kernels, or a row of torch's, and its
        # elements; `first` and `counts` are the same kinds of thing.
        self.pieces: list[Any] = []
        self.lengths: list[int] = []
        self.first: Any = None
        self.counts: torch.Tensor | None = None
        self.stream: Any = None
        self.error: Exception | None = None
        self.rows: list[Row] = []
        self.first_bad: int | None = None
        self.exponents: tuple[int, ...] | None = None


class Devices:
    """Begins statistics on devices and fetches them together.

    Args:
        reducer: the kernels for CUDA.
        served: the device types whose tensors they can read.
    """

    def __init__(self, reducer: Reducer | None = None, served: tuple[str, ...] = ("cuda",)) -> None:
        self.reducer = reducer or Reducer()
        self._served = served

    def measure(
        self,
        tensor: torch.Tensor,
        found: torch.Tensor,
        times: int,
        *,
        light: bool,
        counts: bool,
        locates: bool,
        limit: int,
    ) -> OnDevice:
        """Begin to measure a tensor; call it inside `quiet`. Hot.

        Args:
            tensor: what is described; `found` what of it is measured, `times` how often.
            light: whether only counts and norm are wanted.
            counts: whether exponents are counted.
            locates: whether it is worth three kernels to know where the first bad element is, in
                tensors that are not contiguous or not read by the kernels.
            limit: how many elements are copied, or reduced by torch, at once.
        """
        counts = counts and found.is_floating_point() and found.numel() >= LEAST
        result = OnDevice(found, times, light)
        whole = found is tensor and tensor.is_contiguous()
        kernels = found.device.type in self._served and self.reducer.launcher.works()
        if kernels and self._by_kernel(result, found, counts, limit):
            if whole and times == len(result.pieces) == 1:
                result.first = result.pieces[0].first_bad
            elif locates and (first := first_bad_of(tensor)) is not None:
                entry = self.reducer.add(first, counts=False)
                result.first = entry.number if entry is not None else None
            return result
        reduce = lean_device_row if light else device_row
        for block in blocks(found, limit):
            result.pieces.append(reduce(block))
            result.lengths.append(block.numel())
        if found.is_cuda:
            result.stream = torch.cuda.current_stream(found.device)
        if counts and found is tensor and tensor.dtype in HALF:
            result.counts = _counts_of(tensor)
        if locates:
            result.first = first_bad_of(tensor)
        return result

    def numbers(self, values: list[torch.Tensor]) -> list[OnDevice] | None:
        """Begin to fetch several tensors of one element together; call it inside `quiet`.

        Returns:
            None if they are not alike, or not where the kernels are: each is measured by itself.
        """
        first = values[0]
        device, dtype = first.device, first.dtype
        if device.type not in self._served or len(values) > MOST_NUMBERS:
            return None
        for value in values:
            alike = value.device == device and value.dtype is dtype and value.numel() == 1
            if not alike or dtype.is_complex or plain(value) is not value:
                return None
        if not self.reducer.launcher.works():
            return None
        found = []
        for number in self.reducer.add_numbers(values):
            result = OnDevice(first, 1, False)
            result.by_kernel, result.pieces, result.lengths = True, [number], [1]
            found.append(result)
        return found

    def _by_kernel(self, result: OnDevice, found: torch.Tensor, counts: bool, limit: int) -> bool:
        """Start the kernels, if they take it; what has gaps or another dtype is copied for them."""
        pieces: Iterable[torch.Tensor] = [found]
        if not is_packed(found) or found.is_neg() or not self.reducer.launcher.takes(found):
            pieces, counts = blocks(found, limit), False
        entries, lengths = [], []
        for piece in pieces:
            entry = self.reducer.add(piece, counts=counts)
            if entry is None:
                return False
            entries.append(entry)
            lengths.append(piece.numel())
        result.by_kernel, result.pieces, result.lengths = True, entries, lengths
        return True

    def fetch(self, pending: Iterable[OnDevice]) -> None:
        """Bring the numbers over: one copy and one wait for each device; call it inside `quiet`."""
        by_device: dict[torch.device, list[OnDevice]] = {}
        by_kernel = []
        for each in pending:
            if each.by_kernel:
                by_kernel.append(each)
            else:
                by_device.setdefault(each.device, []).append(each)
        sent = []
        for device, group in by_device.items():
            try:
                sent.append((group, _send(device, group)))
            except Exception as error:
                _fail(group, error)
        streams = [torch.cuda.current_stream(d) for d in by_device if d.type == "cuda"]
        try:
            self.reducer.fetch(streams)
        except Exception as error:  # the device is dead
            _fail(pending, error)
            return
        for group, numbers in sent:
            try:
                _take_rows(group, numbers.numpy())
            except Exception as error:
                _fail(group, error)
        for each in by_kernel:
            try:
                _take_entries(each)
            except Exception as error:
                each.error = error


def _fail(group: Iterable[OnDevice], error: Exception) -> None:
    for each in group:
        each.error = error


def first_bad_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Where the first NaN or infinity is, still on its device; None for a dtype that cannot say."""
    try:
        return torch.isfinite(tensor).reshape(-1).to(torch.uint8).argmin()
    except RuntimeError:
        return None


def _counts_of(tensor: torch.Tensor) -> torch.Tensor | None:
    try:
        return count_exponents(tensor)
    except (RuntimeError, NotImplementedError):
        return None  # nested, or a device without such kernels


def _send(device: torch.device, group: list[OnDevice]) -> torch.Tensor:
    """Put the rows of all tensors of one device into one tensor, and send it to the host.

    From CUDA it is still on its way, on the current stream.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise CapturingError
        here = torch.cuda.current_stream(device)
        for stream in {each.stream for each in group}:
            here.wait_stream(stream)
    pieces = [row for each in group for row in each.pieces]
    # Of at most `SAMPLE` elements: any dtype of rows holds such counts.
    wide = pieces[0].dtype
    pieces += [each.counts.to(wide) for each in group if each.counts is not None]
    numbers = torch.cat(pieces)
    if device.type != "cuda":
        return numbers.cpu()
    host = torch.empty(numbers.shape, dtype=wide, device="cpu", pin_memory=True)
    return host.copy_(numbers, non_blocking=True)


def _take_rows(group: list[OnDevice], numbers: Any) -> None:
    """Cut what `_send` has sent into the rows of each tensor."""
    end = 0
    for each in group:
        for piece, length in zip(each.pieces, each.lengths, strict=True):
            start, end = end, end + len(piece)
            each.rows.append(host_row(numbers[start:end], length))
        if each.first is not None and _is_bad(each.rows):
            each.first_bad = int(each.first)
    for each in group:
        if each.counts is not None:
            start, end = end, end + BUCKETS
            each.exponents = tuple(map(int, numbers[start:end]))


def _take_entries(each: OnDevice) -> None:
    each.rows = [entry.row() for entry in each.pieces]
    if each.light:
        each.rows = [lean_of(row) for row in each.rows]
    each.exponents = each.pieces[0].exponents()
    if each.first is not None and _is_bad(each.rows):
        each.first_bad = each.first()


def _is_bad(rows: list[Row]) -> bool:
    return any(row[0] or row[1] or row[2] for row in rows)
