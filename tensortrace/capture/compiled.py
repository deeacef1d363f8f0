"""The compiled kernel, where there is one, and which memory it may be given.

A hot path. The kernel reads addresses, so a wrong one ends the user's process. `place` is the one
way to an address, and it gives none unless all of this holds:

- the type is exactly Tensor or Parameter, so that no method of a subclass answers instead;
- the dispatch keys are those of an ordinary dense CPU tensor: not fake, meta, sparse, quantized,
  nested, functional, inside vmap or grad, conjugate or negative view, zero tensor, another device;
- the elements fill one stretch of memory, in any order of strides;
- the storage is large enough now (FSDP shrinks it to nothing while a parameter is not needed) and
  has an address.

The address is asked for right before it is read and never kept: `resize_`, `set_` and `resize_` of
the storage move memory. Between the two the caller holds the tensor, and with it the storage. What
remains is another thread that resizes this very tensor while it is measured: the reductions of
torch let other threads run as well, and would read freed memory too.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from tensortrace.capture.unwrap import is_dense_cpu

__all__ = ["EXACT", "Place", "is_packed", "item_size", "kernel", "kernel_name", "place"]

# Address, number of elements, code of the dtype.
Place = tuple[int, int, int]

# Bytes of an element, and the code as in the enum of _statistics.c.
_DTYPES = {
    torch.float32: (4, 0), torch.float64: (8, 1), torch.float16: (2, 2), torch.bfloat16: (2, 3),
}  # fmt: skip
_SIZES = {code: item for item, code in _DTYPES.values()}
EXACT = frozenset({torch.Tensor, torch.nn.Parameter})


def _load() -> ModuleType | None:
    if os.environ.get("TENSORTRACE_KERNEL") == "torch":
        return None
    try:
        from tensortrace.capture import _statistics
    except ImportError:  # no C compiler when it was installed
        return None
    return _statistics


kernel = _load()


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


def item_size(place: Place) -> int:
    """The bytes of one element."""
    return _SIZES[place[2]]


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
