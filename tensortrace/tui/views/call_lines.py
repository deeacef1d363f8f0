"""Lines made of the calls of a step, for a log without lines: each of the calls that stand at it.

What a replay repeated after the step stands where it ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tensortrace.export.contents import shown_path
from tensortrace.records import Action, Call, Line, Location, Module, Optimizer, Variable
from tensortrace.text import number_text

# Variables of one line that stand for calls.
MOST_CALLS = 32

Made = Call | Action | Optimizer


@dataclass(frozen=True, slots=True)
class CallLines:
    """Lines made of calls, in the order in which they ran.

    `owners` has by the seq of a record that of its line. `replayed` are the seqs of lines that
    a replay alone tells of: they are larger than those of the lines around.
    """

    lines: list[Line]
    owners: dict[int, int]
    replayed: frozenset[int]


@dataclass(slots=True)
class _Draft:
    """A line that is being made; `seq` is that of its first record that is not of a replay."""

    seq: int
    location: Location
    frame: int
    depth: int
    replayed: bool
    changed: list[Variable] = field(default_factory=list)


def lines_of_calls(records: Sequence[Made], modules: Mapping[str, Module]) -> CallLines:
    """Make a line of the forward calls and actions that stand at one place, one after another.

    Args:
        records: those of one step, by seq.
        modules: those of the run, for the names of calls.
    """
    made: list[_Draft] = []
    # The line that each record is of; by the call around and the function, a frame and its last.
    drafts: dict[int, _Draft] = {}
    frames: dict[tuple[int | None, str, str], int] = {}
    latest: dict[int, _Draft] = {}
    for record in _as_ran(records):
        location, again = record.location, is_replay(record)
        if location is None:
            continue
        parent = record.parent if isinstance(record, Call) else None
        around = drafts.get(parent) if parent is not None else None
        if around is not None and same_place(around.location, location):
            # Within a call of the same line, as in a Sequential: a part of it.
            drafts[record.seq] = around
            continue
        key = parent if around is not None else None, location.file, location.function
        frame = frames.setdefault(key, len(frames))
        draft = latest.get(frame)
        if draft is None or not same_place(draft.location, location):
            depth = around.depth + 1 if around is not None else 0
            draft = _Draft(record.seq, location, frame, depth, again)
            made.append(draft)
        elif draft.replayed and not again:
            draft.seq, draft.replayed = record.seq, False
        if len(draft.changed) < MOST_CALLS:
            draft.changed.extend(_made_by(record, modules))
        drafts[record.seq] = latest[frame] = draft
    owners = {seq: draft.seq for seq, draft in drafts.items()}
    owners |= {
        record.seq: owners[record.forward]
        for record in records
        if isinstance(record, Call) and is_replay(record) and record.forward in owners
    }
    lines = [
        Line(step=records[0].step, seq=draft.seq, location=draft.location, frame=draft.frame,
             depth=draft.depth, changed=draft.changed)
        for draft in made
    ]  # fmt: skip
    return CallLines(lines, owners, frozenset(draft.seq for draft in made if draft.replayed))


def is_replay(record: Made) -> bool:
    """Whether a record repeats, after the step, what ran in it."""
    return isinstance(record, Call) and record.replay


def same_place(one: Location, other: Location) -> bool:
    """Whether two locations are one line of one function."""
    return (one.line, one.file, one.function) == (other.line, other.file, other.function)


def _as_ran(records: Sequence[Made]) -> Iterator[Made]:
    """What the program ran forward, in order: replayed ops are inside the call they repeat."""
    ran = [record for record in records if _is_forward(record) and not is_replay(record)]
    at = {record.seq: i for i, record in enumerate(ran)}
    parents = [at.get(r.parent, -1) if isinstance(r, Call) and r.parent is not None else -1
               for r in ran]  # fmt: skip
    parents = [parent if parent < i else -1 for i, parent in enumerate(parents)]
    ends = list(range(len(ran)))
    for i in reversed(ends[:]):
        if parents[i] >= 0:
            ends[parents[i]] = max(ends[parents[i]], ends[i])
    after: dict[int, list[Made]] = {}
    seen: set[int] = set()
    last = -1
    for record in records:
        if not (isinstance(record, Call) and is_replay(record) and _is_forward(record)):
            continue
        if record.parent in at:
            # A call inside the same one, whose ops were repeated before, stays before it.
            owner, child = at[record.parent], last
            while child >= 0 and parents[child] != owner:
                child = parents[child]
            last = ends[child] if child >= 0 else owner
        elif record.parent not in seen:
            continue
        seen.add(record.seq)
        after.setdefault(last, []).append(record)
    for i, record in enumerate(ran):
        yield record
        yield from after.get(i, [])


def _is_forward(record: Made) -> bool:
    """Whether a record is of the program as it ran forward: no gradient, nothing recomputed."""
    return not isinstance(record, Call) or (record.phase != "backward" and not record.recompute)


def _made_by(record: Made, modules: Mapping[str, Module]) -> list[Variable]:
    """What a call gave back, as a variable with its name; without a text if it gave no tensor."""
    if isinstance(record, Call):
        name = record.op or shown_path(modules, record.module or "")
        told = "" if record.exception is None else f"raised {record.exception}"
        return [Variable(name, told, tensors=[("", id) for _, id in record.outputs[:1]])]
    if isinstance(record, Action) and record.tensor is not None:
        value = record.detail.get("value", "")
        told = number_text(value) if isinstance(value, float) else str(value)
        return [Variable(record.action, told, tensors=[("", record.tensor)])]
    return []
