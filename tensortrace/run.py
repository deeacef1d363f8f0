"""A log as a reader sees it: steps, modules, tensors, findings, decoded lazily.

Opening reads the head and the tail; a step is found by bisecting bytes; `Run.index` reads the rest
piece by piece, in the background if the caller likes (every method may be called from any thread).
Lines of the log that are damaged or unknown are counted and left out, never an error.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from tensortrace.errors import LogError
from tensortrace.log import (
    CHUNK,
    DAMAGED,
    KINDS,
    MAX_STEP,
    OTHER,
    Chunk,
    Damaged,
    LogFile,
    Unknown,
    decode,
    iterate,
    open_log,
    read_step,
    scan_chunk,
    seek_step,
    starts_like_a_log,
    unknown_keys,
)
from tensortrace.records import (
    Action,
    Call,
    End,
    Finding,
    Header,
    Line,
    Module,
    Optimizer,
    Param,
    Record,
    Source,
    Step,
    Tensor,
)
from tensortrace.text import escape
from tensortrace.version import __version__

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

R = TypeVar("R", bound=Record)

HEAD, TAIL = 1 << 16, 1 << 18
# The lists of one step stop here, so that a run without steps (all in step 0) stays readable.
STEP_NBYTES = 32 << 20
MAX_KEPT = 20_000
_NOTED = [*(k in ("module", "source", "finding", "step", "end") for k in KINDS), True, True]
_MODULE_KIND, _STEP_KIND = KINDS.index("module"), KINDS.index("step")
_BIG = 1 << 62
_STEP_LINE = re.compile(rb'\n\{"kind": ?"step",')


class _Tensor(msgspec.Struct, gc=False):
    id: int


class _Links(msgspec.Struct, gc=False):
    """What of a call or param line says who made and who used which tensor."""

    seq: int
    parent: int | None = None
    forward: int | None = None
    inputs: list[tuple[str, int]] = []
    outputs: list[tuple[str, int]] = []
    tensors: list[_Tensor] = []
    value: _Tensor | None = None
    grad: _Tensor | None = None


_LINKS_DECODER = msgspec.json.Decoder(_Links)


class _Graph:
    """The data flow of one step as columns: a lookup is one pass over int64, 8 bytes a link."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        calls, described, inputs, outputs = (array("q") for _ in range(4))
        for i, line in lines:
            try:
                links = _LINKS_DECODER.decode(line)
                row = [i, links.seq, _or(links.parent), _or(links.forward)]
                tensors = [*links.tensors, *filter(None, (links.value, links.grad))]
                columns = (
                    (calls, row),
                    (described, [x for t in tensors for x in (t.id, i)]),
                    (inputs, [x for _, id in links.inputs for x in (id, i)]),
                    (outputs, [x for _, id in links.outputs for x in (id, i)]),
                )
                if max(map(abs, (x for _, c in columns for x in c)), default=0) < _BIG:
                    for column, values in columns:
                        column.extend(values)
            except (ValueError, RecursionError, OverflowError, MemoryError):
                continue  # a damaged line has no part in the graph
        self.calls = _columns(calls, 4)
        self.described, self.inputs, self.outputs = (
            _columns(c, 2) for c in (described, inputs, outputs)
        )


def _or(x: int | None) -> int:
    return -1 if x is None else x


def _columns(flat: array[int], width: int) -> Ints:
    import numpy as np

    return np.frombuffer(flat, np.int64).reshape(-1, width).T if flat else np.empty((width, 0), int)


