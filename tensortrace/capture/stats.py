"""Tensor -> the numbers that the log keeps.

A hot path: called for every traced tensor. Three ways to the same numbers, as measured on one
core: NumPy over the memory itself for small CPU tensors (half the fixed cost of torch operators),
few torch reductions per block for larger ones, and branch-free kernels without a sync elsewhere.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

from tensortrace.capture.unwrap import is_dense_cpu, plain, quiet

__all__ = ["Level", "Stats", "StatsQueue", "summarize"]

Level = Literal["full", "minmax", "none"]


class Stats(NamedTuple):
    """Counts over all elements; min, max, mean, population std and L2 norm over the finite ones.

    None where no element is finite, or where `unmeasured` says why there are no statistics. The
    norm of doubles saturates at the largest double. At level "minmax" zeros, mean, std and norm
    are not taken.
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


# What a kernel returns for one block of elements, all as floats: nan, posinf, neginf, zeros, how
# many are finite, then min, max, mean, std, norm of those.
_Row = tuple[float, ...]
_EMPTY = Stats()
_OFF = Stats(unmeasured="off")
_HUGE = sys.float_info.max

# Below this NumPy on the memory wins; and OpenBLAS starts threads for a dot of more than 10,000.
_SMALL = 8192
# Larger CPU tensors are read in blocks: a block is still in cache when it is read again.
_BLOCK = 1 << 17
# Elements a device reduces at once: all temporaries of `_device_row` together stay below 64 MB.
_DEVICE_BLOCK = 1 << 20
_ONES = np.ones(_SMALL)

_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16,
    torch.bfloat16: np.uint16, torch.bool: np.bool_, torch.uint8: np.uint8, torch.int8: np.int8,
    torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64, torch.uint16: np.uint16,
    torch.uint32: np.uint32, torch.uint64: np.uint64,
}  # fmt: skip
_WIDE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64, torch.complex128}

