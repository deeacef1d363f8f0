"""Records of a step as rows of the table, decoded when they are asked for.

A step is walked in log order: forward calls, loss, backward calls, optimizer, parameters. A `Row`
holds its record and its place; `cells` writes the text of those that are drawn. Every line has a
slot, its place in the log; the ops inside a call have a row only where `folds` shows them.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import msgspec
from textual.cache import LRUCache

from tensortrace.records import (
    Action,
    Call,
    Finding,
    Line,
    Optimizer,
    Param,
    Record,
    Severity,
    Step,
    Tensor,
)
from tensortrace.run import StepRecords
from tensortrace.tui.folds import Folds, Opened

# The kinds of lines that are rows.
SHOWN = ("call", "param", "optimizer", "action", "line", "step")
KEPT_ROWS = 4000
# Rows from which on the data flow of a step is not read as a whole: it takes 18 ms and 2 MB of
# memory a thousand calls (measured on a step of 100,000). Lines are looked through instead.
LARGE = 2000
# Bounds on looking for a section, a place or a root, so that no step takes long.
LOOK_BACK, LOOK_AROUND, DEEPEST, NEAR = 50, 600, 200, 24
_SEQ = re.compile(rb'"seq":\s*(\d{1,18})')
Lookup = Callable[[int | None], Tensor | None]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the step, where it stands: `section` is its phase word, `depth` its nesting."""

    record: Record | None
    section: str
    depth: int = 0
    inside: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def seq(self) -> int | None:
        """The number of the record within its step; None for a finding."""
        return getattr(self.record, "seq", None)

    @property
    def severity(self) -> Severity | None:
        """The worst severity among the findings here."""
        return worst(self.findings)


def site_of(record: Record | None) -> tuple[object, ...]:
    """What stays the same from step to step, so that the cursor can stay on it."""
    match record:
        case Call():
            place = ("call", record.phase, record.module, record.op, record.nth)
            return (*place, record.node, record.replay)
        case Param():
            return ("param", record.name)
        case Optimizer():
            return ("optimizer", record.index)
        case Action():
            return ("action", record.action, record.of)
        case Line():
            return ("line", record.location)
    return (type(record).__name__,)


def worst(findings: Sequence[Finding]) -> Severity | None:
    """The worst severity among findings."""
    found = {finding.severity for finding in findings}
    return next((severity for severity in SEVERITIES if severity in found), None)