class StepRecords:
    """All records of one step; nothing is decoded before it is asked for.

    `number` is the step. ``len(step)`` counts its lines; `record(i)` decodes one of them, `kind(i)`
    tells it without decoding and `indices("call")` lists some, so that a screen pays for the rows
    it shows only. `raw` has the byte offsets, int64 ``(len + 1,)``: line i ends at ``raw[i + 1]``.
    The lists (`records`, `calls`, ...) decode everything of their kind; in a step of more than
    32 MB they end there and `truncated` is True, while `record(i)` reaches every line.
    """

    def __init__(self, file: LogFile, number: int, start: int, stop: int) -> None:
        import numpy as np

        self.number = number
        self.start, self.stop = start, stop
        self._file = file
        starts, kinds, at = [], [], start
        while (chunk := scan_chunk(file, at, stop)) is not None:
            starts.append(chunk.starts)
            kinds.append(chunk.kinds)
            at = chunk.end
        self.raw: Ints = np.concatenate([*starts, np.array([at], np.int64)])
        self._kinds = np.concatenate([*kinds, np.empty(0, np.uint8)])
        self.truncated = at - start > STEP_NBYTES
        self._block = (0, b"")

    def __len__(self) -> int:
        return len(self._kinds)

    def kind(self, i: int) -> str:
        """Tell the kind of line `i` from its first bytes; "" if it is damaged or unknown."""
        kind = int(self._kinds[i])
        return KINDS[kind] if kind < OTHER else ""

    def indices(self, *kinds: str) -> Ints:
        """List the lines of some kinds, in log order."""
        import numpy as np

        wanted = [KINDS.index(kind) for kind in kinds]
        return np.flatnonzero(np.isin(self._kinds, wanted)).astype(np.int64)

    def line(self, i: int) -> bytes:
        """The bytes of line `i` as they are in the log, without newline."""
        low, high = int(self.raw[i]), int(self.raw[i + 1]) - 1
        start, block = self._block
        if not start <= low <= high <= start + len(block):
            start, block = low, self._file.read(low, max(high - low, 1 << 16))
            self._block = (start, block)
        return block[low - start : high - start]

    def record(self, i: int) -> Record | None:
        """Decode line `i`; None if it is damaged or of an unknown kind."""
        found = decode(self.line(i))
        return None if isinstance(found, Unknown | Damaged) else found

    def _of(self, cls: type[R], *kinds: str) -> list[R]:
        records = (
            self.record(int(i))
            for i in (self.indices(*kinds) if kinds else range(len(self)))
            if self.raw[i] - self.start <= STEP_NBYTES
        )
        return [r for r in records if isinstance(r, cls)]

    @cached_property
    def records(self) -> list[Record]:
        """Everything, in log order."""
        return self._of(Record)

    @cached_property
    def calls(self) -> list[Call]:
        """Calls of modules and ops, in log order."""
        return self._of(Call, "call")

    @cached_property
    def params(self) -> list[Param]:
        """Parameters at the optimizer steps."""
        return self._of(Param, "param")

    @cached_property
    def actions(self) -> list[Action]:
        """What the loop did besides calls."""
        return self._of(Action, "action")

    @cached_property
    def optimizers(self) -> list[Optimizer]:
        """Optimizer steps."""
        return self._of(Optimizer, "optimizer")

    @cached_property
    def lines(self) -> list[Line]:
        """Executed source lines."""
        return self._of(Line, "line")

    @cached_property
    def findings(self) -> list[Finding]:
        """Findings written in this step."""
        return self._of(Finding, "finding")

    @cached_property
    def summary(self) -> Step | None:
        """The line that closes the step; None while it is not closed."""
        found = self._of(Step, "step")
        return found[-1] if found else None

    @cached_property
    def tensors(self) -> dict[int, Tensor]:
        """Every tensor that the calls and parameters of the step describe, by id."""
        found: dict[int, Tensor] = {}
        for call in self.calls:
            found.update((t.id, t) for t in call.tensors)
        for param in self.params:
            found.update((t.id, t) for t in (param.value, param.grad) if t is not None)
        return found

    # -- data flow, one line decoded per answer

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph((int(i), self.line(int(i))) for i in self.indices("call", "param"))

    def tensor(self, id: int | None) -> Tensor | None:
        """The tensor of that id, as it was described last."""
        for i in reversed(self._rows(self._graph.described, id)):
            record = self.record(i)
            if isinstance(record, Call):
                tensors: Sequence[Tensor | None] = record.tensors
            elif isinstance(record, Param):
                tensors = (record.value, record.grad)
            else:
                continue
            for tensor in tensors:
                if tensor is not None and tensor.id == id:
                    return tensor
        return None

    def producer(self, id: int | None) -> Call | None:
        """The innermost call that has the tensor among its outputs; None if none of them has."""
        makers = self._calls_at(self._rows(self._graph.outputs, id))
        # Of two nested calls that return the same tensor the inner one is entered last, so it has
        # the larger seq; one that only passes on what it was given did not make it.
        makers = [c for c in makers if all(name_id[1] != id for name_id in c.inputs)] or makers
        return max(makers, key=lambda c: c.seq, default=None)

    def consumers(self, id: int | None) -> list[Call]:
        """The calls that have the tensor among their inputs, in order."""
        return self._calls_at(self._rows(self._graph.inputs, id))

    def call(self, seq: int | None) -> Call | None:
        """The call of that seq."""
        found = self._calls_at(self._rows(self._graph.calls[1::-1], seq))
        return found[0] if found else None

    def parent(self, call: Call) -> Call | None:
        """The call that this one ran inside."""
        return self.call(call.parent)

    def children(self, seq: int | None) -> list[Call]:
        """The calls that ran directly inside a call; of None the outermost ones."""
        return self._calls_at(self._rows(self._graph.calls[2::-2], -1 if seq is None else seq))

    def backward_of(self, seq: int | None) -> list[Call]:
        """The backward and recomputed calls that belong to a forward call."""
        return self._calls_at(self._rows(self._graph.calls[3::-3], seq))

    def _rows(self, pairs: Ints, key: int | None) -> list[int]:
        """Lines that `pairs` (keys above line numbers) has for a key, without repetition."""
        if key is None or not -_BIG < key < _BIG:
            return []
        return list(dict.fromkeys(pairs[1][pairs[0] == key].tolist()))

    def _calls_at(self, rows: list[int]) -> list[Call]:
        return [r for r in map(self.record, rows) if isinstance(r, Call)]


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
        """How much of the log `index` has read, 0 to 1."""
        return self._scanned / self._stop if self._stop else 1.0

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
        if self.end is not None or not self._file.growing:
            return False
        alive = _alive(self.header)
        if alive is not None:
            return alive
        try:
            return time.time() - os.fstat(self._file.fd).st_mtime < 10
        except OSError:
            return False

    @property
    def killed(self) -> bool:
        """True if no end line is there and its writer, a process of this machine, is gone."""
        return self.end is None and self._file.growing and _alive(self.header) is False

    # -- steps

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
        found = []
        for number, offset in self._step_lines(start, stop):
            record = decode(self._line_at(offset))
            if isinstance(record, Step) and start <= record.step < stop:
                found.append(record)
            elif not isinstance(record, Step):
                found.extend(s for s in (self.step(number).summary,) if s is not None)
        return found

    def records(self, start: int = 0, stop: int = MAX_STEP) -> Iterator[Record]:
        """Decode the records of steps `start` to `stop` (exclusive) one by one, in log order."""
        low, high = self._seek(start) if start else 0, self._seek(stop)
        for _, line in iterate(self._file, low, high):
            record = decode(line)
            if isinstance(record, Record):
                yield record

    def _seek(self, number: int) -> int:
        return seek_step(self._file, self._stop, number)

    def _line_at(self, offset: int) -> bytes:
        chunk = scan_chunk(self._file, offset, self._stop, 1 << 14)
        return chunk.line(0) if chunk else b""

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
        if not self._file.growing:
            return False
        with self._lock:
            size = self._file.size()
            if self._replaced(size):
                return self._reopen("was replaced by a newer log")
            resumed = self._take_back_end(size)
            if size < self._size:
                return self._reopen("was truncated")
            if size == self._size:
                return resumed
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
        try:
            if not os.path.samestat(self._file.path.stat(), os.fstat(self._file.fd)):
                return True
        except OSError:
            return False  # moved away: what is open can be read on
        return size > self._size and self._file.read(0, len(self._start)) != self._start

    def _reopen(self, what: str) -> bool:
        name = escape(self.path.name)
        try:
            file, header = open_log(self._file.path)
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


