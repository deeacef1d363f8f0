"""Finding lines without parsing them, and steps by bisection.

Lines are found by their newline and told apart by the bytes after ``{"kind":"``. A step is found by
bisecting the file, since steps never decrease.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensortrace.log.codec import MAX_LINE, MAX_STEP, Damaged, decode
from tensortrace.log.files import CHUNK, LogFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KINDS = (
    "header", "module", "source", "call", "param", "optimizer", "line", "action", "finding", "step",
    "end",
)  # fmt: skip
OTHER, DAMAGED = len(KINDS), len(KINDS) + 1
_BY_NAME = {kind.encode(): i for i, kind in enumerate(KINDS)}
_AT = len(b'{"kind":"')
# What our own encoder writes, and what it becomes when another program has rewritten the lines.
_STEP = re.compile(rb'\{"kind": ?"[a-z_]{1,40}", ?"step": ?(\d{1,16})[,}]')
_KIND = re.compile(rb'\s*\{\s*"kind"\s*:\s*"([a-z_]{1,40})"')


@dataclass(frozen=True, slots=True)
class Chunk:
    """Complete lines of a piece of the log that starts at byte `start` and ends before `end`.

    `starts` int64 ``(n,)`` absolute; `kinds` uint8 ``(n,)`` index into `KINDS`, or OTHER, or
    DAMAGED; `data` holds the bytes (empty for one line too long to hold).
    """

    start: int
    end: int
    starts: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    data: bytes

    def line(self, i: int) -> bytes:
        """The bytes of line `i`, without newline."""
        low = int(self.starts[i]) - self.start
        high = int(self.starts[i + 1]) - self.start if i + 1 < len(self.starts) else len(self.data)
        return self.data[low : max(low, high - 1)]


def scan_chunk(file: LogFile, start: int, stop: int, length: int = CHUNK) -> Chunk | None:
    """Find the lines that begin at `start`, about `length` bytes of them; None if there is none.

    Args:
        file: what to read.
        start: where a line begins.
        stop: where the last complete line ends.
        length: grows by itself to hold at least one line.
    """
    import numpy as np

    while start < stop:
        data = file.read(start, min(length, stop - start))
        cut = data.rfind(b"\n") + 1
        if cut:
            return _classify(start, data[:cut])
        if len(data) < min(length, stop - start):
            return None  # truncated under our hands
        if length >= MAX_LINE:
            break
        length = min(length * 8, MAX_LINE)
    position = start + length
    while position < stop:
        data = file.read(position, CHUNK)
        if not data:
            return None
        at = data.find(b"\n")
        if at >= 0:
            one = np.array([start], np.int64)
            return Chunk(start, position + at + 1, one, np.array([DAMAGED], np.uint8), b"")
        position += len(data)
    return None


def _classify(start: int, data: bytes) -> Chunk:
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw == 10)
    begins = np.empty_like(ends)
    begins[0] = 0
    begins[1:] = ends[:-1] + 1
    last = len(raw) - 1
    two, lengths = _tables()
    first = raw[np.minimum(begins + _AT, last)].astype(np.intp)
    kinds = two[first << 8 | raw[np.minimum(begins + _AT + 1, last)]]
    # The two letters decide among our own kinds; the closing quote rules out a longer name.
    ours = raw[np.minimum(begins + _AT + lengths[kinds], last)] == ord('"')
    ours &= raw[np.minimum(begins + _AT - 1, last)] == ord('"')
    ours &= (raw[begins] == ord("{")) & (raw[np.maximum(ends - 1, 0)] == ord("}"))
    kinds = np.where(ours, kinds, np.uint8(OTHER)).astype(np.uint8)
    for i in np.flatnonzero(kinds == OTHER).tolist():
        found = _KIND.match(data, begins[i], ends[i])
        if found and data[begins[i] : ends[i]].rstrip().endswith(b"}"):
            kinds[i] = _BY_NAME.get(found[1], OTHER)
        else:
            kinds[i] = DAMAGED
    return Chunk(start, start + len(data), begins + start, kinds, data)


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Kind by the first two letters of its name, and the length of each name."""
    import numpy as np

    two = np.full(1 << 16, OTHER, np.uint8)
    for i, kind in enumerate(KINDS):
        two[ord(kind[0]) << 8 | ord(kind[1])] = i
    return two, np.array([*map(len, KINDS), 0, 0], np.int64)


def read_step(line: bytes) -> int | None:
    """Read the step of a line, or of its first bytes, without decoding it; None if damaged."""
    found = _STEP.match(line)
    if found:
        step: int | None = int(found[1])
    else:
        record = decode(line) if line.rstrip().endswith(b"}") else Damaged("cut")
        step = None if isinstance(record, Damaged) else record.step
    return step if step is not None and 0 <= step <= MAX_STEP else None


def seek_step(file: LogFile, stop: int, step: int) -> int:
    """Find where the first line of `step`, or of a later one, begins; `stop` if there is none.

    Bisects bytes, since steps never decrease: some 14 reads on 1 GB. Each probe takes the median of
    three lines, so that a damaged number does not mislead it.
    """
    low, high = 0, stop
    while high - low > (1 << 17):
        middle = (low + high) // 2
        near = _steps_after(file, middle, high)
        if not near:
            high = middle
        elif sorted(s for _, s in near)[len(near) // 2] < step:
            low = near[0][0]
        else:
            high = middle
    return _first_at_least(file, low, stop, step)


def _steps_after(file: LogFile, position: int, stop: int) -> list[tuple[int, int]]:
    """Up to three (offset, step) of lines that begin after `position` and before `stop`."""
    found: list[tuple[int, int]] = []
    length = 1 << 16
    while position < stop and len(found) < 3:
        data = file.read(position, min(length, stop - position))
        if not data:
            break
        at = data.find(b"\n") + 1
        while 0 < at < len(data) and len(found) < 3:
            end = data.find(b"\n", at)
            number = read_step(data[at : end if end >= 0 else at + 200])
            if number is not None and (end >= 0 or at + 200 <= len(data)):
                found.append((position + at, number))
            at = end + 1
        newline = data.rfind(b"\n")
        if newline < 0:
            length = min(length * 8, CHUNK)
        position += newline if newline > 0 else len(data)
    return found


def _first_at_least(file: LogFile, start: int, stop: int, step: int) -> int:
    """Walk lines from `start`, where a line begins (or the first after it)."""
    candidate = None
    while (chunk := scan_chunk(file, start, stop, 1 << 17)) is not None:
        for i in range(len(chunk.starts)):
            number = read_step(chunk.line(i))
            if number is None:
                continue
            if number < step:
                candidate = None
            elif candidate is not None:
                return candidate
            else:
                candidate = int(chunk.starts[i])
        start = chunk.end
    return stop if candidate is None else candidate


def iterate(file: LogFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the complete lines in a range that begins at a line."""
    while (chunk := scan_chunk(file, start, stop)) is not None:
        for i in range(len(chunk.starts)):
            yield int(chunk.starts[i]), chunk.line(i)
        start = chunk.end
