"""Small CPU tensors, copied side by side and reduced together.

A hot path. A small tensor costs its fixed costs: reduced one by one 12 us each, of which the
elements are 1 us (measured, 1024 f32, warm; three times that between a program's own work). A copy
takes 1 us, and reducing many rows of one buffer another 1 us each.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from tensortrace.capture.kernels import Row, first_bad, small_row

__all__ = ["Gathered"]

# 256 kB of f32 and twice that of f64: what all passes over a full buffer find in cache.
ROOM = 1 << 16
_copy = ctypes.memmove


class Gathered:
    """Flat f32 tensors in one buffer, until `take` reduces them all."""

    __slots__ = ("_address", "_buffer", "_squares", "_used", "_wide", "starts", "tickets")

    def __init__(self) -> None:
        self._buffer: Any = None
        self._address = self._used = 0
        self.starts: list[int] = []
        self.tickets: list[int] = []

    def fits(self, n: int) -> bool:
        """Whether there is room for so many elements."""
        return self._used + n <= ROOM

    def put(self, address: int, n: int, ticket: int) -> None:
        """Copy `n` contiguous f32 from an address; `fits` was asked. Hot."""
        if self._buffer is None:
            self._buffer = np.empty(ROOM, np.float32)
            self._wide, self._squares = np.empty(ROOM), np.empty(ROOM)
            self._address = self._buffer.ctypes.data
        used = self._used
        _copy(self._address + 4 * used, address, 4 * n)
        self.starts.append(used)
        self.tickets.append(ticket)
        self._used = used + n

    def take(self) -> list[tuple[int, Row, int | None]]:
        """Reduce what was put: ticket, row, first element not finite; empty afterwards."""
        tickets, starts, used = self.tickets, self.starts, self._used
        self.tickets, self.starts, self._used = [], [], 0
        if not tickets:
            return []
        flat = self._buffer[:used]
        # Casting and comparing a signalling NaN warns.
        with np.errstate(all="ignore"):
            rows = self._rows(flat, starts)
        found: list[tuple[int, Row, int | None]] = []
        for i, (ticket, row) in enumerate(zip(tickets, rows, strict=True)):
            # Fewer finite ones than elements.
            end = starts[i + 1] if i + 1 < len(starts) else used
            whole = row[4] == end - starts[i]
            found.append((ticket, row, None if whole else first_bad(flat[starts[i] : end])))
        return found

    def _rows(self, flat: Any, starts: list[int]) -> list[Row]:
        at = np.array(starts)
        lows = np.minimum.reduceat(flat, at).tolist()
        highs = np.maximum.reduceat(flat, at).tolist()
        wide, squares = self._wide[: len(flat)], self._squares[: len(flat)]
        np.copyto(wide, flat)
        np.multiply(wide, wide, out=squares)
        sums = np.add.reduceat(wide, at).tolist()
        norms = np.add.reduceat(squares, at).tolist()
        zeros = np.add.reduceat(flat == 0, at, dtype=np.int64).tolist()
        rows: list[Row] = []
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(flat)], strict=True)):
            n, low, high, square = end - start, lows[i], highs[i], norms[i]
            mean = sums[i] / n
            scatter = square - n * mean * mean
            # With a NaN or an infinity both sides are NaN or infinite; of nearly equal elements
            # this difference has no digits left.
            if not square < math.inf or (scatter < 1e-7 * square and n > 1):
                rows.append(small_row(flat[start:end]))
                continue
            std = math.sqrt(scatter / n) if scatter > 0 and n > 1 else 0.0
            rows.append((0, 0, 0, zeros[i], n, low, high, mean, std, math.sqrt(square)))
        return rows
