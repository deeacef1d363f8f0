"""Loops of the program: which of them goes round a place, told by its frames and their bytecode."""

from __future__ import annotations

import bisect
import dis
from collections.abc import Callable
from types import CodeType, FrameType
from typing import NamedTuple, TypeAlias

# A loop: the instructions of a function that run again and again.
Round: TypeAlias = frozenset[int]
# Where something happened: code and instruction of each frame, by the frame's id, innermost first.
# No frame is kept alive; an id that is used again is hardly ever of the same code.
Frames: TypeAlias = dict[int, tuple[CodeType, int]]

_RETURNS = frozenset({"RETURN_VALUE", "RETURN_CONST"})
_ENDS = _RETURNS | {"RAISE_VARARGS", "RERAISE"}
# What waits in `await` and `yield from` goes round by itself.
_WAITS = frozenset({"JUMP_BACKWARD_NO_INTERRUPT"})
_ALWAYS = frozenset({"JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD"}) | _WAITS
# Python 3.10 counts where an exception is handled among the jumps, later ones have a table for it.
_SETS_UP = ("SETUP_FINALLY", "SETUP_WITH", "SETUP_ASYNC_WITH")
_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs} - {dis.opmap.get(name) for name in _SETS_UP})
# A program that makes functions as it goes would fill memory with them.
_MOST_CODES = 2000


class Rounds:
    """The loops of functions, each read once.

    Args:
        is_own: whether code is the user's own, as its file tells.
    """

    def __init__(self, is_own: Callable[[CodeType], bool]) -> None:
        self._asks_own = is_own
        self._own: dict[str, bool] = {}  # by file
        # By id, since to hash code takes longer than all else; what is read keeps its code.
        self._read: dict[int, _Read] = {}
        self._outermost: tuple[int, CodeType | None] = 0, None

    def enter(self, frame: FrameType | None) -> None:
        """Look no further out than a frame, in which the trace begins, as long as it lives."""
        self._outermost = (0, None) if frame is None else (id(frame), frame.f_code)

    def _is_own(self, code: CodeType) -> bool:
        own = self._own.get(code.co_filename)
        if own is None:
            own = self._own[code.co_filename] = self._asks_own(code)
        return own

    def frames(
        self, frame: FrameType | None, where: Callable[[CodeType], bool] | None = None
    ) -> Frames:
        """Where a frame is, and those that called it; of some code only, if `where` says. Hot."""
        found: Frames = {}
        end, last = self._outermost
        while frame is not None:
            code = frame.f_code
            if where is None or where(code):
                found[id(frame)] = code, frame.f_lasti
            if id(frame) == end and code is last:
                break
            frame = frame.f_back
        return found

    def of(self, code: CodeType, at: int) -> Round | None:
        """The innermost loop round an instruction."""
        return next((each for each in self._of(code).rounds if at in each), None)

    def shared(self, then: Frames, frame: FrameType | None) -> tuple[FrameType, Round] | None:
        """The innermost loop round what happened before, if what happens now is in it, too.

        Args:
            then: where something happened.
            frame: where something happens now.
        Returns:
            The loop and its frame, of those that are at both; None too where what happens now is in
            a loop of its own.
        """
        inside = False
        while frame is not None:
            code, before = then.get(id(frame), (None, 0))
            if code is frame.f_code:
                around = self.of(code, before)
                if around is not None:
                    return (frame, around) if frame.f_lasti in around else None
                if self.of(code, frame.f_lasti) is not None:
                    return None
                # A trainer of another package calls for one batch whatever loops are the user's.
                if inside and self._is_own(code):
                    return None
            elif self._is_own(frame.f_code):
                inside = inside or self.of(frame.f_code, frame.f_lasti) is not None
            frame = frame.f_back
        return None

    def is_ahead(self, code: CodeType, then: int, now: int) -> bool:
        """Whether a frame comes from one call to another without a turn of a loop round both."""
        read = self._of(code)
        if (then, now) not in read.ahead:
            read.ahead[then, now] = _leads(read, self.call(code, then), self.call(code, now))
        return read.ahead[then, now]

    def comes_to(self, code: CodeType, now: int, later: int) -> bool:
        """Whether a frame comes to a later call whatever it does, but for raising an exception.

        In the same turn of the innermost loop round both; without one, before it returns.
        """
        read = self._of(code)
        if (now, later) not in read.sure:
            read.sure[now, later] = _comes_to(read, self.call(code, now), self.call(code, later))
        return read.sure[now, later]

    def stays(self, code: CodeType, then: int, now: int, later: int) -> bool:
        """Whether a frame comes from one call to another in one turn of the loop round a later."""
        read = self._of(code)
        then, now, later = (self.call(code, at) for at in (then, now, later))
        if (then, now, later) not in read.stays:
            reached = _reach(read.after[then], read.after, end=_head(read, now, later))
            read.stays[then, now, later] = now in reached
        return read.stays[then, now, later]

    def is_head(self, code: CodeType, at: int) -> bool:
        """Whether an instruction is the head of a `for`.

        Python 3.10 says of one whose loop is long where its EXTENDED_ARGs begin.
        """
        read = self._of(code)
        i = bisect.bisect(read.starts, at) - 1
        while read.names[i] == "EXTENDED_ARG":
            i += 1
        return read.names[i] == "FOR_ITER"

    def call(self, code: CodeType, at: int) -> int:
        """Which call a frame is in. Python 3.11 has two instructions for one, and runs either."""
        read = self._of(code)
        i = bisect.bisect(read.starts, at) - 1
        return read.starts[i + (read.names[i] == "PRECALL")]

    def _of(self, code: CodeType) -> _Read:
        read = self._read.get(id(code))
        if read is None:
            if len(self._read) >= _MOST_CODES:
                self._read.clear()
            read = self._read[id(code)] = _read(code)
        return read


