"""Reductions of plain tensors: few passes on the host, no branch and no sync elsewhere.

A hot path. Three ways to the same numbers, as measured on one core: NumPy over the memory itself
for small CPU tensors (half the fixed cost of torch operators), few torch reductions per block for
larger ones, branch-free kernels on other devices.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tensortrace.capture.unwrap import HAS_DOUBLE, extent

__all__ = [
    "BOUNDS", "FULL", "LEAN", "NUMPY", "SMALL", "SNAPSHOT", "Kernels", "Row", "as_array",
    "block_rows", "device_row", "first_bad", "host_row", "lean_device_row", "lean_of", "memory_at",
    "small_row",
]  # fmt: skip

# What a kernel returns for one block of elements: nan, posinf, neginf, zeros, how many are finite,
# then min, max, mean, std, norm of those.
Row = tuple[int, int, int, int, int, float, float, float, float, float]

# Below this NumPy on the memory wins; and OpenBLAS starts threads for a dot of more than 10,000.
SMALL = 8192
# Tensors on a device of so few elements are copied as they are and reduced on the host.
SNAPSHOT = 2048
# So short that f32 keeps seven digits, and six.
_ROW, _LEAN_ROW = 1024, 4096
_LEAN_PARTS = 6
_NAN = math.nan
_DOUBLE = np.dtype(np.float64)
_ONES = np.ones(SMALL)

NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16,
    torch.bfloat16: np.uint16, torch.bool: np.bool_, torch.uint8: np.uint8, torch.int8: np.int8,
    torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64, torch.uint16: np.uint16,
    torch.uint32: np.uint32, torch.uint64: np.uint64,
}  # fmt: skip

_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype = ctypes.py_object
_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_READ = 0x100  # PyBUF_READ


def memory_at(address: int, nbytes: int) -> memoryview:
    """See memory without owning it: whoever does must outlive what is made of this."""
    found: memoryview = _memory(address, nbytes, _READ)
    return found


def as_array(tensor: torch.Tensor) -> Any:
    """See the memory of a strided tensor as a flat array, a copy only if it is not contiguous.

    Not ``tensor.numpy()``: that makes the storage of the user's tensor unresizable for good.
    """
    kind = NUMPY[tensor.dtype]
    item = tensor.element_size()
    if tensor.is_contiguous():
        memory = memory_at(tensor.data_ptr(), tensor.numel() * item)
        flat = np.frombuffer(memory, kind)
    else:
        shape, strides = tensor.shape, tensor.stride()
        memory = memory_at(tensor.data_ptr(), extent(shape, strides) * item)
        flat = np.ndarray(shape, kind, memory, 0, [s * item for s in strides]).ravel()
    if tensor.dtype is torch.bfloat16:
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(_DOUBLE) if kind is np.float16 else flat


def small_row(x: Any) -> Row:
    """Reduce a flat array of at most `SMALL` numbers of any NumPy dtype, accumulated in f64."""
    low, high = float(x[x.argmin()]), float(x[x.argmax()])
    largest = high if high > -low else -low
    # False as well if there is a NaN, which argmin and argmax both find. Casting a signalling NaN
    # would warn, so nothing is cast before.
    if not 1e-140 < largest < 1e140 and not (low == 0 and high == 0):
        return _small_row_slow(x)
    n = len(x)
    y = x if x.dtype is _DOUBLE else x.astype(_DOUBLE)
    zeros = 0
    if low <= 0 <= high:
        # count_nonzero of doubles is slow by the element, comparing has the higher fixed cost.
        zeros = int(np.count_nonzero(y == 0)) if n > 1000 else n - int(np.count_nonzero(y))
    ones = _ONES[:n]
    mean = float(y.dot(ones)) / n
    squares = float(y.dot(y))
    if not squares < math.inf:  # another thread writes to it while we read
        return _small_row_slow(x)
    scatter = squares - n * mean * mean
    if scatter < 1e-7 * squares:
        y = y - mean
        scatter = float(y.dot(y)) - float(y.dot(ones)) ** 2 / n
    std = math.sqrt(scatter / n) if scatter > 0 else 0.0
    return 0, 0, 0, zeros, n, low, high, mean, std, math.sqrt(squares)


def first_bad(x: Any) -> int:
    """The index of the first element of a flat array that is not finite; there is one."""
    return int(np.isfinite(x).argmin())


def _small_row_slow(x: Any) -> Row:
    """The same with NaN, infinities, or doubles whose square is out of range."""
    with np.errstate(all="ignore"):
        y = x.astype(_DOUBLE)
        finite = y[np.isfinite(y)]
        count = len(finite)
        nan = posinf = neginf = 0
        if count < len(y):
            nan = int(np.count_nonzero(np.isnan(y)))
            posinf = int(np.count_nonzero(y == math.inf))
            neginf = len(y) - count - nan - posinf
        if not count:
            return nan, posinf, neginf, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
        low, high = float(finite.min()), float(finite.max())
        scale = max(-low, high) or 1.0
        zeros = int(np.count_nonzero(finite == 0))
        *_, mean, std, norm = small_row(finite / scale)
    return nan, posinf, neginf, zeros, count, low, high, mean * scale, std * scale, norm * scale


class _Scratch(threading.local):
    """Memory to square a block in, kept: fresh pages for each would cost twice the squaring."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._flags = np.empty(0, np.bool_)

    def zeros_in(self, x: Any) -> int:
        """Count the zeros of a flat array; 4 times faster than torch.count_nonzero (1e5 f32)."""
        if len(self._flags) < len(x):
            self._flags = np.empty(len(x), np.bool_)
        return int(np.count_nonzero(np.equal(x, 0, out=self._flags[: len(x)])))

    def like(self, block: torch.Tensor) -> torch.Tensor:
        """A buffer with the shape and dtype of a flat block."""
        buffer = self._buffers.get(block.dtype)
        if buffer is None or len(buffer) < len(block):
            # An inference tensor could not be written to outside of inference mode.
            with torch.inference_mode(False):
                buffer = self._buffers[block.dtype] = torch.empty(len(block), dtype=block.dtype)
        return buffer.narrow(0, 0, len(block))