_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype = ctypes.py_object
_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_READ = 0x100  # PyBUF_READ


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
        level: "full"; "minmax" leaves out zeros, mean, std and norm; "none" measures nothing.
    """

    __slots__ = ("_level", "_lock", "_results")

    def __init__(self, level: Level = "full") -> None:
        self._level = level
        self._lock = threading.Lock()
        self._results: list[Stats | _OnDevice] = []

    def __len__(self) -> int:
        return len(self._results)

    def add(self, tensor: torch.Tensor) -> int:
        """Reduce a tensor now and hand out a ticket for its numbers; the tensor is not kept.

        Returns:
            The index of its statistics in what `resolve` will return. Never raises: a failure
            becomes the statistics ``unmeasured="error: RuntimeError"``.
        """
        result: Stats | _OnDevice
        if self._level == "none":
            result = _OFF
        else:
            try:
                with torch._C.DisableTorchFunction():
                    result = _measure(tensor)
            except Exception as err:
                result = _failed(err)
            if self._level == "minmax" and isinstance(result, Stats):
                result = _minmax(result)
        with self._lock:
            self._results.append(result)
            return len(self._results) - 1

    def resolve(self) -> list[Stats]:
        """Bring all statistics over, by ticket; the queue is empty afterwards."""
        with self._lock:
            results, self._results = self._results, []
        pending = [result for result in results if isinstance(result, _OnDevice)]
        if pending:
            _fetch(pending)
        out = [result.stats if isinstance(result, _OnDevice) else result for result in results]
        return [_minmax(stats) for stats in out] if pending and self._level == "minmax" else out


class _OnDevice:
    """Rows of one tensor, shape (blocks, 10), on its device; `stats` once they are fetched."""

    __slots__ = ("rows", "stats", "stream", "times")

    def __init__(self, rows: torch.Tensor, times: int) -> None:
        self.rows = rows
        self.times = times
        self.stats = _EMPTY
        self.stream = torch.cuda.current_stream(rows.device) if rows.is_cuda else None


def _minmax(stats: Stats) -> Stats:
    return stats._replace(zeros=0, mean=None, std=None, norm=None)


def _measure(tensor: torch.Tensor) -> Stats | _OnDevice:
    n = tensor.numel() if is_dense_cpu(tensor) else -1
    if 0 < n <= _SMALL and tensor.is_contiguous():
        kind = _NUMPY.get(tensor.dtype)
        end = (tensor.storage_offset() + n) * tensor.element_size()
        if kind is not None and end <= tensor.untyped_storage().nbytes():
            return _stats(_small_row(_array(tensor, n, kind)))
    with quiet():
        found = plain(tensor)
        if isinstance(found, str):
            return Stats(unmeasured=found)
        found, times = _distinct(found)
        if found.numel() == 0:
            return _EMPTY
        if found.device.type == "cpu":
            return _combine([_block_row(block) for block in _blocks(found, _BLOCK)], times)
        return _on_device(found, times)


def _array(tensor: torch.Tensor, n: int, kind: Any) -> Any:
    """See the memory of a contiguous tensor as a flat array, no copy.

    Not ``tensor.numpy()``: that makes the storage of the user's tensor unresizable for good.
    """
    flat = np.frombuffer(_memory(tensor.data_ptr(), n * tensor.element_size(), _READ), kind)
    if tensor.dtype is torch.bfloat16:
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat


def _small_row(x: Any) -> _Row:
    """Reduce a flat array of at most `_SMALL` numbers of any NumPy dtype, accumulated in f64."""
    low, high = float(x[x.argmin()]), float(x[x.argmax()])
    largest = high if high > -low else -low
    # False as well if there is a NaN, which argmin and argmax both find.
    if not 1e-140 < largest < 1e140 and largest != 0:
        return _small_row_slow(x)
    n = len(x)
    y = x if x.dtype == np.float64 else x.astype(np.float64)
    zeros = 0
    if low <= 0 <= high:
        zeros = int(np.count_nonzero(y == 0)) if n > 1000 else n - int(np.count_nonzero(y))
    ones = _ONES[:n]
    mean = y.dot(ones) / n
    squares = y.dot(y)
    scatter = squares - n * mean * mean
    if scatter < 1e-7 * squares:
        y = y - mean
        scatter = y.dot(y) - y.dot(ones) ** 2 / n
    std = math.sqrt(scatter / n) if scatter > 0 else 0.0
    return 0, 0, 0, zeros, n, low, high, float(mean), std, math.sqrt(squares)


def _small_row_slow(x: Any) -> _Row:
    """The same with NaN, infinities, or doubles whose square is out of range."""
    with np.errstate(all="ignore"):
        y = x.astype(np.float64)
        nan = int(np.isnan(y).sum())
        posinf = int((y == math.inf).sum())
        neginf = int((y == -math.inf).sum())
        finite = y[np.isfinite(y)] if nan or posinf or neginf else y
        if not len(finite):
            return nan, posinf, neginf, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
        low, high = float(finite.min()), float(finite.max())
        scale = max(-low, high) or 1.0
        zeros = int((finite == 0).sum())
        *_, mean, std, norm = _small_row(finite / scale)
    count = len(finite)
    return nan, posinf, neginf, zeros, count, low, high, mean * scale, std * scale, norm * scale


def _block_row(block: torch.Tensor) -> _Row:
    """Reduce a flat f32 or f64 CPU tensor with as few passes as possible while all is ordinary."""
    n = block.numel()
    bounds = torch.aminmax(block)
    low, high = bounds.min.item(), bounds.max.item()
    largest = high if high > -low else -low
    # Squares must neither overflow nor vanish; f32 bounds also where the block is f64.
    if not 1e-12 < largest < 1e15:
        return cast(_Row, tuple(_device_row(block).tolist()))
    zeros = 0
    if low <= 0 <= high:
        # 4 times faster than torch.count_nonzero (measured, 1e5 f32).
        zeros = int(np.count_nonzero(_array(block, n, _NUMPY[block.dtype]) == 0))
    mean = torch.sum(block).item() / n
    squares = torch.dot(block, block).item()
    scatter = squares - n * mean * mean
    if scatter < (0.05 if block.dtype is torch.float32 else 1e-7) * squares:
        centred = block - mean
        scatter = torch.dot(centred, centred).item() - torch.sum(centred).item() ** 2 / n
    std = math.sqrt(scatter / n) if scatter > 0 else 0.0
    return 0, 0, 0, zeros, n, low, high, mean, std, math.sqrt(squares)


def _device_row(block: torch.Tensor) -> torch.Tensor:
    """Reduce a flat f32 or f64 tensor without a branch, so without a sync; shape (10,).

    The numbers are scaled by the largest first, so that no square overflows or vanishes.
    """
    wide = torch.float32 if block.device.type == "mps" else torch.float64
    finite = block.isfinite()
    clean = block.nan_to_num(0.0, 0.0, 0.0)
    found = finite.sum()
    nan = block.isnan().sum()
    posinf = (block == math.inf).sum()
    neginf = block.numel() - found - nan - posinf
    zeros = (block == 0).sum()
    low = block.where(finite, math.inf).amin()
    high = block.where(finite, -math.inf).amax()
    scale = torch.maximum(clean.amax(), -clean.amin()).to(wide)
    scale = scale.where(scale > 0, 1.0)
    count = found.to(wide).clamp(min=1)
    scaled = clean.to(wide).div_(scale)
    norm = scaled.square().sum().sqrt_()
    mean = scaled.sum().div_(count)
    centred = scaled.sub_(mean).mul_(finite)
    std = centred.square_().sum().div_(count).sqrt_()
    parts = (nan, posinf, neginf, zeros, found, low, high, mean * scale, std * scale, norm * scale)
    return torch.stack([part.to(wide) for part in parts])


def _on_device(tensor: torch.Tensor, times: int) -> _OnDevice:
    rows = torch.stack([_device_row(block) for block in _blocks(tensor, _DEVICE_BLOCK)])
    return _OnDevice(rows, times)


def _fetch(pending: list[_OnDevice]) -> None:
    """Copy the rows of all tensors to the host, one transfer (and one sync) per device."""
    by_device: dict[torch.device, list[_OnDevice]] = {}
    for each in pending:
        by_device.setdefault(each.rows.device, []).append(each)
    for device, group in by_device.items():
        try:
            with quiet():
                if device.type == "cuda":
                    here = torch.cuda.current_stream(device)
                    for stream in {each.stream for each in group if each.stream is not None}:
                        if stream != here:
                            here.wait_stream(stream)
                rows = torch.cat([each.rows for each in group]).tolist()
        except Exception as err:
            for each in group:
                each.stats = _failed(err)
            continue
        start = 0
        for each in group:
            end = start + len(each.rows)
            each.stats = _combine(rows[start:end], each.times)
            start = end


def _failed(err: Exception) -> Stats:
    if isinstance(err, torch.OutOfMemoryError) or "can't allocate memory" in str(err):
        return Stats(unmeasured="out of memory")
    return Stats(unmeasured=f"error: {type(err).__name__}")


def _distinct(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Take one of each expanded dim: the tensor that is really there, and how many times it is."""
    times = 1
    if 0 in tensor.stride():
        for dim in reversed(range(tensor.ndim)):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                times *= tensor.shape[dim]
                tensor = tensor.select(dim, 0)
    return tensor, times