class _Read(NamedTuple):
    code: CodeType
    starts: list[int]
    names: list[str]
    rounds: list[Round]
    after: dict[int, list[int]]
    ahead: dict[tuple[int, int], bool]
    sure: dict[tuple[int, int], bool]
    stays: dict[tuple[int, int, int], bool]


def _read(code: CodeType) -> _Read:
    """The natural loops of a function, the smallest first.

    Source: Aho, Sethi and Ullman, Compilers (1986), section 10.4. What handles an exception is
    reached by no jump; it is part of the loop to whose head it jumps.
    """
    made = list(dis.get_instructions(code))
    starts = [each.offset for each in made]
    after, before = _edges(made)
    heads: dict[int, list[int]] = {}
    for each in made:
        if each.opcode in _JUMPS and each.opname not in _WAITS and each.argval <= each.offset:
            heads.setdefault(each.argval, []).append(each.offset)
    rounds = []
    for head, jumps in heads.items():
        reached = _reach([head], after)
        # An exception's handler that jumps back into the middle of what it guards makes no loop.
        if not reached.isdisjoint(jumps):
            rounds.append(_reach(jumps, before, end=head) | {head})
    ends = dict(zip(starts, [*starts[1:], len(code.co_code)], strict=True))
    # With what an instruction keeps behind it, where a frame may be while it calls.
    whole = [frozenset(i for s in body for i in range(s, ends[s], 2)) for body in rounds]
    names = [each.opname for each in made]
    return _Read(code, starts, names, sorted(whole, key=len), after, {}, {}, {})


def _leads(read: _Read, then: int, now: int) -> bool:
    """Whether one instruction leads to another without the head of the innermost loop of both."""
    head = _head(read, then, now)
    if now in _reach(read.after[then], read.after, end=head):
        return True
    # No jump leads to what handles an exception: it stands behind what it guards.
    return now > then and now not in _reach([head or 0], read.after)


def _comes_to(read: _Read, now: int, later: int) -> bool:
    """Whether nothing leads from one instruction to its loop's head or a return but by a later."""
    reached = _reach(read.after[now], read.after, end=later)
    names = dict(zip(read.starts, read.names, strict=True))
    returns = any(names[at] in _RETURNS for at in reached)
    return now != later and not returns and _head(read, now, later) not in reached


def _head(read: _Read, one: int, other: int) -> int | None:
    """The head of the innermost loop round two instructions."""
    return next((min(each) for each in read.rounds if one in each and other in each), None)


def _edges(made: list[dis.Instruction]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """What may run after each instruction, and before it; what waits is taken to wait once.

    From Python 3.13 on a handler that goes on jumps back the same way, but to no SEND.
    """
    sends = {each.offset for each in made if each.opname == "SEND"}
    after: dict[int, list[int]] = {each.offset: [] for each in made}
    before: dict[int, list[int]] = {each.offset: [] for each in made}
    for each, following in zip(made, [*made[1:], None], strict=True):
        waits = each.opname in _WAITS and each.argval in sends
        targets = [each.argval] if each.opcode in _JUMPS and not waits else []
        if following is not None and each.opname not in _ENDS and each.opname not in _ALWAYS:
            targets.append(following.offset)
        for target in targets:
            after[each.offset].append(target)
            before[target].append(each.offset)
    return after, before


def _reach(start: list[int], edges: dict[int, list[int]], end: int | None = None) -> set[int]:
    """Where edges lead from some instructions, not beyond `end`."""
    found: set[int] = set()
    todo = list(start)
    while todo:
        at = todo.pop()
        if at not in found and at != end:
            found.add(at)
            todo += edges[at]
    return found
