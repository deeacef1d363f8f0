"""Small CPU tensors, copied side by side and reduced together.

A hot path. A small tensor costs its fixed costs: reduced one by one 12 us each, of which the
elements are 1 us (measured, 1024 f32, warm; three times that between a program's own work). A copy
takes 1 us, and reducing many rows of one buffer another 1 us each.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, TypeAlias

import numpy as np

from tensortrace.capture.stats.kernels import first_bad, memory_at, small_row

__all__ = ["Fields", "Gaps", "Gathered", "Ticket"]

# What a `Stats` is made of.
Fields: TypeAlias = tuple[Any, ...]
# The list that has the statistics once its queue is resolved, and where in it.
Ticket: TypeAlias = tuple[list[Any], int]
# Shape and strides of elements that are not contiguous, and how many there would be without gaps.
Gaps: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]

# 256 kB of f32 and twice that of f64: what all passes over a full buffer find in cache.
ROOM = 1 << 16
_ITEM = 4
_copy = ctypes.memmove


class Gathered:
    """Flat f32 tensors in one buffer, until `take` reduces them all."""

    __slots__ = ("_address", "_buffer", "_squares", "_used", "_wide", "starts", "tickets")

    def __init__(self) -> None:
        self._buffer: Any = None
        self._address = self._used = 0
        self.starts: list[int] = []
        self.tickets: list[Ticket] = []

    def fits(self, n: int) -> bool:
        """Whether there is room for so many elements."""
        return self._used + n <= ROOM

    def put(self, address: int, n: int, ticket: Ticket, gaps: Gaps | None) -> None:
        """Copy `n` f32 from an address; `fits` was asked. Hot.

        Args:
            address: of the first element.
            n: at least one.
            ticket: given back with what they come to.
            gaps: how they lie if they are not contiguous.
        """
        if self._buffer is None:
            self._buffer = np.empty(ROOM, np.float32)
            self._wide, self._squares = np.empty(ROOM), np.empty(ROOM)
            self._address = self._buffer.ctypes.data
        used = self._used
        if gaps is None:
            _copy(self._address + _ITEM * used, address, _ITEM * n)
        else:
            shape, strides, end = gaps
            memory = memory_at(address, _ITEM * end)
            steps = [_ITEM * stride for stride in strides]
            view = np.ndarray(shape, np.float32, memory, 0, steps)
            self._buffer[used : used + n].reshape(shape)[...] = view
        self.starts.append(used)
        self.tickets.append(ticket)
        self._used = used + n

    def take(self) -> list[tuple[Ticket, Fields]]:
        """Reduce what was put: ticket, and the fields of its `Stats`; empty afterwards."""
        tickets, starts, used = self.tickets, self.starts, self._used
        self.tickets, self.starts, self._used = [], [], 0
        if not tickets:
            return []
        flat = self._buffer[:used]
        # Casting and comparing a signalling NaN warns.
        with np.errstate(all="ignore"):
            return list(zip(tickets, self._fields(flat, starts), strict=True))

    def _fields(self, flat: Any, starts: list[int]) -> list[Fields]:
        at = np.array(starts)
        n = np.diff(at, append=len(flat))
        lows, highs = np.minimum.reduceat(flat, at), np.maximum.reduceat(flat, at)
        wide, squares = self._wide[: len(flat)], self._squares[: len(flat)]
        np.copyto(wide, flat)
        np.multiply(wide, wide, out=squares)
        mean, square = np.add.reduceat(wide, at) / n, np.add.reduceat(squares, at)
        zeros = np.add.reduceat(flat == 0, at, dtype=np.int64)
        scatter = square - n * mean * mean
        std = np.sqrt(np.where((scatter > 0) & (n > 1), scatter / n, 0.0))
        columns = (zeros, lows, highs, mean, std, np.sqrt(square))
        found: list[Fields] = [
            (0, 0, 0, *row, None, None, None)
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ]
        # With a NaN or an infinity both sides are NaN or infinite; of nearly equal elements this
        # difference has no digits left.
        odd = ~(square < math.inf) | ((scatter < 1e-7 * square) & (n > 1))
        for i in np.flatnonzero(odd).tolist():
            found[i] = _fields_of(flat[starts[i] : starts[i] + int(n[i])])
        return found


def _fields_of(x: Any) -> Fields:
    """The fields of the `Stats` of one of them, whatever is in it."""
    nan, posinf, neginf, zeros, count, low, high, mean, std, norm = small_row(x)
    first = None if count == len(x) else first_bad(x)
    if not count:
        return nan, posinf, neginf, 0, None, None, None, None, None, None, first, None
    return nan, posinf, neginf, zeros, low, high, mean, std, norm, None, first, None