_scratch = _Scratch()


def block_rows(block: torch.Tensor) -> list[Row]:
    """Reduce a flat f32 or f64 CPU tensor with as few passes as possible while all is ordinary."""
    n = block.numel()
    bounds = torch.aminmax(block)
    low, high = bounds.min.item(), bounds.max.item()
    largest = high if high > -low else -low
    # Squares must neither overflow nor vanish, in f32 that is. With a NaN both bounds are NaN.
    if n <= SMALL or not 1e-12 < largest < 1e15:
        return _block_rows_slow(block)
    x = as_array(block)
    zeros = _scratch.zeros_in(x) if low <= 0 <= high else 0
    mean = torch.sum(block).item() / n
    squares = _sum_of_squares(x, _ROW)
    if not squares < math.inf:  # another thread writes to it while we read
        return _block_rows_slow(block)
    scatter = squares - n * mean * mean
    if scatter < 0.05 * squares:
        centred = torch.sub(block, mean, out=_scratch.like(block))
        shift = centred.sum().item()
        scatter = centred.square_().sum().item() - shift * shift / n
    std = math.sqrt(scatter / n) if scatter > 0 else 0.0
    return [(0, 0, 0, zeros, n, low, high, mean, std, math.sqrt(squares))]


def _sum_of_squares(x: Any, row: int) -> float:
    """Read a flat array once: a BLAS dot for each so many elements, whose results are doubles.

    Not one dot or vector_norm of all, which is off by 1e-4 for 1e6 equal f32; `torch.mul` and its
    sum are three passes (0.30 ns an element where this takes 0.19, in blocks of 2 MB).
    """
    whole = len(x) - len(x) % row
    parts = x[:whole].reshape(-1, row)
    with np.errstate(all="ignore"):
        squares = float(np.matmul(parts[:, None, :], parts[:, :, None]).sum(dtype=_DOUBLE))
        return squares + float(x[whole:].dot(x[whole:]))


def _lean_rows(block: torch.Tensor) -> list[Row]:
    """Counts and norm in two reads; the sum of squares is finite only if every element is.

    Min, max, mean and std are NaN, unless there is something to count: then all is exact.
    """
    x = as_array(block)
    squares = _sum_of_squares(x, _LEAN_ROW)
    # With squares that overflow or vanish the norm would be wrong.
    if not len(x) * 1e-24 < squares < math.inf:
        return block_rows(block)
    zeros = _scratch.zeros_in(x)
    return [(0, 0, 0, zeros, len(x), _NAN, _NAN, _NAN, _NAN, math.sqrt(squares))]


def _block_rows_slow(block: torch.Tensor) -> list[Row]:
    x = as_array(block)
    return [small_row(x[start : start + SMALL]) for start in range(0, len(x), SMALL)]


def _small_bounds(x: Any) -> Row:
    low, high = float(x[x.argmin()]), float(x[x.argmax()])
    if -math.inf < low and high < math.inf:
        return 0, 0, 0, 0, len(x), low, high, 0.0, 0.0, 0.0
    return _small_row_slow(x)


