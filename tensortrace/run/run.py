"""A run: a log opened for reading, with bounded memory, any step at once."""

from __future__ import annotations

import os
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tensortrace.errors import LogError
from tensortrace.log import (
    CHUNK,
    KINDS,
    MAX_STEP,
    Chunk,
    Damaged,
    LogFile,
    Unknown,
    decode,
    decode_head,
    read_step,
    scan_chunk,
    seek_step,
    start_log,
)
from tensortrace.records import (
    End,
    Finding,
    Header,
    Module,
    Record,
    Source,
    Step,
)
from tensortrace.run.seen import Seen
from tensortrace.run.step import STEP_NBYTES, StepRecords
from tensortrace.run.step_lines import last_before, line_at, read_lines
from tensortrace.text import escape

HEAD, TAIL = 1 << 16, 1 << 18
# Where the last step line is looked for: nothing but findings comes after it.
CLOSING = 8 << 20


class Run:
    """A log opened for reading: bounded memory, any step at once, growing while it is written.

    Made by `open_run`, which reads through all of it once. One of `start_run`, or of a log that
    still grows, has in `findings`, `modules` and `sources` what was seen so far (at first the head
    and the tail of the log), and is complete once `index` was exhausted: then `indexed` is 1.0.

    Attributes:
        path: the file; `ranks` maps each rank whose log lies beside it to its path.
        header: the first line.
        notice: one sentence for the user (truncated, replaced, damaged in unpacking), or None.
    """

    def __init__(self, path: Path, file: LogFile, header: Header) -> None:
        self.path = path
        self.ranks: dict[int, Path] = {header.rank: path}
        self.notice: str | None = None
        self._lock = threading.RLock()
        self._reset(file, header)

    def _reset(self, file: LogFile, header: Header) -> None:
        self._file, self.header = file, header
        self.notice = file.notice or self.notice
        self._told = (file.unpacked, file.notice)
        self._seen = Seen(self.path.name, header)
        self._end_bytes = b""
        self._size = file.size()
        self._stop = file.complete(self._size)
        self._scanned = 0
        self._steps: OrderedDict[int, StepRecords] = OrderedDict()
        # The last step that has a step line, of a log that ends at a byte.
        self._closed: tuple[int, int | None] = (-1, None)
        self._start = file.read(0, 512)
        self._scan(HEAD)
        if self._seen.first is None:  # a long header, or nothing but a header yet
            self._scan(CHUNK)
        self._read_tail(self._scanned)

    # -- what was seen so far

    @property
    def end(self) -> End | None:
        """The last line, None while the run is live or if it was killed."""
        return self._seen.end

    @property
    def skipped(self) -> Counter[str]:
        """Unknown kinds ("kind") and keys ("kind.key") by name, as far as indexed."""
        return self._seen.skipped

    @property
    def unreadable(self) -> int:
        """How many lines are no records, as far as indexed."""
        return self._seen.unreadable

    @property
    def lost_bytes(self) -> int:
        """Bytes after the last newline: a line that is being written, or was cut."""
        return self._size - self._stop

    @property
    def indexed(self) -> float:
        """How much of the log `index` has read, 0 to 1; what is not unpacked yet counts, too."""
        return (self._scanned / self._stop if self._stop else 1.0) * self._file.unpacked

    @property
    def unpacked(self) -> float:
        """How much of a compressed log or a pipe is there to be read; 1.0 of any other."""
        return self._file.unpacked

    @property
    def findings(self) -> list[Finding]:
        """Findings in log order."""
        with self._lock:
            return self._seen.in_order

    @property
    def modules(self) -> dict[str, Module]:
        """Modules by path, in order of first call, each as it was written last."""
        with self._lock:
            in_order = sorted(self._seen.modules.items(), key=lambda kept: kept[1][0])
            return {path: module for path, (_, _, module) in in_order}

    @property
    def sources(self) -> list[Source]:
        """Stored functions of the user's."""
        with self._lock:
            return list(self._seen.sources.values())

    def source(self, file: str, line: int) -> Source | None:
        """The innermost stored function that contains a line."""
        holding = [s for s in self.sources if s.file == file and s.line(line) is not None]
        return max(holding, key=lambda s: s.first_line, default=None)

    @property
    def live(self) -> bool:
        """True if no end line is there and its writer seems to be at work."""
        if self.end is not None or not self._file.followed:
            return False
        alive = _alive(self.header)
        if alive is not None:
            return alive
        try:
            return time.time() - self._file.changed_at() < 10
        except OSError:
            return False

    @property
    def killed(self) -> bool:
        """True if no end line is there and its writer, a process of this machine, is gone."""
        if self.end is not None or not self._file.followed or self._file.unpacked < 1:
            return False
        return _alive(self.header) is False

    # -- steps

    @property
    def file(self) -> LogFile:
        """The bytes of the log, for those who search them; another object when it is replaced."""
        return self._file

    @property
    def steps(self) -> range:
        """The step numbers from the first to the last in the log; empty if there is none yet."""
        if self._seen.first is None or self._seen.last is None:
            return range(0)
        return range(self._seen.first, self._seen.last + 1)

    def first_step(self) -> int:
        """The first step number; 0 if there is none."""
        return self._seen.first or 0

    def last_step(self) -> int:
        """The last step number; 0 if there is none."""
        return self._seen.last or 0

    @property
    def lost_from(self) -> int | None:
        """The first of the last steps, which have no step line: the log had no room for more."""
        if self.end is None or not self.end.dropped:
            return None
        if self._closed[0] != self._stop:
            at = last_before(self._file, self._stop, max(0, self._stop - CLOSING))
            line = b"" if at is None else line_at(self._file, at, self._stop)
            self._closed = (self._stop, read_step(line))
        closed = self._closed[1]
        return closed + 1 if closed is not None and closed + 1 < self.end.steps else None

    def step(self, number: int) -> StepRecords:
        """All records of a step, empty if it has none; found by bisecting bytes."""
        with self._lock:
            kept = self._steps.pop(number, None)
            if kept is None:
                start = self._seek(number)
                kept = StepRecords(self._file, number, start, self._seek(number + 1))
            self._steps[number] = kept
            nbytes = sum(s.stop - s.start for s in self._steps.values())
            while len(self._steps) > 1 and (len(self._steps) > 8 or nbytes > STEP_NBYTES):
                _, dropped = self._steps.popitem(last=False)
                nbytes -= dropped.stop - dropped.start
            return kept

    def summaries(self, start: int, stop: int) -> list[Step]:
        """The step lines of steps `start` to `stop` (exclusive), for the timeline."""
        return list(self._summaries(start, stop, decode))

    def heads(self, start: int, stop: int) -> list[Step]:
        """As `summaries`, but without `modules`, where they are last: in a fifth of the time."""
        return list(self._summaries(start, stop, decode_head))

    def has_calls(self, step: Step) -> bool:
        """Tell of a step line whether calls of the step are in the log, as far as one has read."""
        if step.full:
            return True
        found = self.findings
        at = bisect_left(found, step.step + 1, key=lambda finding: finding.step)
        before = at < len(found) and found[at].step == step.step + 1
        return before and self.step(step.step).kept != "none"

    def _summaries(
        self, start: int, stop: int, read: Callable[[bytes], Record | Unknown | Damaged]
    ) -> Iterator[Step]:
        places = list(self._step_lines(start, stop))
        for number, line in read_lines(self._file, places, self._stop):
            record = read(line)
            if isinstance(record, Step) and start <= record.step < stop:
                yield record
            elif not isinstance(record, Step):
                yield from (s for s in (self.step(number).summary,) if s is not None)

    def records(
        self, start: int = 0, stop: int = MAX_STEP, *, kinds: Collection[str] = KINDS
    ) -> Iterator[Record]:
        """Decode the records of steps `start` to `stop` (exclusive) one by one, in log order.

        Lines of other kinds than `kinds` are passed over at the price of finding where they end.
        """
        import numpy as np

        wanted = np.array([kind in kinds for kind in KINDS] + [False, False])
        at, high = self._seek(start) if start else 0, self._seek(stop)
        while (chunk := scan_chunk(self._file, at, high)) is not None:
            for i in np.flatnonzero(wanted[chunk.kinds]).tolist():
                record = decode(chunk.line(i))
                if isinstance(record, Record):
                    yield record
            at = chunk.end

    def _seek(self, number: int) -> int:
        return seek_step(self._file, self._stop, number)

    def _step_lines(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where the step lines of a range of steps begin: from the index, or else by bisection."""
        number = max(start, self.first_step())
        stop = min(stop, self.last_step() + 1)
        with self._lock:
            low = bisect_left(self._seen.step_numbers, number)
            high = bisect_left(self._seen.step_numbers, stop)
            known = list(
                zip(
                    self._seen.step_numbers[low:high],
                    self._seen.step_offsets[low:high],
                    strict=True,
                )
            )
        for step, offset in known:
            yield step, offset
            number = step + 1
        while number < stop and self.indexed < 1:
            offset = self._seek(number)
            line = line_at(self._file, offset, self._stop)
            found = read_step(line)
            if found is None or found >= stop or found < number:
                return
            closing = last_before(self._file, self._seek(found + 1), offset)
            if closing is not None:
                yield found, closing
            number = found + 1

    # -- reading on

    def index(
        self,
        progress: Callable[[float], object] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[float]:
        """Read the rest of the log, about 1 MB a turn; yields the part done, 0 to 1.

        Iterate it to the end in a thread, or a few turns at a time. `progress` is called after each
        turn; `cancelled` is asked before each.
        """
        while self._scanned < self._stop and not (cancelled and cancelled()):
            if not self._scan(CHUNK):
                return
            if progress:
                progress(self.indexed)
            yield self.indexed

    def refresh(self) -> bool:
        """Look at the file again; True if it grew, was truncated or was replaced (see `notice`).

        At most 8 MB are indexed in one go: call `index` for the rest if `indexed` is below 1.
        """
        self._file.look()
        with self._lock:
            told = (self._file.unpacked, self._file.notice)  # before the size: no end is missed
            size = self._file.size()
            changed, self._told = told != self._told, told
            self.notice = self._file.notice or self.notice
            if size == self._size and not self._file.followed:
                return changed
            if self._replaced(size):
                return self._reopen("was replaced by a newer log")
            resumed = self._take_back_end(size)
            if size < self._size:
                return self._reopen("was truncated")
            if size == self._size:
                return resumed or changed
            complete, old = self._scanned >= self._stop, self._stop
            self._size, self._stop = size, self._file.complete(size, self._stop)
            if self._stop > old:
                self._steps = OrderedDict((n, s) for n, s in self._steps.items() if s.stop < old)
                for _ in range(8 if complete else 0):
                    self._scan(CHUNK)
                if self._scanned < self._stop:
                    self._read_tail(max(old, self._scanned))
            return True

    def _take_back_end(self, size: int) -> bool:
        """Forget the end line where its run goes on: a block that is entered again cuts it off."""
        if self.end is None or size < self._seen.end_at:
            return False
        if self._file.read(self._seen.end_at, len(self._end_bytes)) == self._end_bytes:
            return False
        self._seen.end = None
        self._size = self._stop = self._seen.end_at
        self._scanned = min(self._scanned, self._seen.end_at)
        self._steps.clear()
        return True

    def _replaced(self, size: int) -> bool:
        if self._file.renewed():
            return True
        return size > self._size and self._file.read(0, len(self._start)) != self._start

    def _reopen(self, what: str) -> bool:
        name = escape(self.path.name)
        try:
            file, header = start_log(self._file.path)
        except LogError as err:
            notice = f"{name} {what}: {err}"
            changed, self.notice = notice != self.notice, notice
            return changed
        self.notice = f"{name} {what}: shown from its beginning"
        self._reset(file, header)
        return True

    def close(self) -> None:
        """Let go of the file; steps read earlier cannot be decoded further."""
        self._file.close()

    def _scan(self, length: int) -> bool:
        """Read on from where the sequential scan stands; False at the end."""
        with self._lock:
            chunk = scan_chunk(self._file, self._scanned, self._stop, length)
            if chunk is None:
                return False
            self._note(chunk, counting=True)
            self._scanned = chunk.end
            return True

    def _read_tail(self, low: int) -> None:
        start = max(low, self._stop - TAIL)
        if start > low:
            data = self._file.read(start, self._stop - start)
            start += data.find(b"\n") + 1
        while (chunk := scan_chunk(self._file, start, self._stop)) is not None:
            self._note(chunk, counting=False)
            start = chunk.end

    def _note(self, chunk: Chunk, *, counting: bool) -> None:
        """Take in a chunk."""
        seen, end, crowded = self._seen, self._seen.end, self._seen.crowded
        seen.note(chunk, counting=counting)
        if seen.crowded is not crowded:
            self.notice = seen.crowded
        if seen.end is not None and seen.end is not end:
            self._end_bytes = self._file.read(seen.end_at, min(self._stop - seen.end_at, 256))


def _alive(header: Header) -> bool | None:
    """Tell whether the writing process still runs; None if it was on another machine."""
    if os.name != "posix" or header.pid <= 0 or header.hostname != socket.gethostname():
        return None
    try:
        os.kill(header.pid, 0)
    except PermissionError:
        return True
    except OverflowError:
        return None
    except OSError:
        return False
    return True
