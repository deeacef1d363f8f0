"""The lines of a step that have a row, by slot: their place in the log, shown or not.

A line is decoded when it is asked for. What belongs to one is looked for beside it first, since the
lines of a step stand in the order of its seqs.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

import msgspec

from tensortrace.records import Call, Finding, Line, Param, Record, Tensor
from tensortrace.run import StepRecords
from tensortrace.tui.kept import Kept
from tensortrace.tui.step.folds import Folds
from tensortrace.tui.step.row import Row, section_of, site_of

# The kinds of lines that are rows.
SHOWN = ("call", "param", "optimizer", "action", "line", "step")
KEPT = 4000
# Rows from which on the data flow of a step is not read as a whole: it takes 18 ms and 2 MB of
# memory a thousand calls (measured on a step of 100,000). Lines are looked through instead.
LARGE = 2000
# Bounds on looking for a section, a place or a root, so that no step takes long.
LOOK_BACK, LOOK_AROUND, DEEPEST, NEAR = 50, 600, 200, 24


class Slots:
    """The lines of a step that are rows once they are shown.

    Args:
        step: where the lines are.
    """

    def __init__(self, step: StepRecords) -> None:
        self.step = step
        self._lines: list[int] = step.indices(*SHOWN).tolist()
        self._records: Kept[int, Record | None] = Kept(KEPT)
        self._tensors: Kept[int, Tensor | None] = Kept(KEPT)
        self._backward: dict[int, list[Call]] = {}
        self.folds: Folds | None = None

    def record(self, at: int) -> Record | None:
        """Decode the record of a slot, None if its line is damaged."""
        if at not in self._records:
            record = self._records[at] = self.step.record(self._lines[at])
            for tensor in record.tensors if isinstance(record, Call | Line) else ():
                self._tensors[tensor.id] = tensor
        return self._records[at]

    def at_offset(self, offset: int) -> int | None:
        """The slot whose line begins at a byte of the log."""
        lines = (self.step.starts == offset).nonzero()[0].tolist()
        at = bisect_left(self._lines, lines[0]) if lines else len(self._lines)
        return at if at < len(self._lines) and self._lines[at] == lines[0] else None

    def at_seq(self, seq: int | None, near: int | None = None) -> int | None:
        """The slot of a seq, looked for beside `near` first: a step is in seq order."""
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
        return self.step.seq(self._lines[at])

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
        """The tensor of an id, for rows on the screen: cheap, and exact once `folds` are read.

        The data flow of a whole step costs 10 ms a thousand calls. Until a thread has read the
        folds of a large step, only the lines before a slot are looked at.
        """
        if number is None:
            return None
        if number in self._tensors:
            return self._tensors[number]
        near: Sequence[int] = range(min(len(self._lines) - 1, at), max(-1, at - NEAR - 1), -1)
        if self.folds is not None:
            slot = self.folds.describing.get(number)
            near = [] if slot is None else [slot]
        for i in near:
            record = self.record(i)
            for tensor in record.tensors if isinstance(record, Call | Line) else ():
                if tensor.id == number:
                    return tensor
        return None if self.large else self.tensor(number)

    def place_of(self, finding: Finding) -> int | None:
        """The slot of the record that a finding is about, None if it has none in the step."""
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

    def same_place(self, row: Row, near: int) -> int | None:
        """The slot at the same place as a row of another step, shown or not, near a slot."""
        for away in range(LOOK_AROUND):
            for slot in (near + away, near - away):
                known = 0 <= slot < len(self._lines)
                if known and site_of(self.record(slot)) == site_of(row.record):
                    return slot
        return None

    def find_module(self, path: str) -> int:
        """The slot of the first call of a module; 0 if there is none."""
        for at, line in enumerate(self._lines):
            if self.step.kind(line) == "call":
                record = self.record(at)
                if isinstance(record, Call) and record.module == path and record.op is None:
                    return at
        return 0
