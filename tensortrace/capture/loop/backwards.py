"""Backwards that a turn of the loop is sure to come to, told by where those before were called.

What goes round before one is a loop inside the turn: it looks for a fixed point, plays a game, goes
on from what a model has just learnt.
"""

from __future__ import annotations

import itertools
from types import CodeType, FrameType

from tensortrace.capture.loop.rounds import Frames, Rounds
from tensortrace.capture.source import SourceLines

# In one loop: a turn of some networks with a loss each.
_MOST = 8


class Backwards:
    """Where backward was called in the thread whose loop is followed, in whatever step.

    Args:
        rounds: the loops of the program.
        sources: tell the user's own code.
    """

    def __init__(self, rounds: Rounds, sources: SourceLines) -> None:
        self._rounds, self._sources = rounds, sources
        # By the way to it, the last one last.
        self._called: dict[tuple[tuple[int, int], ...], Frames] = {}

    def remember(self, frame: FrameType | None) -> None:
        """A backward was called in a frame."""
        backward = self._rounds.frames(frame, self._sources.is_user)
        way = tuple((id(code), at) for code, at in backward.values())
        self._called.pop(way, None)
        if len(self._called) >= _MOST:
            del self._called[next(iter(self._called))]
        self._called[way] = backward

    def lie_ahead(self, frame: FrameType | None, last: Frames, *, done: bool, learnt: bool) -> bool:
        """Whether the turn is sure to come to one, from a loop inside it that has none.

        Args:
            frame: where a module is called now.
            last: where one was called before.
            done: whether the step in flight has had a backward: the last one.
            learnt: whether it has since that call.
        """
        called = list(self._called.values())
        if done:
            del called[-1:]
        return any(self._comes_to(frame, last, learnt, backward) for backward in called)

    def _comes_to(
        self, frame: FrameType | None, last: Frames, learnt: bool, backward: Frames
    ) -> bool:
        met = self._parting(frame, backward)
        if met is None:
            return False
        parting, at, inside = met
        code, now, rounds = parting.f_code, parting.f_lasti, self._rounds
        before, then = last.get(id(parting), (None, 0))
        if before is not code:
            return False
        # In the same call of a function as before it goes on, if nothing was learnt meanwhile.
        goes_on = rounds.call(code, now) == rounds.call(code, then) and inside and not learnt
        if not (goes_on or rounds.stays(code, then, now, at)):
            return False
        around = rounds.of(code, now)
        loops = [(code, around)] if around is not None and at not in around else []
        for each in inside:
            around = rounds.of(each.f_code, each.f_lasti)
            loops += [(each.f_code, around)] if around is not None else []
        trained = [place for frames in self._called.values() for place in frames.values()]
        if not loops or any(c is code and i in loop for code, loop in loops for c, i in trained):
            return False
        return rounds.comes_to(code, now, at)

    def _parting(
        self, frame: FrameType | None, backward: Frames
    ) -> tuple[FrameType, int, list[FrameType]] | None:
        """Where the way to what is called now parts from the one to an earlier backward.

        Returns:
            The innermost frame of both; where in it the backward was called; the frames inside it.
            None unless the innermost loop round that backward goes round this call, too.
        """
        inside: list[FrameType] = []
        places = list(backward.items())
        below = list(itertools.takewhile(lambda place: not self._goes_round(*place[1]), places))
        if len(below) == len(places):
            return None
        number, (code, at) = places[len(below)]
        while frame is not None and (id(frame) != number or frame.f_code is not code):
            if self._sources.is_user(frame.f_code):
                inside.append(frame)
            frame = frame.f_back
        if frame is None or frame.f_lasti not in (self._rounds.of(code, at) or ()):
            return None
        call = self._rounds.call
        while below and inside and call(code, frame.f_lasti) == call(code, at):
            code, at = below.pop()[1]
            frame = inside.pop()
            if frame.f_code is not code:
                return None
        return frame, at, inside

    def _goes_round(self, code: CodeType, at: int) -> bool:
        """Whether a loop of the program's own goes round a place."""
        own = self._sources.is_user(code) and self._sources.is_own(code)
        return own and self._rounds.of(code, at) is not None