_RANK = re.compile(r"(.*)\.rank(\d{1,6})(\.jsonl(?:\.gz|\.zst)?)")


def _rank_files(path: Path) -> dict[int, Path]:
    """List by rank the logs that lie beside `path` under the same stem."""
    own = _RANK.fullmatch(path.name)
    stem = own[1] if own else path.name.removesuffix(".jsonl")
    try:
        names = sorted(os.listdir(path.parent))  # noqa: PTH208 - names, not paths
    except OSError:
        return {}
    found = ((match, name) for name in names if (match := _RANK.fullmatch(name)))
    return {int(match[2]): path.parent / name for match, name in found if match[1] == stem}


def open_run(path: str | Path) -> Run:
    """Open a log, plain or compressed (``.gz``, ``.zst``), a pipe, or ``-`` for standard input.

    Where ``log.jsonl`` does not exist but ``log.rank0.jsonl`` does, the lowest rank is opened.

    Raises:
        LogError: it is no log, or not one this version reads; one sentence says what it is.
    """
    path = Path(path)
    ranks = {} if str(path) == "-" else _rank_files(path)
    if ranks and not path.exists():
        path = ranks[min(ranks)]
    file, header = open_log(path)
    run = Run(path, file, header)
    run.ranks = ranks if path in ranks.values() else {header.rank: path}
    return run


