"""Counts the calls of functions whose lines are not all followed."""

from __future__ import annotations

from types import CodeType
from typing import TYPE_CHECKING

from tensortrace.capture.lines.drafts import LineDraft

if TYPE_CHECKING:
    from tensortrace.capture.lines.tracer import LineTracer


class _Missed:
    """Calls of one function that were not followed since one that was; the last of them."""

    __slots__ = ("code", "count", "depth", "seq", "thread")

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.count = self.seq = self.depth = self.thread = 0


class Calls:
    """The calls of one tracer in the step in flight.

    Args:
        tracer: whose they are.
    """

    def __init__(self, tracer: LineTracer) -> None:
        self._tracer = tracer
        self._step = -1
        self._counts: dict[int, int] = {}
        # By the id of their code, which they keep.
        self._missed: dict[int, _Missed] = {}

    def count(self, code: CodeType) -> int:
        """Count a call of a decorated function; returns which one it is in the step, from 0."""
        self._turn_over()
        nth = self._counts.get(id(code), 0)
        self._counts[id(code)] = nth + 1
        return nth

    def miss(self, code: CodeType, depth: int) -> None:
        """Count a call that is not followed."""
        self._turn_over()
        missed = self._missed.get(id(code))
        if missed is None:
            missed = self._missed[id(code)] = _Missed(code)
        recorder = self._tracer.recorder
        missed.count += 1
        missed.seq, missed.depth = recorder.next_seq(), depth
        missed.thread = 0 if recorder.owns_thread() else recorder.thread_number()

    def take(self, code: CodeType) -> int:
        """How many calls were not followed before one that is."""
        self._turn_over()
        missed = self._missed.pop(id(code), None)
        return 0 if missed is None else missed.count

    def settle(self) -> None:
        """The step ends: record the last call of each function that was not followed since."""
        self._turn_over()
        tracer = self._tracer
        recorder = tracer.recorder
        for missed in sorted(self._missed.values(), key=lambda one: one.seq):
            line = tracer.definition_line(missed.code)
            location = recorder.sources.locate_line(missed.code, line)
            draft = LineDraft(
                "call", recorder.step, missed.seq, location, tracer.tensor_words.say
            )  # fmt: skip
            draft.update, draft.frame, draft.depth = recorder.update, missed.seq, missed.depth
            draft.thread, draft.passed_over = missed.thread, missed.count - 1
            recorder.pend(draft)
        self._missed.clear()

    def _turn_over(self) -> None:
        if self._step != self._tracer.recorder.step:
            self._step = self._tracer.recorder.step
            self._counts.clear()
            self._missed.clear()