def _blocks(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Cut a tensor into flat contiguous pieces of f32 or f64, in whatever order is cheapest."""
    if not tensor.is_contiguous():
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        tensor = tensor.permute(order)
    if tensor.is_contiguous():
        for block in torch.split(tensor.view(-1), limit):
            yield _real(block)
    elif tensor.numel() <= limit:
        yield _real(tensor.contiguous().view(-1))
    elif tensor.ndim == 1:
        for block in torch.split(tensor, limit):
            yield _real(block.contiguous())
    else:
        inner = tensor.numel() // tensor.shape[0]
        for part in torch.split(tensor, max(1, limit // inner)):
            yield from _blocks(part if inner <= limit else part[0], limit)


def _real(block: torch.Tensor) -> torch.Tensor:
    dtype = block.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return block.resolve_neg()
    if not dtype.is_complex:
        wide = dtype in _WIDE and block.device.type != "mps"
        return block.to(torch.float64 if wide else torch.float32)
    pairs = torch.view_as_real(block.resolve_conj().resolve_neg())
    if dtype is torch.complex32:
        pairs = pairs.float()
    real, imag = pairs.unbind(-1)
    # The modulus of (nan, inf) is inf by C's hypot; what the user has is a NaN.
    return torch.hypot(real, imag).masked_fill_(real.isnan() | imag.isnan(), math.nan)


def _stats(row: _Row) -> Stats:
    nan, posinf, neginf, zeros, count, low, high, mean, std, norm = row
    if not count:
        return Stats(int(nan), int(posinf), int(neginf))
    return Stats(
        int(nan), int(posinf), int(neginf), int(zeros), low, high, mean, std, min(norm, _HUGE)
    )


def _combine(rows: list[_Row], times: int) -> Stats:
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
    return Stats(
        nan, posinf, neginf, zeros, min(row[5] for row in rows), max(row[6] for row in rows), mean,
        std, min(norm, _HUGE),
    )  # fmt: skip
