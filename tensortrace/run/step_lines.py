"""The line that closes a step: where it is, and many of them read at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tensortrace.log import MAX_LINE, LogFile

# Bytes that are read for one step line, and for step lines that are close together.
ONE, MANY = 1 << 13, 1 << 16
_STEP_LINE = re.compile(rb'\n\{"kind": ?"step",')


def read_lines(
    file: LogFile, places: Sequence[tuple[int, int]], stop: int
) -> Iterator[tuple[int, bytes]]:
    """Read lines that begin at ``(step, offset)``, in order, before `stop`; as ``(step, line)``."""
    afters = [offset for _, offset in places[1:]] + [stop]
    low, data = 0, b""
    for (number, offset), after in zip(places, afters, strict=False):
        end = data.find(b"\n", offset - low) if low <= offset < low + len(data) else -1
        if end < 0:
            # Thinned steps are little else than their step lines: many are read at once.
            low, data = offset, file.read(offset, MANY if after - offset < MANY else ONE)
            end = data.find(b"\n")
        yield number, data[offset - low : end] if end >= 0 else line_at(file, offset, stop)


def line_at(file: LogFile, offset: int, stop: int) -> bytes:
    """Read a line of any length; empty if it does not end before `stop`."""
    length = 1 << 14
    while True:
        data = file.read(offset, min(length, stop - offset))
        end = data.find(b"\n")
        if end >= 0:
            return data[:end]
        if len(data) < length or length >= MAX_LINE:
            return b""
        length *= 8


def last_before(file: LogFile, stop: int, start: int) -> int | None:
    """Find the last step line in a range, looking backwards."""
    high = stop
    while high > start:
        low = max(start, high - (1 << 16))
        data = file.read(low, min(high + 20, stop) - low)
        found = [match.start() for match in _STEP_LINE.finditer(data)]
        if found:
            return low + found[-1] + 1
        high = low
    return start if _STEP_LINE.match(b"\n" + file.read(start, 20)) else None