def _block_bounds(block: torch.Tensor) -> list[Row]:
    bounds = torch.aminmax(block)
    low, high = bounds.min.item(), bounds.max.item()
    if -math.inf < low and high < math.inf:
        return [(0, 0, 0, 0, block.numel(), low, high, 0.0, 0.0, 0.0)]
    return block_rows(block)


Kernels = tuple[Callable[[Any], Row], Callable[[torch.Tensor], list[Row]]]
FULL: Kernels = (small_row, block_rows)
LEAN: Kernels = (small_row, _lean_rows)
BOUNDS: Kernels = (_small_bounds, _block_bounds)


def device_row(block: torch.Tensor) -> torch.Tensor:
    """Reduce a flat f32 or f64 tensor without a branch on its values, so without a sync.

    What comes back is for `host_row`: of few elements it is a copy of them, one kernel instead of
    twenty. Where nothing wider is there to sum in, the numbers are scaled by the largest first, so
    that no square overflows or vanishes.
    """
    wide = torch.float64 if block.device.type in HAS_DOUBLE else torch.float32
    if block.numel() <= SNAPSHOT:
        return block.to(wide, copy=True)
    counts = _device_counts(block, wide)
    low = block.nan_to_num(math.inf, math.inf, math.inf).amin()
    high = block.nan_to_num(-math.inf, -math.inf, -math.inf).amax()
    values, scale = _scaled(block, wide)
    norm = torch.linalg.vector_norm(values, dtype=wide)
    total = values.sum(dtype=wide)
    # Of no finite elements NaN, of which the host takes no notice then.
    shift = (total / (block.numel() - counts[:3].sum())).to(block.dtype)
    spread = torch.linalg.vector_norm(values.sub_(shift), dtype=wide)
    ends = torch.stack([low, high, shift]).to(wide)
    return torch.cat([counts, ends, *(part.view(1) for part in (norm, total, spread, *scale))])


def lean_device_row(block: torch.Tensor) -> torch.Tensor:
    """Counts and norm alone, in half the kernels of `device_row`; `host_row` takes this as well."""
    wide = torch.float64 if block.device.type in HAS_DOUBLE else torch.float32
    if block.numel() <= SNAPSHOT:
        return block.to(wide, copy=True)
    counts = _device_counts(block, wide)
    values, scale = _scaled(block, wide)
    norm = torch.linalg.vector_norm(values, dtype=wide)
    return torch.cat([counts, norm.view(1), *(part.view(1) for part in scale)])


def _device_counts(block: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """NaN, infinities and zeros: six kernels, where summing each by itself would take eight."""
    found = [block.isnan(), block == math.inf, block == -math.inf, block == 0]
    return torch.stack(found).sum(1, dtype=wide)


def _scaled(block: torch.Tensor, wide: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The finite elements (zeros for others), and the scale they had to be divided by, if any."""
    values = block.nan_to_num(0.0, 0.0, 0.0)
    if block.dtype is not wide:
        return values, []
    largest = torch.maximum(values.amax(), -values.amin())
    scale = largest.where(largest > 0, 1.0)
    return values.div_(scale), [scale]


def lean_of(row: Row) -> Row:
    """The same row with counts and norm alone."""
    return *row[:5], _NAN, _NAN, _NAN, _NAN, row[9]


def host_row(numbers: Any, n: int) -> Row:
    """Finish on the host what `device_row` began: the same row as from the other kernels.

    The elements that are not finite were taken as zeros, so each left ``shift ** 2`` in `spread`.
    """
    if n <= SNAPSHOT:
        return small_row(numbers)
    nan, posinf, neginf, zeros = map(int, numbers[:4])
    count = n - nan - posinf - neginf
    if len(numbers) <= _LEAN_PARTS:
        norm, scale = [*numbers[4:].tolist(), 1.0][:2]
        return nan, posinf, neginf, zeros, count, *[_NAN] * 4, norm * scale
    low, high, shift, norm, total, spread, scale = [*numbers[4:].tolist(), 1.0][:7]
    if not count:
        return nan, posinf, neginf, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
    mean = total / count
    scatter = spread * spread - (n - count) * shift * shift - count * (mean - shift) ** 2
    if not math.isfinite(scatter):
        # The distance of two f32 from opposite ends of their range is too large for f32.
        scatter = norm * norm - count * mean * mean
    std = math.sqrt(scatter / count) if scatter > 0 else 0.0
    mean, std, norm = mean * scale, std * scale, norm * scale
    return nan, posinf, neginf, zeros, count, low, high, mean, std, norm
