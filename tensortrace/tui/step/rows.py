"""Records of a step as rows of the table, decoded when they are asked for.

A step is walked in log order: forward calls, loss, backward calls, optimizer, parameters. A `Row`
holds its record and its place; `cells` writes the text of those that are drawn. Every line has a
slot, its place in the log; the ops inside a call have a row only where `folds` shows them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import overload

from tensortrace.records import SEVERITIES, Call, Finding, Record, Severity
from tensortrace.run import StepRecords
from tensortrace.tui.kept import Kept
from tensortrace.tui.step.folds import Folds, Opened
from tensortrace.tui.step.row import Row, site_of, worst
from tensortrace.tui.step.slots import LOOK_AROUND, Slots

KEPT_ROWS = 4000


class StepRows(Slots, Sequence[Row]):
    """The rows of a step; a row is decoded when it is asked for.

    Findings that have no record of their own in the step come last, as rows themselves. What is
    inside what is read at once in a small step; in a large one every line is a row until `fold`
    has the answer of a thread.

    Args:
        opened: which calls show their ops; kept from step to step by the screen.
    """

    def __init__(self, step: StepRecords, opened: Opened | None = None) -> None:
        super().__init__(step)
        self.opened = opened if opened is not None else Opened()
        self._rows: Kept[int, Row] = Kept(KEPT_ROWS)
        self._places: dict[int, list[Finding]] = {}
        self._loose: list[Finding] = []
        for finding in step.findings:
            at = self.place_of(finding)
            if at is None:
                self._loose.append(finding)
            else:
                self._places.setdefault(at, []).append(finding)
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

    # ---- where something is

    def offset(self, at: int) -> int:
        """Where the line of a row begins in the log, in bytes."""
        if not self._lines:
            return self.step.start
        return int(self.step.starts[self._lines[min(self.slot(at), len(self._lines) - 1)]])

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

    def find_finding(self, finding: Finding) -> int:
        """The slot of the row that shows a finding; 0 if none does."""
        for at, held in self._places.items():
            if any(other.id == finding.id for other in held):
                return at
        loose = [other.id for other in self._loose]
        return len(self._lines) + loose.index(finding.id) if finding.id in loose else 0