class StepRows(Sequence[Row]):
    """The rows of a step; a row is decoded when it is asked for.

    Findings that have no record of their own in the step come last, as rows themselves. What is
    inside what is read at once in a small step; in a large one every line is a row until `fold`
    has the answer of a thread.

    Args:
        opened: which calls show their ops; kept from step to step by the screen.
    """

    def __init__(self, step: StepRecords, opened: Opened | None = None) -> None:
        self.step = step
        self.opened = opened if opened is not None else Opened()
        self._lines: list[int] = step.indices(*SHOWN).tolist()
        self._rows: LRUCache[int, Row] = LRUCache(KEPT_ROWS)
        self._records: LRUCache[int, Record | None] = LRUCache(KEPT_ROWS)
        self._tensors: LRUCache[int, Tensor | None] = LRUCache(KEPT_ROWS)
        self._backward: dict[int, list[Call]] = {}
        self._places: dict[int, list[Finding]] = {}
        self._loose: list[Finding] = []
        for finding in step.findings:
            at = self._place(finding)
            if at is None:
                self._loose.append(finding)
            else:
                self._places.setdefault(at, []).append(finding)
        self.folds: Folds | None = None
        self._slots: Sequence[int] = range(len(self._lines))
        self._positions: Sequence[int] = self._slots
        self._under: dict[int, Severity] = {}
        if not self.large:
            self.fold(self.read_folds())

    def __len__(self) -> int:
        return len(self._slots) + len(self._loose)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        slot = self.slot(at)
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = self._make(slot)
        return row

    def _make(self, slot: int) -> Row:
        if slot >= len(self._lines):
            finding = self._loose[slot - len(self._lines)]
            return Row(finding, "step", findings=(finding,))
        record = self.record(slot)
        depth, inside = self._nesting(record, slot)
        if isinstance(record, Call) and record.phase == "backward" and self.folds is not None:
            depth = int(self.folds.owner[slot] >= 0)
        return Row(record, self._section(slot), depth, inside, tuple(self._places.get(slot, ())))

    # ---- which rows there are

    def read_folds(self) -> Folds:
        """Read what is inside what; made for a thread in a large step."""
        return Folds(self.step, self._lines)

    def fold(self, folds: Folds | None = None) -> None:
        """Show the rows that `opened` asks for, and what is inside what if that is new."""
        if folds is not None:
            self.folds = folds
            self._rows.clear()
        if self.folds is None:
            return
        slots = self.folds.shown(self.opened)
        positions = array("q", [-1]) * len(self._lines)
        for at, slot in enumerate(slots.tolist()):
            positions[slot] = at
        self._slots, self._positions = array("q", slots.tobytes()), positions
        self._under = {}
        for slot, found in self._places.items():
            if positions[slot] < 0:
                around = [*self.folds.around(slot), *self.folds.above(slot)]
                seen = next((i for i in around if positions[i] >= 0), None)
                if seen is not None:
                    held = [s for s in (self._under.get(seen), worst(found)) if s is not None]
                    self._under[seen] = min(held, key=SEVERITIES.index)

    def slot(self, at: int) -> int:
        """Where the line of a row is among all lines; of a finding without one, after them."""
        shown = len(self._slots)
        return self._slots[at] if at < shown else at - shown + len(self._lines)

    def position(self, slot: int) -> int | None:
        """The row of a slot, None if it is hidden."""
        if slot >= len(self._lines):
            return slot - len(self._lines) + len(self._slots)
        return self._positions[slot] if self._positions[slot] >= 0 else None

    def reveal(self, slot: int) -> int:
        """The row of a slot; the calls around it show their ops if they must."""
        if not 0 <= slot < len(self._lines) + len(self._loose):
            return 0
        if self.position(slot) is None and self.folds is not None:
            for around in self.folds.around(slot):
                self.opened.put(self.folds.sites[around], True)
            for above in self.folds.above(slot):
                self.opened.closed.discard(self.folds.trees[above])
            self.fold()
        return self.position(slot) or 0

    def inside(self, at: int) -> int:
        """How many ops are inside the call of a row."""
        slot = self.slot(at)
        held = self.folds is not None and slot < len(self._lines)
        return int(self.folds.inside[slot]) if self.folds is not None and held else 0

    def opens(self, at: int) -> bool:
        """Whether the call of a row shows its ops."""
        site = self.folds.sites.get(self.slot(at)) if self.folds is not None else None
        return site is not None and self.opened.has(site)

    def put(self, at: int, shown: bool) -> None:
        """Show or hide the ops of the call of a row."""
        site = self.folds.sites.get(self.slot(at)) if self.folds is not None else None
        if site is not None:
            self.opened.put(site, shown)
            self.fold()

    def holds(self, at: int) -> int:
        """How many module calls ran directly inside the call of a row."""
        slot = self.slot(at)
        held = self.folds is not None and slot < len(self._lines)
        return int(self.folds.holds[slot]) if self.folds is not None and held else 0

    def closed(self, at: int) -> bool:
        """Whether the call of a row hides all that is inside."""
        site = self.folds.trees.get(self.slot(at)) if self.folds is not None else None
        return site is not None and site in self.opened.closed

    def close(self, at: int, closed: bool) -> None:
        """Hide all that is inside the call of a row, or show its modules again."""
        site = self.folds.trees.get(self.slot(at)) if self.folds is not None else None
        if site is not None:
            (self.opened.closed.add if closed else self.opened.closed.discard)(site)
            self.fold()

    def close_all(self) -> None:
        """Hide what is inside the module calls, but for the outermost."""
        for slot, site in self.folds.trees.items() if self.folds is not None else ():
            if self.folds is not None and self.folds.above(slot):
                self.opened.closed.add(site)
        self.fold()

    def owner(self, at: int) -> int | None:
        """The row of the call that a row is inside of, None if it is inside none."""
        if not 0 <= at < len(self):
            return None
        slot, row = self.slot(at), self[at]
        owner = int(self.folds.owner[slot]) if self.folds and slot < len(self._lines) else -1
        if owner < 0:
            parent = row.record.parent if isinstance(row.record, Call) else None
            found = self.at_seq(parent, slot)
            owner = -1 if found is None else found
        return self.position(owner) if owner >= 0 else None

    def first_inside(self, at: int) -> int:
        """The first row that the call of a row owns; the row itself if none shows."""
        slot, folds = self.slot(at), self.folds
        owned = [] if folds is None else (folds.owner == slot).nonzero()[0].tolist()
        return min((i for i in map(self.position, owned) if i is not None), default=at)

    def under(self, at: int) -> Severity | None:
        """The worst severity of the findings inside the call of a row that do not show."""
        return self._under.get(self.slot(at))

    @property
    def folding(self) -> bool:
        """Whether any call has calls inside."""
        return self.folds is not None and bool(self.folds.sites or self.folds.trees)

    # ---- lines, by slot

    def record(self, at: int) -> Record | None:
        """Decode the record of a slot, None if its line is damaged."""
        if at not in self._records:
            record = self._records[at] = self.step.record(self._lines[at])
            for tensor in record.tensors if isinstance(record, Call | Line) else ():
                self._tensors[tensor.id] = tensor
        return self._records[at]

    def offset(self, at: int) -> int:
        """Where the line of a row begins in the log, in bytes."""
        line = self._lines[min(self.slot(at), len(self._lines) - 1)] if self._lines else 0
        return int(self.step.raw[line])

    def at_offset(self, offset: int) -> int | None:
        """The slot whose line begins at a byte of the log."""
        line = int(self.step.raw.searchsorted(offset))
        at = bisect_left(self._lines, line)
        return at if at < len(self._lines) and self._lines[at] == line else None

    def at_seq(self, seq: int | None, near: int | None = None) -> int | None:
        """The slot of a seq, looked for beside `near` first: a step is written in seq order."""
        if seq is None:
            return None
        # Seqs are dense, so a seq is nearly always this far from its neighbour.
        if near is not None:
            guess = near - self._seq(near) + seq
            if 0 <= guess < len(self._lines) and self._seq(guess) == seq:
                return guess
        at = bisect_left(range(len(self._lines)), seq, key=self._seq)
        return at if at < len(self._lines) and self._seq(at) == seq else None

    def _seq(self, at: int) -> int:
        found = _SEQ.search(self.step.line(self._lines[at]))
        return int(found[1]) if found else 0

    @property
    def large(self) -> bool:
        """Whether the data flow of the step takes long to read."""
        return len(self._lines) > LARGE

    def backward_of(self, seq: int) -> list[Call]:
        """The backward calls of a forward call; in a large step, once `gather` has found them."""
        if self.large:
            return self._backward.get(seq, [])
        return [call for call in self.step.backward_of(seq) if call.phase == "backward"]

    def gather(self, row: Row, cancelled: Callable[[], bool]) -> None:
        """Look through the lines of a large step for what belongs to a row; made for a thread."""
        call = row.record
        if not isinstance(call, Call) or call.seq in self._backward:
            return
        wanted = {rb'"forward":\s*%d\b' % call.seq}
        for _, number in (*call.inputs, *call.outputs):
            if number not in self._tensors:
                wanted.add(rb'"id":\s*%d\b' % number)
        pattern = re.compile(b"|".join(sorted(wanted)))
        backward: list[Call] = []
        for at, line in enumerate(self._lines):
            if at % 1000 == 0 and cancelled():
                return
            if pattern.search(self.step.line(line)):
                record = self.record(at)
                if isinstance(record, Call) and record.forward == call.seq:
                    backward.append(record)
        self._backward[call.seq] = backward

    def tensor(self, number: int | None) -> Tensor | None:
        """The tensor of an id."""
        if number is None:
            return None
        if number not in self._tensors:
            self._tensors[number] = self.step.tensor(number)
        return self._tensors[number]

    def tensor_near(self, at: int, number: int | None) -> Tensor | None:
        """The tensor of an id, looked for around a slot: cheap, for rows on the screen.

        The data flow of a whole step costs 10 ms a thousand calls; nearly always a neighbour or an
        outer call describes the tensor. In a large step nothing else is asked.
        """
        if number is None:
            return None
        if number in self._tensors:
            return self._tensors.get(number)
        for i in range(max(0, at - NEAR), min(len(self._lines), at + 1)):
            self.record(i)
        if number in self._tensors or self.large:
            return self._tensors.get(number)
        return self.tensor(number)

    def _place(self, finding: Finding) -> int | None:
        at = self.at_seq(finding.seq)
        if at is None and finding.param is not None:
            for i in range(len(self._lines)):
                if self.step.kind(self._lines[i]) == "param":
                    record = self.record(i)
                    if isinstance(record, Param) and record.name == finding.param:
                        return i
        if at is None and finding.module is not None and finding.param is None:
            return self._module_call(finding.module, finding.phase)
        return at

    def _module_call(self, path: str, phase: str | None) -> int | None:
        """The slot of a module's backward call if a finding is of that pass, else its forward."""
        lines = [i for i, line in enumerate(self._lines) if self.step.kind(line) == "call"]
        if self.large:
            wanted = b'"module":' + msgspec.json.encode(path)
            lines = [i for i in lines if wanted in self.step.line(self._lines[i])]
        calls = [(i, r) for i in lines if isinstance(r := self.record(i), Call)
                 and r.module == path and r.op is None and not r.replay]  # fmt: skip
        passes = ("backward", "forward") if phase in (None, "backward") else ("forward",)
        for one in passes:
            # A backward call of its own has the gradient that arrived; parameters come after it.
            found = [(i, r) for i, r in calls if r.phase == one]
            found.sort(key=lambda pair: pair[1].forward is None)
            if found:
                return found[0][0]
        return None

    def _section(self, at: int) -> str:
        for i in range(at, max(-1, at - LOOK_BACK), -1):
            section = section_of(self.record(i))
            if section is not None:
                return section
        return "forward"

    def _nesting(self, record: Record | None, at: int | None) -> tuple[int, str | None]:
        """How deep a call is, and the path of the module that it ran inside."""
        depth, inside = 0, None
        while isinstance(record, Call) and record.parent is not None and depth < DEEPEST:
            at = self.at_seq(record.parent, at)
            record = None if at is None else self.record(at)
            if not isinstance(record, Call):
                break
            depth += 1
            inside = record.module if inside is None else inside
        return depth, inside

    def find(self, row: Row | None, near: int) -> int:
        """The row at the same place as one of another step: the nearest to a position."""
        if not len(self):
            return 0
        near = max(0, min(near, len(self) - 1))
        if row is None:
            return near
        for away in range(min(len(self), LOOK_AROUND)):
            for at in (near + away, near - away):
                if 0 <= at < len(self) and site_of(self._record_of(at)) == site_of(row.record):
                    return at
        return near

    def _record_of(self, at: int) -> Record | None:
        slot = self.slot(at)
        return self.record(slot) if slot < len(self._lines) else self[at].record

    def same_place(self, row: Row, near: int) -> int | None:
        """The slot at the same place as a row of another step, shown or not, near a slot."""
        for away in range(LOOK_AROUND):
            for slot in (near + away, near - away):
                known = 0 <= slot < len(self._lines)
                if known and site_of(self.record(slot)) == site_of(row.record):
                    return slot
        return None

    def find_finding(self, finding: Finding) -> int:
        """The slot of the row that shows a finding; 0 if none does."""
        for at, held in self._places.items():
            if any(other.id == finding.id for other in held):
                return at
        loose = [other.id for other in self._loose]
        return len(self._lines) + loose.index(finding.id) if finding.id in loose else 0

    def find_module(self, path: str) -> int:
        """The slot of the first call of a module; 0 if there is none."""
        for at, line in enumerate(self._lines):
            if self.step.kind(line) == "call":
                record = self.record(at)
                if isinstance(record, Call) and record.module == path and record.op is None:
                    return at
        return 0


def section_of(record: Record | None) -> str | None:
    """The phase word of a record, None if it belongs to whatever it stands in."""
    match record:
        case Call(phase=phase):
            return phase
        case Param() | Optimizer():
            return "optimizer"
        case Action(action="loss"):
            return "loss"
        case Action(action="clip" | "unscale"):
            return "optimizer"
        case Step():
            return "step"
    return None
