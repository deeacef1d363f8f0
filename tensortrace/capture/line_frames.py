"""One traced frame: its trace function, which turns what Python tells into drafts of lines.

Hot: `FrameTrace.event` runs at every line. A line gets its seq when it begins, before the calls
that it makes, and what it changed when the next thing happens in its frame.
"""

from __future__ import annotations

import inspect
import opcode
import time
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.active import here
from tensortrace.capture.line_drafts import LineDraft, VariableDraft
from tensortrace.capture.values import ATOMS, Held, Words
from tensortrace.capture.variables import NEW, Change, Variables

if TYPE_CHECKING:
    from tensortrace.capture.lines import LineTracer
    from tensortrace.capture.tensors import TensorDraft

_no_functions = torch._C.DisableTorchFunction
_clock = time.perf_counter_ns
# A line that runs over and over is recorded so many times, then at powers of two.
_FIRST = 3
_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
# After a return event with the value None, the instruction tells whether there was a return.
_RETURNS = frozenset({
    "RETURN_VALUE", "RETURN_CONST", "RETURN_GENERATOR", "YIELD_VALUE", "YIELD_FROM", "SEND",
    "INSTRUMENTED_RETURN_VALUE", "INSTRUMENTED_RETURN_CONST", "INSTRUMENTED_YIELD_VALUE",
})  # fmt: skip
_ENDS_OF_LOOPS = frozenset({"FOR_ITER", "SEND", "YIELD_FROM", "END_ASYNC_FOR", "END_SEND"})
_STOPS = (StopIteration, StopAsyncIteration, GeneratorExit)


def is_taken(nth: int) -> bool:
    """Whether a thing that happens over and over is recorded this time (from 0)."""
    return nth < _FIRST or not (nth + 1) & nth


