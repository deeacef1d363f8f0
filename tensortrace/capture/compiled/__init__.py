"""The compiled kernel, where there is one, and which memory it may be given.

A hot path. The kernel reads addresses, so a wrong one ends the user's process. `place` and
`rows_place` are the ways to an address, and give none unless all of this holds:

- the type is exactly Tensor or Parameter, so that no method of a subclass answers instead;
- the dispatch keys are those of an ordinary dense CPU tensor: not fake, meta, sparse, quantized,
  nested, functional, inside vmap or grad, conjugate or negative view, zero tensor, another device;
- the elements fill one stretch of memory, in any order of strides, or (`rows_place`) rows of equal
  length at equal distances;
- the storage is large enough now (FSDP shrinks it to nothing while a parameter is not needed) and
  has an address.

The address is asked for right before it is read and never kept: `resize_`, `set_` and `resize_` of
the storage move memory. Between the two the caller holds the tensor, and with it the storage. What
remains is another thread that resizes this very tensor while it is measured: the reductions of
torch let other threads run as well, and would read freed memory too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from tensortrace.capture.unwrap import is_dense_cpu

__all__ = [
    "EXACT", "Place", "RowsPlace", "base_of", "is_packed", "kernel", "kernel_name",
    "place", "prepare", "rows_place", "turns", "untracked",
]  # fmt: skip

# Address, number of elements, code of the dtype.
Place = tuple[int, int, int]
# Address, elements of a row, code of the dtype, rows, elements between their beginnings.
RowsPlace = tuple[int, int, int, int, int]

# Bytes of an element, and the code as in the enum of _statistics.c.
_DTYPES = {
    torch.float32: (4, 0), torch.float64: (8, 1), torch.float16: (2, 2), torch.bfloat16: (2, 3),
}  # fmt: skip
EXACT = frozenset({torch.Tensor, torch.nn.Parameter})
# What _turns.c is told and has members for.
_FORM = 2


def _load() -> ModuleType | None:
    if os.environ.get("TENSORTRACE_KERNEL") == "torch":
        return None
    try:
        from tensortrace.capture.compiled import _statistics
    except ImportError:  # no C compiler when it was installed
        return None
    # One that was built in place from other sources is as good as none. Its newest function.
    return _statistics if hasattr(_statistics, "spread") else None


def _load_turns() -> ModuleType | None:
    try:
        from tensortrace.capture.compiled import _turns
    except ImportError:
        return None
    # As above; the number is raised with what the two tell each other.
    return _turns if getattr(_turns, "FORM", None) == _FORM else None


kernel = _load()
# What is done at ops and lines that are passed over, which asks the kernel for more.
turns = _load_turns() if kernel is not None else None


_Plain = TypeVar("_Plain", "list[Any]", "dict[str, Any]")


def _as_it_is(plain: _Plain) -> _Plain:
    return plain


# Takes a list or dict of ours, in which nothing can lead back to it, from what the garbage
# collector looks at. A step at op level makes thousands of them, and those that outlive two
# collections bring the next look at all objects nearer: at torch's that takes 0.1 s.
untracked: Callable[[_Plain], _Plain] = kernel.untracked if kernel is not None else _as_it_is


def base_of(name: str, slots: tuple[str, ...]) -> Any:
    """The base of a class whose attributes are asked for at every op or line.

    A class of it writes its other slots as ``tuple(names)``: of names that it can read mypy thinks
    that they are all.

    Args:
        name: of the class.
        slots: those attributes; compiled they are the members of a C struct.
    """
    return getattr(turns, name) if turns is not None else type(name, (), {"__slots__": slots})


def prepare(*, small: int, least: int, sample: int, run: int) -> None:
    """Tell the kernel's own way to an address, `look`, what `place` would ask.

    Args:
        small: most elements of a tensor that a thin step measures in full.
        least: fewest elements whose exponents are counted, in `sample` of them in runs of `run`.
    """
    if kernel is not None:
        dtypes = {dtype: (code, str(dtype)[6:]) for dtype, (_, code) in _DTYPES.items()}
        kernel.prepare(torch.Tensor, torch.nn.Parameter, dtypes, small, least, sample, run)


def kernel_name() -> str:
    """Which kernel measures dense CPU tensors: "compiled" or "torch"."""
    return "torch" if kernel is None else "compiled"


def place(tensor: torch.Tensor) -> Place | None:
    """Where the elements of an ordinary dense CPU tensor lie in memory now. Hot.

    Returns:
        None for any other tensor, for an empty one and for a dtype that the kernel does not read.
    """
    if type(tensor) not in EXACT:
        return None
    known = _DTYPES.get(tensor.dtype)
    if known is None or not is_dense_cpu(tensor):
        return None
    n = tensor.numel()
    # Asked here first: a call less for nearly every traced tensor.
    if not n or not (tensor.is_contiguous() or is_packed(tensor)):
        return None
    item, code = known
    # What it is packed into is as long as what it holds.
    if (tensor.storage_offset() + n) * item > tensor.untyped_storage().nbytes():
        return None
    address = tensor.data_ptr()
    return (address, n, code) if address else None


# Shorter rows are read one element at a time: few of them in a microsecond, many at a loss.
_LEAST_COLUMNS = 16
_MOST_SINGLY = 4096


def rows_place(tensor: torch.Tensor) -> RowsPlace | None:
    """Where an ordinary dense CPU tensor lies that has gaps: a step of `x[:, t]`, a chunk. Hot.

    Returns:
        None for any other tensor, and where the gaps are not all between rows of equal length at
        equal distances: overlapping and expanded elements, two dims with gaps.
    """
    if type(tensor) not in EXACT:
        return None
    known = _DTYPES.get(tensor.dtype)
    n = tensor.numel() if known is not None and is_dense_cpu(tensor) else 0
    if known is None or not n:
        return None
    columns, rows, pitch = 1, 1, 0
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length == 1:
            continue
        if not pitch and stride == columns:
            columns *= length
        elif not pitch and stride > columns:
            pitch, rows = stride, length
        elif pitch and stride == pitch * rows:
            rows *= length
        else:
            return None
    if not pitch or (columns < _LEAST_COLUMNS and n > _MOST_SINGLY):
        return None
    item, code = known
    used = tensor.storage_offset() + (rows - 1) * pitch + columns
    if used * item > tensor.untyped_storage().nbytes():
        return None
    address = tensor.data_ptr()
    return (address, columns, code, rows, pitch) if address else None


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether no element overlaps another and there is no gap between them."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride != expected:
                return False
            expected *= n
    return True
