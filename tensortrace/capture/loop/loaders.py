"""Where DataLoaders are asked for batches, and whether the loop that asks goes on.

While it does, nothing but the next batch ends a step. A batch that is fetched once and used again
and again, or batches that are kept in a list, are asked for by no loop round their turns.
"""

from __future__ import annotations

import weakref
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import CodeType, FrameType
from typing import Any, NamedTuple

from tensortrace.capture.loop.rounds import Frames, Round, Rounds

_GENERATORS = CO_GENERATOR | CO_ASYNC_GENERATOR
_NEXT = frozenset({"__next__", "__anext__"})


class Asking(NamedTuple):
    """A loop that asks for batches: its frame, itself, and whether each turn asks for one."""

    frame: FrameType
    around: Round
    always: bool


class _Iteration:
    """Where one began, where it was asked last and how often; `handed` by an iterator round it."""

    __slots__ = ("asked", "began", "handed", "times")

    def __init__(self, began: Frames) -> None:
        self.began = began
        self.asked: Frames = {}
        self.times = 0
        self.handed = False


class Loaders:
    """The iterations that live; keeps none alive."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._met: weakref.WeakKeyDictionary[Any, _Iteration] = weakref.WeakKeyDictionary()
        # Loops, by their first instruction, that have asked an iteration again.
        self._asking: weakref.WeakKeyDictionary[CodeType, set[int]] = weakref.WeakKeyDictionary()

    def began(self, batches: Any, frame: FrameType) -> None:
        """An iteration begins, or begins anew, in the code of a frame."""
        self._met[batches] = _Iteration(self._rounds.frames(frame))

    def fetched(self, batches: Any, frame: FrameType) -> None:
        """An iteration has handed out a batch to the code of a frame."""
        iteration = self._met.get(batches)
        if iteration is None:  # it began before the run
            iteration = self._met[batches] = _Iteration({})
        iteration.asked = self._rounds.frames(frame)
        iteration.times += 1
        code = frame.f_code
        iteration.handed = bool(code.co_flags & _GENERATORS) or code.co_name in _NEXT

    def asking(self, frame: FrameType) -> Asking | None:
        """The loop that asks for batches and is at the code of a frame now."""
        if not self._met:
            return None
        for iteration in list(self._met.values()):
            found = self._rounds.shared(iteration.asked, frame)
            if found is not None:
                code, at = iteration.asked[id(found[0])]
                always = self._rounds.is_head(code, at)
                if always or self._asks_on(iteration, *found):
                    return Asking(*found, always)
        return None

    def _asks_on(self, iteration: _Iteration, frame: FrameType, around: Round) -> bool:
        """Whether a loop that has asked an iteration for a batch will do so again.

        It may make one for the sake of a batch, each time.
        """
        code = frame.f_code
        known = self._asking.setdefault(code, set())
        head = min(around)
        if iteration.times > 1:
            known.add(head)
        if head in known or iteration.handed:
            return True
        _, began = iteration.began.get(id(frame), (None, -1))
        return began not in around
