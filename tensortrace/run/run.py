"""A run: a log opened for reading, with bounded memory, any step at once."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tensortrace.errors import LogError
from tensortrace.log import (
    CHUNK,
    DAMAGED,
    KINDS,
    MAX_LINE,
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
    unknown_keys,
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
from tensortrace.run.step import STEP_NBYTES, StepRecords
from tensortrace.text import escape
from tensortrace.version import __version__

HEAD, TAIL = 1 << 16, 1 << 18
MAX_KEPT = 20_000
# Bytes that are read for one step line, and for step lines that are close together.
ONE, MANY = 1 << 13, 1 << 16
_NOTED = [*(k in ("module", "source", "finding", "step", "end") for k in KINDS), True, True]
_MODULE_KIND, _STEP_KIND = KINDS.index("module"), KINDS.index("step")
_STEP_LINE = re.compile(rb'\n\{"kind": ?"step",')


class Run:
    """A log opened for reading: bounded memory, any step at once, growing while it is written.

    Made by `open_run`. `findings`, `modules` and `sources` hold what was seen so far (the head and
    the tail of the log) and are complete once `index` was exhausted: then `indexed` is 1.0.

    Attributes:
        path: the file; `ranks` maps each rank whose log lies beside it to its path.
        header: the first line.
        end: the last line, None while the run is live or if it was killed.
        lost_bytes: length of a last line without newline, which is not counted.
        skipped: unknown kinds ("kind") and keys ("kind.key") by name, as far as indexed.
        unreadable: how many lines are no records, as far as indexed.
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
        self.end: End | None = None
        self._end_at, self._end_bytes = 0, b""
        self.skipped: Counter[str] = Counter()
        self.unreadable = 0
        self._size = file.size()
        self._stop = file.complete(self._size)
        self._scanned = 0
        # With the offsets of the first and of the last line of that path.
        self._modules: dict[str, tuple[int, int, Module]] = {}
        self._sources: dict[tuple[str, int], Source] = {}
        self._findings: dict[int, Finding] = {}
        self._sorted: list[Finding] | None = None
        self._step_numbers, self._step_offsets = array("q"), array("q")
        self._steps: OrderedDict[int, StepRecords] = OrderedDict()
        self._first: int | None = None
        self._last: int | None = None
        self._start = file.read(0, 512)
        self._scan(HEAD)
        if self._first is None:  # a long header, or nothing but a header yet
            self._scan(CHUNK)
        self._read_tail(self._scanned)

    # -- what was seen so far

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
            if self._sorted is None:
                self._sorted = [f for _, f in sorted(self._findings.items())]
            return self._sorted

    @property
    def modules(self) -> dict[str, Module]:
        """Modules by path, in order of first call, each as it was written last."""
        with self._lock:
            in_order = sorted(self._modules.items(), key=lambda kept: kept[1][0])
            return {path: module for path, (_, _, module) in in_order}

    @property
    def sources(self) -> list[Source]:
        """Stored functions of the user's."""
        with self._lock:
            return list(self._sources.values())

    def source(self, file: str, line: int) -> Source | None:
        """The innermost stored function that contains a line."""
        holding = [
            s
            for s in self.sources
            if s.file == file and s.first_line <= line < s.first_line + len(s.text.splitlines())
        ]
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
        if self._first is None or self._last is None:
            return range(0)
        return range(self._first, self._last + 1)

    def first_step(self) -> int:
        """The first step number; 0 if there is none."""
        return self._first or 0

    def last_step(self) -> int:
        """The last step number; 0 if there is none."""
        return self._last or 0

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

    def _summaries(
        self, start: int, stop: int, read: Callable[[bytes], Record | Unknown | Damaged]
    ) -> Iterator[Step]:
        places = list(self._step_lines(start, stop))
        afters = [offset for _, offset in places[1:]] + [self._stop]
        low, data = 0, b""
        for (number, offset), after in zip(places, afters, strict=False):
            end = data.find(b"\n", offset - low) if low <= offset < low + len(data) else -1
            if end < 0:
                # Thinned steps are little else than their step lines: many are read at once.
                low, data = offset, self._file.read(offset, MANY if after - offset < MANY else ONE)
                end = data.find(b"\n")
            line = data[offset - low : end] if end >= 0 else self._line_at(offset)
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

    def _line_at(self, offset: int) -> bytes:
        length = 1 << 14
        while True:
            data = self._file.read(offset, min(length, self._stop - offset))
            end = data.find(b"\n")
            if end >= 0:
                return data[:end]
            if len(data) < length or length >= MAX_LINE:
                return b""
            length *= 8

    def _step_lines(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where the step lines of a range of steps begin: from the index, or else by bisection."""
        number = max(start, self.first_step())
        stop = min(stop, self.last_step() + 1)
        with self._lock:
            low = bisect_left(self._step_numbers, number)
            high = bisect_left(self._step_numbers, stop)
            known = list(
                zip(self._step_numbers[low:high], self._step_offsets[low:high], strict=True)
            )
        for step, offset in known:
            yield step, offset
            number = step + 1
        while number < stop and self.indexed < 1:
            offset = self._seek(number)
            line = self._line_at(offset)
            found = read_step(line)
            if found is None or found >= stop or found < number:
                return
            closing = self._last_line_before(self._seek(found + 1), offset)
            if closing is not None:
                yield found, closing
            number = found + 1

    def _last_line_before(self, stop: int, start: int) -> int | None:
        """Find the last step line in a range, looking backwards."""
        high = stop
        while high > start:
            low = max(start, high - (1 << 16))
            data = self._file.read(low, min(high + 20, stop) - low)
            found = [match.start() for match in _STEP_LINE.finditer(data)]
            if found:
                return low + found[-1] + 1
            high = low
        return start if _STEP_LINE.match(b"\n" + self._file.read(start, 20)) else None

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
        if self.end is None or size < self._end_at:
            return False
        if self._file.read(self._end_at, len(self._end_bytes)) == self._end_bytes:
            return False
        self.end = None
        self._size = self._stop = self._end_at
        self._scanned = min(self._scanned, self._end_at)
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
            self._note_chunk(chunk, counting=True)
            self._scanned = chunk.end
            return True

    def _read_tail(self, low: int) -> None:
        start = max(low, self._stop - TAIL)
        if start > low:
            data = self._file.read(start, self._stop - start)
            start += data.find(b"\n") + 1
        while (chunk := scan_chunk(self._file, start, self._stop)) is not None:
            self._note_chunk(chunk, counting=False)
            start = chunk.end

    def _note_chunk(self, chunk: Chunk, *, counting: bool) -> None:
        """Take from a chunk what is kept of the whole log."""
        import numpy as np

        # Indexing by `kinds` picks the few lines that are looked at; the rest costs no Python.
        for i in np.flatnonzero(np.array(_NOTED)[chunk.kinds]).tolist():
            kind, offset = int(chunk.kinds[i]), int(chunk.starts[i])
            if kind == _STEP_KIND:
                number = read_step(chunk.line(i))
                if counting and number is not None and number > self._last_indexed():
                    self._step_numbers.append(number)
                    self._step_offsets.append(offset)
            else:
                found = Damaged("") if kind == DAMAGED else decode(chunk.line(i))
                self._note(offset, found, counting)
        if counting and self.header.tensortrace != __version__:
            self._count_unknown_keys(chunk)
        self._note_steps(chunk, counting)

    def _count_unknown_keys(self, chunk: Chunk) -> None:
        for i in range(len(chunk.starts)):
            line = chunk.line(i)
            record = decode(line)
            if isinstance(record, Record):
                self.skipped.update(unknown_keys(line, record))

    def _last_indexed(self) -> int:
        return self._step_numbers[-1] if self._step_numbers else -1

    def _note(self, offset: int, record: Record | Unknown | Damaged, counting: bool) -> None:
        match record:
            case Finding() if self._room(self._findings, offset, "findings"):
                self._findings[offset] = record
                self._sorted = None
            case Module() if self._room(self._modules, record.path, "modules"):
                first, last, module = self._modules.get(record.path, (offset, offset, record))
                newest = record if offset >= last else module  # the tail is read before the middle
                self._modules[record.path] = (min(first, offset), max(last, offset), newest)
            case Source() if self._room(self._sources, key := _key(record), "functions"):
                self._sources[key] = record
            case End():
                self.end, self._end_at = record, offset
                self._end_bytes = self._file.read(offset, min(self._stop - offset, 256))
            case Unknown() if counting:
                self.skipped[record.kind] += 1
            case Damaged() if counting:
                self.unreadable += 1

    def _room(self, kept: Collection[object], key: object, what: str) -> bool:
        if key in kept or len(kept) < MAX_KEPT:
            return True
        self.notice = f"{escape(self.path.name)}: of its {what} only {MAX_KEPT} are kept"
        return False

    def _note_steps(self, chunk: Chunk, counting: bool) -> None:
        """Learn the first and the last step, of all lines but the header and the end."""
        import numpy as np

        real = np.flatnonzero((chunk.kinds >= _MODULE_KIND) & (chunk.kinds <= _STEP_KIND)).tolist()
        if self._first is None and counting:
            numbers = (read_step(chunk.line(i)) for i in real)
            self._first = next((n for n in numbers if n is not None), None)
        numbers = (read_step(chunk.line(i)) for i in reversed(real))
        last = next((n for n in numbers if n is not None), None)
        if last is not None:
            self._last = max(last, self._last or 0)


def _key(source: Source) -> tuple[str, int]:
    return source.file, source.first_line


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