class FrameTrace:
    """The trace function of one frame.

    Args:
        tracer: whose frame it is.
        code: of the frame.
        depth: frames of the user's above it that are traced.
        theirs: the trace function that the frame would have without us, called as before.
    """

    __slots__ = (
        "_counts", "_line", "_nth", "_parent", "_passed", "_seq", "_shapes", "_since", "_step",
        "_suspended", "code", "depth", "first", "local", "recorded", "theirs", "tracer",
        "variables", "with_line",
    )  # fmt: skip

    def __init__(self, tracer: LineTracer, code: CodeType, depth: int, theirs: Any) -> None:
        self.tracer, self.code, self.depth, self.theirs = tracer, code, depth, theirs
        self.variables = Variables(tracer.reader, code)
        self.local = self.event
        self.with_line = 0  # of a block: where it begins
        self.recorded = True
        self.first = 0  # the seq of its first record in the step
        self._step = -1
        self._suspended = False
        self._forget_counts()
        self._line = self._nth = self._seq = self._since = 0
        self._parent: int | None = None

    def _forget_counts(self) -> None:
        self._counts: dict[int, int] = {}
        self._passed: dict[int, int] = {}
        self._shapes: dict[tuple[int, str], Any] = {}

    # ---- what Python calls

    def event(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Take a line, return or exception; Python's trace function. Hot."""
        now = _clock()
        tracer = self.tracer
        if self.theirs is not None:
            self.theirs = self.theirs(frame, event, arg) or self.theirs
            tracer.stay()
        if tracer.is_listening():
            here.busy += 1
            try:
                with _no_functions():
                    self._take(frame, event, arg, now)
            except Exception as error:
                tracer.recorder.fault("lines", error)
            finally:
                here.busy -= 1
        self._since = _clock()
        return self.local

    def _take(self, frame: FrameType, event: str, arg: Any, now: int) -> None:
        changes = self.variables.look(frame.f_locals)
        if self._step != self.tracer.recorder.step:
            self._turn_over(frame, changes)
        if event == "line":
            self._finish(frame, changes, now)
            self._begin(frame.f_lineno)
        elif event == "return":
            self._finish(frame, changes, now)
            self._returns(frame, arg)
        elif event == "exception":
            self._raises(frame, changes, arg, now)

    # ---- entering and leaving

    def enter(self, frame: FrameType) -> None:
        """The frame begins, or a block begins in it: say what its variables are."""
        changes = self.variables.look(frame.f_locals)
        draft = self._draft("call", frame.f_lineno, self._new_step())
        self._describe(draft, changes, self.with_line > 0)
        self._pend(draft, frame)

    def resume(self, frame: FrameType) -> None:
        """A generator or coroutine goes on."""
        if self._suspended:
            self._suspended = False
            return  # an await, which is no return
        if self._step != self.tracer.recorder.step:
            self._turn_over(frame, self.variables.look(frame.f_locals))
            return
        draft = self._draft("call", frame.f_lineno, self.tracer.recorder.next_seq())
        self._describe(draft, self.variables.look(frame.f_locals), False)
        self._pend(draft, frame)

    def wake(self, frame: FrameType) -> None:
        """Steps are followed again, from the middle of a line on."""
        self.variables.look(frame.f_locals)
        self._line = frame.f_lineno

    def close(self, frame: FrameType) -> None:
        """The block in this frame ends."""
        if self._line and self._line != self.with_line:
            changes = self.variables.look(frame.f_locals)
            if self._step != self.tracer.recorder.step:
                self._turn_over(frame, changes)
            self._finish(frame, changes, _clock())
        self._line = 0

    def _new_step(self) -> int:
        recorder = self.tracer.recorder
        self._step = recorder.step
        self._forget_counts()
        self.first = recorder.next_seq()
        return self.first

    def _turn_over(self, frame: FrameType, changes: list[Change]) -> None:
        """A step began while a line ran: say what the variables are, but those it changed."""
        draft = self._draft("call", self._line or frame.f_lineno, self._new_step())
        fresh = {name for name, _, _ in changes}
        tell = self.tracer.tell
        found = frame.f_locals
        for name, kept in self.variables.known.items():
            if name not in fresh and name in found:
                words = self._words(found[name], kept, None)
                draft.changed.append(VariableDraft(name, words, words.say(tell)))
        self._pend(draft, frame)
        if self._line:
            self._seq = self.tracer.recorder.next_seq()
            self._nth = 0
            self._counts[self._line] = 1
            self.recorded = True

    # ---- lines

    def _begin(self, line: int) -> None:
        nth = self._counts.get(line, 0)
        self._counts[line] = nth + 1
        self._line, self._nth = line, nth
        self._seq = self.tracer.recorder.next_seq()
        self._parent = self.tracer.parent()
        self.recorded = not self.tracer.thin or is_taken(nth)

    def _finish(self, frame: FrameType, changes: list[Change], now: int) -> None:
        """The line in flight is over. Hot: most of those passed over end here."""
        line = self._line
        if not line:
            return
        self._line = 0
        reshaped = self._reshapes(line, changes) if changes else False
        if not self.recorded and not reshaped:
            self._passed[line] = self._passed.get(line, 0) + 1
            return
        draft = self._draft("line", line, self._seq)
        draft.parent, draft.nth = self._parent, self._nth
        draft.passed_over = self._passed.pop(line, 0)
        draft.host_ns = now - self._since
        self._describe(draft, changes, False)
        self._pend(draft, frame)

    def _reshapes(self, line: int, changes: list[Change]) -> bool:
        """Whether a tensor that the line changed has another shape than the last time it did."""
        found = False
        for name, value, _ in changes:
            if isinstance(value, torch.Tensor):
                shape = value.shape if value.layout is not torch.jagged else None
                key = (line, name)
                if key in self._shapes and self._shapes[key] != shape:
                    found = True
                self._shapes[key] = shape
        return found

    def _returns(self, frame: FrameType, value: Any) -> None:
        name = opcode.opname[self.code.co_code[frame.f_lasti]] if frame.f_lasti >= 0 else ""
        if value is None and name not in _RETURNS:
            self.tracer.ended_by_exception(self)
            return
        yields = name.removeprefix("INSTRUMENTED_") in ("YIELD_VALUE", "YIELD_FROM", "SEND")
        if yields and (self.code.co_flags & _COROUTINE or _is_await(self.code, value)):
            self._suspended = True
            return
        draft = self._draft("return", frame.f_lineno, self.tracer.recorder.next_seq())
        words = self.tracer.reader.words(value, self._describer(draft))
        draft.value = VariableDraft("yield" if yields else "return", words, None)
        self._pend(draft, frame)

    def _raises(self, frame: FrameType, changes: list[Change], arg: Any, now: int) -> None:
        kind, error = arg[0], arg[1]
        if issubclass(kind, _STOPS):
            name = opcode.opname[self.code.co_code[frame.f_lasti]]
            if name.removeprefix("INSTRUMENTED_") in _ENDS_OF_LOOPS:
                return  # how a loop ends
        recorded = self.recorded
        self._finish(frame, changes, now)
        if not recorded:
            return
        draft = self._draft("exception", frame.f_lineno, self.tracer.recorder.next_seq())
        words = Words(self.tracer.reader.limit)
        words.pieces.append(_exception_text(kind, error))
        draft.value = VariableDraft("exception", words, None)
        self._pend(draft, frame)

    # ---- drafts

    def _draft(self, what: str, line: int, seq: int) -> LineDraft:
        tracer = self.tracer
        recorder = tracer.recorder
        location = recorder.sources.locate_line(self.code, line)
        draft = LineDraft(what, recorder.step, seq, location, tracer.tell)
        draft.update, draft.frame, draft.depth = recorder.update, self.first, self.depth
        draft.parent = tracer.parent()
        if not recorder.owns_thread():
            draft.thread = recorder.thread_number()
        return draft

    def _describe(self, draft: LineDraft, changes: list[Change], sparing: bool) -> None:
        describe = self._describer(draft, sparing)
        for name, value, old in changes:
            kept = self.variables.known.get(name)
            was: Words | str | None = None
            if old is not NEW:
                was = old.words if isinstance(old, Held) else self._atom(old)
            draft.changed.append(VariableDraft(name, self._words(value, kept, describe), was))

    def _atom(self, value: Any) -> Words | None:
        return self.tracer.reader.words(value, _none) if type(value) in ATOMS else None

    def _words(self, value: Any, kept: Any, describe: Any) -> Words:
        """Words for a value; kept with what is known of it. Without `describe`: those kept."""
        if describe is None and isinstance(kept, Held) and kept.words is not None:
            known = Words(None)
            known.pieces = list(kept.words.pieces)
            known.text = kept.words.text
            return known
        words = self.tracer.reader.words(value, describe or self.tracer.head_only)
        if describe is None:
            words.tensors = []
        if isinstance(kept, Held):
            kept.words = words
        return words

    def _describer(self, draft: LineDraft, sparing: bool = False) -> Any:
        tracer = self.tracer

        def describe(tensor: torch.Tensor) -> tuple[int, TensorDraft]:
            return tracer.describe(tensor, draft.tensors, sparing)

        return describe

    def _pend(self, draft: LineDraft, frame: FrameType) -> None:
        recorder = self.tracer.recorder
        draft.end = recorder._seq
        self.tracer.told(self, draft, frame)
        recorder.pend(draft)


def _none(tensor: torch.Tensor) -> Any:
    raise TypeError("no tensor is plain")


def _is_await(code: CodeType, value: Any) -> bool:
    if not code.co_flags & inspect.CO_ASYNC_GENERATOR:
        return False
    # What an async generator yields is wrapped; whatever else comes out of it is an await's.
    return type(value).__name__ != "async_generator_wrapped_value"


def _exception_text(kind: Any, error: Any) -> str:
    name = getattr(kind, "__name__", str(kind))
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    return f"{name}: {text}" if text else name
