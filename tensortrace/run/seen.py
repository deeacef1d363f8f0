"""What is kept of the lines of a log that were read, in any order: findings, modules, the steps."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection

from tensortrace.log import DAMAGED, KINDS, Chunk, Damaged, Unknown, decode, read_step, unknown_keys
from tensortrace.records import End, Finding, Header, Module, Record, Source
from tensortrace.text import escape
from tensortrace.version import __version__

MAX_KEPT = 20_000
_NOTED = [*(k in ("module", "source", "finding", "step", "end") for k in KINDS), True, True]
_MODULE_KIND, _STEP_KIND = KINDS.index("module"), KINDS.index("step")


class Seen:
    """Bounded by `MAX_KEPT` of each sort; see `Run` for what the attributes mean.

    Attributes:
        name: what the file is called, for a sentence.
        modules: by path, with the offsets of its first and of its last line.
        findings: by offset.
        step_numbers, step_offsets: of the step lines, as far as read in order.
        first, last: the first and the last step, None before any was seen.
        end_at: where the end line begins.
        crowded: one sentence for the user once there was more than is kept.
    """

    def __init__(self, name: str, header: Header) -> None:
        self.name, self.header = name, header
        self.end: End | None = None
        self.end_at = 0
        self.skipped: Counter[str] = Counter()
        self.unreadable = 0
        self.modules: dict[str, tuple[int, int, Module]] = {}
        self.sources: dict[tuple[str, int], Source] = {}
        self.findings: dict[int, Finding] = {}
        self._sorted: list[Finding] | None = None
        self.step_numbers, self.step_offsets = array("q"), array("q")
        self.first: int | None = None
        self.last: int | None = None
        self.crowded: str | None = None

    @property
    def in_order(self) -> list[Finding]:
        """The findings in log order; another list once there are others."""
        if self._sorted is None:
            self._sorted = [f for _, f in sorted(self.findings.items())]
        return self._sorted

    def note(self, chunk: Chunk, *, counting: bool) -> None:
        """Take from a chunk what is kept; `counting` is for those that come in order, each once."""
        import numpy as np

        # Indexing by `kinds` picks the few lines that are looked at; the rest costs no Python.
        for i in np.flatnonzero(np.array(_NOTED)[chunk.kinds]).tolist():
            kind, offset = int(chunk.kinds[i]), int(chunk.starts[i])
            if kind == _STEP_KIND:
                number = read_step(chunk.line(i))
                if counting and number is not None and number > self._last_indexed():
                    self.step_numbers.append(number)
                    self.step_offsets.append(offset)
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
        return self.step_numbers[-1] if self.step_numbers else -1

    def _note(self, offset: int, record: Record | Unknown | Damaged, counting: bool) -> None:
        match record:
            case Finding() if self._room(self.findings, offset, "findings"):
                self.findings[offset] = record
                self._sorted = None
            case Module() if self._room(self.modules, record.path, "modules"):
                first, last, module = self.modules.get(record.path, (offset, offset, record))
                newest = record if offset >= last else module  # the tail is read before the middle
                self.modules[record.path] = (min(first, offset), max(last, offset), newest)
            case Source() if self._room(self.sources, key := _key(record), "functions"):
                self.sources[key] = record
            case End():
                self.end, self.end_at = record, offset
            case Unknown() if counting:
                self.skipped[record.kind] += 1
            case Damaged() if counting:
                self.unreadable += 1

    def _room(self, kept: Collection[object], key: object, what: str) -> bool:
        if key in kept or len(kept) < MAX_KEPT:
            return True
        self.crowded = f"{escape(self.name)}: of its {what} only {MAX_KEPT} are kept"
        return False

    def _note_steps(self, chunk: Chunk, counting: bool) -> None:
        """Learn the first and the last step, of all lines but the header and the end."""
        import numpy as np

        real = np.flatnonzero((chunk.kinds >= _MODULE_KIND) & (chunk.kinds <= _STEP_KIND)).tolist()
        if self.first is None and counting:
            numbers = (read_step(chunk.line(i)) for i in real)
            self.first = next((n for n in numbers if n is not None), None)
        numbers = (read_step(chunk.line(i)) for i in reversed(real))
        last = next((n for n in numbers if n is not None), None)
        if last is not None:
            self.last = max(last, self.last or 0)


def _key(source: Source) -> tuple[str, int]:
    return source.file, source.first_line