def newest_log(folder: str | Path = ".") -> Path:
    """Find the newest tensortrace log in a folder; of several ranks the lowest.

    Raises:
        LogError: there is none.
    """
    name = escape(str(folder))
    try:
        paths = [p for p in Path(folder).iterdir() if ".jsonl" in p.suffixes and p.is_file()]
        by_age = sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True)
    except OSError as err:
        raise LogError(f"cannot look for logs in {name}: {err.strerror}") from err
    for path in by_age:
        if starts_like_a_log(path):
            ranks = _rank_files(path) if _RANK.fullmatch(path.name) else {}
            return ranks[min(ranks)] if ranks else path
    raise LogError(f"there is no tensortrace log in {name}: give its path")


def series(
    run: Run, path: str, start: int | None = None, stop: int | None = None, *, limit: int = 512
) -> dict[str, list[tuple[int, float | str | None]]]:
    """Follow one module over the steps, from the step lines: what a sparkline shows.

    Args:
        run: whose log.
        path: module path.
        start: first step, the first of the run by default.
        stop: end of the steps (exclusive), the end of the run by default.
        limit: at most so many steps, evenly spread.
    Returns:
        For each column of `ModuleColumns` (``output_rms``, ``zero_frac``, ``grad_rms``,
        ``param_grad_rms``, ``update_ratio``, ``flags``) the (step, value) pairs; steps in which the
        module did not run are left out.
    """
    first = run.first_step() if start is None else start
    last = run.last_step() + 1 if stop is None else stop
    stride = max(1, -(-(last - first) // limit))
    columns = ("output_rms", "zero_frac", "grad_rms", "param_grad_rms", "update_ratio", "flags")
    found: dict[str, list[tuple[int, float | str | None]]] = {name: [] for name in columns}
    for number in range(first, last, stride):
        for summary in run.summaries(number, number + 1):
            if path in summary.modules.path:
                row = summary.modules.path.index(path)
                for name in columns:
                    values = getattr(summary.modules, name)
                    found[name].append((number, values[row] if row < len(values) else None))
    return found
