"""The executed lines of a step as a debugger walks them: next, into a call, out of it, variables.

Pure, over the line records of a step. Where a log has none, the lines that called modules and
operations stand in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from tensortrace.records import (
    Action,
    Call,
    Line,
    Location,
    Module,
    Optimizer,
    Record,
    Tensor,
    Variable,
)
from tensortrace.tui.views.call_lines import CallLines, lines_of_calls, same_place

# Variables of one frame.
MOST_VARIABLES = 2000


@dataclass(frozen=True, slots=True)
class Value:
    """A variable, or one tensor within it, as it is after a line.

    `name` is as one writes it (`batch["ids"]`), `text` short, `was` the text before if the line
    changed it. `tensor` and `before` are ids; `since` is the index of the line that set it. `stale`
    says that an execution which was passed over may have changed it once more before this line.
    """

    name: str
    text: str
    was: str | None
    tensor: int | None
    before: int | None
    changed: bool
    since: int
    stale: bool = False


class Executed:
    """The lines of one step, in order.

    Args:
        lines: those of one step, as they ran.
        tensors: what the step says of tensors, by id.
        made: what is known of lines that are made of calls.
    """

    def __init__(
        self, lines: Sequence[Line], tensors: dict[int, Tensor], made: CallLines | None = None
    ) -> None:
        self.lines = lines
        self.tensors, self.recorded = tensors, made is None
        # Records whose line does not follow from the order of seqs; the lines from which it does.
        self._owners = {} if made is None else made.owners
        self._ats = {line.seq: at for at, line in enumerate(lines)}
        late = frozenset() if made is None else made.replayed
        self._began = [line.seq for line in lines if line.seq not in late]
        self._frames: dict[tuple[int, int], list[int]] = {}
        self._histories: dict[tuple[int, int], dict[str, tuple[list[int], list[Variable]]]] = {}
        self._places: list[int] = []
        self._callers: list[int | None] = []
        # By thread, the line that each frame is at, by depth.
        stacks: dict[int, dict[int, int]] = {}
        for at, line in enumerate(self.lines):
            held = self._frames.setdefault((line.thread, line.frame), [])
            self._places.append(len(held))
            held.append(at)
            stack = stacks.setdefault(line.thread, {})
            for depth in [depth for depth in stack if depth >= line.depth]:
                del stack[depth]
            self._callers.append(stack.get(line.depth - 1))
            stack[line.depth] = at

    def __len__(self) -> int:
        return len(self.lines)

    def at_seq(self, seq: int | None) -> int:
        """The line that a record belongs to: the last one that had begun and was not left."""
        if seq is None:
            return max(0, len(self.lines) - 1)
        if seq in self._owners:
            return self._ats[self._owners[seq]]
        began = bisect_right(self._began, seq) - 1
        at = self._ats[self._began[began]] if began >= 0 else 0
        while at < len(self.lines) and self.lines[at].seq < seq and self._is_left(at):
            caller = self._callers[at]
            if caller is None:
                break
            at = caller
        return at

    def take_replays(self, calls: Iterable[Call]) -> None:
        """Let what a replay repeated after the step belong to the line at which it ran.

        Args:
            calls: the replayed ones, by seq.
        """
        for call in calls:
            repeats = call.forward if call.phase == "backward" else call.parent
            if repeats is None or not self.lines:
                continue
            at = self.at_seq(repeats)
            if call.location is not None and call.phase != "backward":
                at = self._first_within(at, call.location)
            self._owners[call.seq] = self.lines[at].seq

    def _first_within(self, at: int, place: Location) -> int:
        """The first line at a place from one line on until the next of its frame, else itself."""
        stop = self.over(at, 1)
        for inner in range(at, len(self.lines) if stop is None else stop):
            if same_place(self.lines[inner].location, place):
                return inner
        return at

    def _is_left(self, at: int) -> bool:
        """Whether a line is the end of its frame."""
        return self.lines[at].what in ("return", "exception") and self.over(at, 1) is None

    def frame(self, at: int) -> Sequence[int]:
        """All lines of the frame of a line, in order."""
        line = self.lines[at]
        return self._frames[line.thread, line.frame]

    def over(self, at: int, by: int) -> int | None:
        """The next (1) or previous (-1) line of the same frame; None at its ends."""
        held, place = self.frame(at), self._places[at] + by
        return held[place] if 0 <= place < len(held) else None

    def into(self, at: int) -> int | None:
        """The first line of a frame that was entered from this line; None if none was recorded."""
        line, stop = self.lines[at], self.over(at, 1)
        for inner in range(at + 1, len(self.lines) if stop is None else stop):
            if self._callers[inner] == at and self.lines[inner].thread == line.thread:
                return inner
        return None

    def out(self, at: int) -> int | None:
        """The line of the calling frame that led here; None if that was not recorded."""
        return self._callers[at]

    def stack(self, at: int) -> list[int]:
        """The lines that the calling frames are at, outermost first, then this one."""
        found: list[int] = [at]
        while (caller := self._callers[found[-1]]) is not None:
            found.append(caller)
        return found[::-1]

    def same_line(self, at: int, number: int, by: int = 1) -> int | None:
        """The next (1) or previous (-1) execution of a line of the function that one is in."""
        here = self.lines[at].location
        ahead = range(at + 1, len(self.lines)) if by > 0 else range(at - 1, -1, -1)
        for other in ahead:
            place = self.lines[other].location
            if (place.line, place.file, place.function) == (number, here.file, here.function):
                return other
        return None

    def done(self, at: int) -> dict[int, list[int]]:
        """The lines of the frame by line number, up to and with this one."""
        found: dict[int, list[int]] = {}
        for other in self.frame(at)[: self._places[at] + 1]:
            found.setdefault(self.lines[other].location.line, []).append(other)
        return found

    def ahead(self, at: int) -> dict[int, int]:
        """The first execution after this one of each line of the frame, by line number."""
        found: dict[int, int] = {}
        for other in self.frame(at)[self._places[at] + 1 :]:
            found.setdefault(self.lines[other].location.line, other)
        return found

    def variables(self, at: int) -> list[Value]:
        """What the variables of the frame are after a line: those it changed, then the latest."""
        found: list[Value] = []
        passed = self.passed(at)
        for ats, held in self._history(at).values():
            k = bisect_right(ats, at) - 1
            if k >= 0 and len(found) < MOST_VARIABLES:
                by = passed and {self.lines[i].location.line for i in ats if i != at}
                stale = bool(passed & by)
                values = self._values(held[k], held[k - 1] if k else None, ats[k], at)
                found += [replace(v, stale=stale and not v.changed) for v in values]
        return sorted(found, key=lambda value: (not value.changed, -value.since))

    def passed(self, at: int) -> set[int]:
        """The lines of the frame, by number, that ran before this one and are recorded only later.

        What is known of them then is older than they are: those executions were passed over.
        """
        found: set[int] = set()
        met: set[int] = set()
        seq = self.lines[at].seq
        for other in self.frame(at)[self._places[at] + 1 :]:
            line = self.lines[other]
            if line.what == "line" and line.location.line not in met:
                met.add(line.location.line)
                if line.since is not None and line.since < seq:
                    found.add(line.location.line)
        return found

    def _history(self, at: int) -> dict[str, tuple[list[int], list[Variable]]]:
        """By name, when each variable of the frame changed, and to what; made once for a frame."""
        key = self.lines[at].thread, self.lines[at].frame
        if key not in self._histories:
            history: dict[str, tuple[list[int], list[Variable]]] = {}
            for other in self._frames[key]:
                for variable in self.lines[other].changed:
                    ats, held = history.setdefault(variable.name, ([], []))
                    ats.append(other)
                    held.append(variable)
            self._histories[key] = history
        return self._histories[key]

    def _values(
        self, now: Variable, before: Variable | None, since: int, at: int
    ) -> Iterator[Value]:
        """A variable, or each tensor in it, as it is since a line."""
        carried = self.lines[since].what == "call" and now.was == now.text
        changed = since == at and not carried
        was = (before.text if before is not None else now.was) if changed else None
        old = dict(before.tensors) if before is not None and changed else {}
        for place, id in now.tensors:
            yield Value(f"{now.name}{place}", now.text, was, id, old.get(place), changed, since)
        others = dict(before.others) if before is not None and changed else {}
        for place, text in now.others:
            yield Value(f"{now.name}{place}", text, others.get(place), None, None, changed, since)
        if not now.tensors:
            yield Value(now.name, now.text, was, None, None, changed, since)


def read_executed(records: Iterable[Record], modules: Mapping[str, Module]) -> Executed:
    """Take the lines of a step, or make lines of its calls if it has none.

    Args:
        records: the records of one step; only its lines, calls, actions and optimizers are used.
        modules: those of the run, for the names of calls.
    """
    lines: list[Line] = []
    others: list[Call | Action | Optimizer] = []
    tensors: dict[int, Tensor] = {}
    for record in records:
        match record:
            case Line():
                lines.append(record)
                tensors.update((t.id, t) for t in record.tensors)
            case Call():
                others.append(record)
                tensors.update((t.id, t) for t in record.tensors)
            case Action() | Optimizer():
                others.append(record)
    others.sort(key=lambda record: record.seq)
    if not lines:
        made = lines_of_calls(others, modules)
        return Executed(made.lines, tensors, made)
    executed = Executed(sorted(lines, key=lambda line: line.seq), tensors)
    executed.take_replays([r for r in others if isinstance(r, Call) and r.replay])
    return executed


def as_json(line: Line) -> str:
    """Write a line record as JSON: control characters are escaped in it."""
    return msgspec.json.encode(line).decode("utf-8", "replace")
