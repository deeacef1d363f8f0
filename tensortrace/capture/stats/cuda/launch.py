"""Starts the Triton kernels: how a tensor is divided among programs, and what if Triton fails.

A hot path. Triton comes with the CUDA builds of torch and is no dependency. It is imported when the
first CUDA tensor is measured, and compiles a kernel for each dtype that it meets.
"""

from __future__ import annotations

import importlib
import os
import re
import time
import warnings
from typing import Any

import torch

from tensortrace.capture.stats.exponents import RUN, SAMPLE
from tensortrace.signal_handlers import let_through

__all__ = ["ROW", "Launcher", "divide"]

# The columns of a row, as in kernel.py.
ROW = 16
# Elements that a program takes at a time; of fewer than `_LEAST` times that one program is enough.
# Compiled for sm_90 a thread needs 88 registers and reads 16 bytes at once; 512 programs of 256
# threads have 2 MB on the way. Not measured on a GPU.
_BLOCK = 1024
_LEAST = 4
_PARTS = 512
_WARPS = 8
_LINES = 32
_DEVICE = re.compile(r"CUDA error|HIP error|Triton Error|device-side assert|out of memory")

_KINDS = {
    torch.float32: None, torch.float64: None, torch.float16: None, torch.bfloat16: None,
    torch.int8: None, torch.uint8: None, torch.int16: None, torch.int32: None, torch.int64: None,
    torch.bool: torch.uint8,
}  # fmt: skip
# What an f32 does not hold.
_WIDE = frozenset({torch.float64, torch.int32, torch.int64})


def divide(n: int) -> tuple[int, int]:
    """How many programs share `n` elements, and how many blocks each of them takes."""
    blocks = -(-n // _BLOCK)
    tiles = max(min(_LEAST, blocks), -(-blocks // _PARTS))
    return -(-blocks // tiles), tiles


class Launcher:
    """The kernels of `kernel`, while they work.

    Attributes:
        trouble: why they do not, where that is news: Triton is there and failed.
        prepared: each dtype that a kernel was compiled for, with the ns that took.
    """

    def __init__(self) -> None:
        self._kernels: Any = None
        self._kinds: dict[torch.dtype, torch.dtype | None] | None = None
        self.trouble: str | None = None
        self.prepared: list[tuple[str, int]] = []
        self._met: set[torch.dtype] = set()
        self._compiled: set[tuple[torch.dtype, bool]] = set()

    def works(self) -> bool:
        """Whether there are kernels at all; the first time, Triton is imported. Hot."""
        if self._kinds is None:
            self._kinds = dict(_KINDS) if self._load() else {}
        return bool(self._kinds)

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of this dtype can be reduced here, now. Hot."""
        return self.works() and tensor.dtype in (self._kinds or ())

    def refuse(self, dtype: torch.dtype, error: Exception) -> None:
        """Take no more tensors of a dtype whose kernel failed, none at all if it was the first.

        Raises:
            Exception: the same, where it is no failure of the kernel's.
        """
        let_through(error)
        if dtype in self._met or _is_device(error):
            raise error
        if self._kinds is not None:
            self._kinds.pop(dtype, None)
            if not self._met:
                self._kinds.clear()
        if self.trouble is None:
            self.trouble = f"{type(error).__name__}: {error!s:.300}"

    def reduce(self, tensor: torch.Tensor, rows: torch.Tensor, first: int, *, counts: bool) -> None:
        """Reduce a tensor without gaps into `divide`'s rows from `first` on, on this stream.

        Args:
            tensor: of a dtype that is taken; its device is the current one.
            rows: f64 ``(*, ROW)`` on that device.
            counts: whether one row more has its exponents.
        """
        view = _KINDS[tensor.dtype]
        if view is not None:
            tensor = tensor.view(view)
        # What Triton compiles anew for: it reads four elements at once where they are aligned.
        kind = (tensor.dtype, tensor.data_ptr() % 16 == 0)
        if kind in self._compiled:
            self._reduce(tensor, rows, first, counts)
            return
        started = time.perf_counter_ns()
        with warnings.catch_warnings():
            # What Triton warns of while it compiles is no business of the program's.
            warnings.simplefilter("ignore")
            self._reduce(tensor, rows, first, counts)
        self._compiled.add(kind)
        self._met.add(tensor.dtype)
        name = str(tensor.dtype).removeprefix("torch.")
        self.prepared.append((name, time.perf_counter_ns() - started))

    def _reduce(self, tensor: torch.Tensor, rows: torch.Tensor, first: int, counts: bool) -> None:
        n = tensor.numel()
        parts, tiles = divide(n)
        pitch, sampled = _spacing(n) if counts else (1, 0)
        scaled = tensor.dtype is torch.float64
        kernels = self._kernels
        if scaled:
            kernels.largest[(parts,)](tensor, rows, n, tiles, first, BLOCK=_BLOCK, num_warps=_WARPS)
        kernels.reduce[(parts + counts,)](
            tensor, rows, n, tiles, first, parts, pitch, sampled,
            WIDE=tensor.dtype in _WIDE, SCALED=scaled, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip

    def combine(
        self, rows: torch.Tensor, table: torch.Tensor, out: torch.Tensor, since: int, count: int
    ) -> None:
        """Put the rows of some tensors together.

        Args:
            rows: as `reduce` has filled it.
            table: int32 ``(tensors, 2)``: the first row of each, and how many.
            out: f64 ``(tensors, ROW)``, written.
            since: the first of the tensors; `count` how many.
        """
        self._kernels.combine[(count,)](rows, table, out, since, BLOCK=_LINES)

    def _load(self) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._kernels = importlib.import_module("tensortrace.capture.stats.cuda.kernel")
        except ImportError:
            return False  # no CUDA build, or Windows: nothing that could be mended here
        except Exception as error:
            let_through(error)
            self.trouble = f"{type(error).__name__}: {error!s:.300}"
            return False
        # Its interpreter copies all that a kernel is given to the host, and back.
        return os.environ.get("TRITON_INTERPRET", "0") in ("", "0")


def _is_device(error: Exception) -> bool:
    """Whether an error is of the device: it has no memory, or an earlier kernel has broken it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_DEVICE.search(str(error)))


def _spacing(n: int) -> tuple[int, int]:
    """Where a sample lies, as exponents.py says: how far runs are apart, elements in all."""
    stride = -(-n // SAMPLE)
    if stride <= 1:
        return RUN, n
    pitch = RUN * (stride | 1)
    runs = n // pitch
    return (pitch, runs * RUN) if runs else (RUN, SAMPLE)
