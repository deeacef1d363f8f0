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

from tensortrace.capture.active import here, slot
from tensortrace.capture.line_drafts import LineDraft, VariableDraft
from tensortrace.capture.reader import Held, Words
from tensortrace.capture.variables import NEW, Change, Variables

if TYPE_CHECKING:
    from tensortrace.capture.lines import LineTracer
    from tensortrace.capture.tensors import TensorDraft

_no_functions = torch._C.DisableTorchFunction
_clock = time.perf_counter_ns
# A line that runs over and over is recorded so many times, then at powers of two.
_FIRST = 3
_ASYNCHRONOUS = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR
# After a return event with the value None, the instruction tells whether there was a return.
_YIELDS = frozenset({"YIELD_VALUE", "YIELD_FROM", "SEND"})
_RETURNS = _YIELDS | {"RETURN_VALUE", "RETURN_CONST", "RETURN_GENERATOR"}
_ENDS_OF_LOOPS = frozenset({"FOR_ITER", "SEND", "YIELD_FROM", "END_ASYNC_FOR", "END_SEND"})
_STOPS = (StopIteration, StopAsyncIteration, GeneratorExit)


def is_taken(nth: int) -> bool:
    """Whether a thing that happens over and over is recorded this time (from 0)."""
    return nth < _FIRST or not (nth + 1) & nth


class _Passed:
    """The executions of a line that were passed over since its last record."""

    __slots__ = ("count", "first", "host_ns", "nth", "seq")

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = self.seq = self.nth = self.host_ns = 0


class FrameTrace:
    """The trace function of one frame.

    Args:
        tracer: whose frame it is.
        code: of the frame.
        depth: frames of the user's above it that are traced.
        theirs: the trace function that the frame would have without us, called as before.
    """

    __slots__ = (
        "_counts",
        "_entered_ns",
        "_goes_on",
        "_line",
        "_nth",
        "_owed",
        "_parent",
        "_passed",
        "_seq",
        "_shapes",
        "_since",
        "_step",
        "_suspended",
        "code",
        "depth",
        "expressions",
        "first",
        "local",
        "recorded",
        "theirs",
        "tracer",
        "variables",
        "with_line",
    )  # fmt: skip

    def __init__(self, tracer: LineTracer, code: CodeType, depth: int, theirs: Any) -> None:
        self.tracer, self.code, self.depth, self.theirs = tracer, code, depth, theirs
        self.variables = Variables(tracer.reader, code)
        self.expressions = Variables(tracer.reader, None)
        self.local = self.event
        self.with_line = 0  # of a block: where it begins
        self.recorded = True
        self.first = 0  # the seq of its first record in the step
        self._step = -1
        self._suspended = self._goes_on = False
        # Of the step in flight, by line.
        self._counts: dict[int, int] = {}
        self._passed: dict[int, _Passed] = {}
        # What lines changed that were passed over: by name, which line, and what was there before.
        self._owed: dict[str, tuple[int, Any]] = {}
        self._shapes: dict[tuple[int, str], Any] = {}
        self._line = self._nth = self._seq = 0
        self._parent: int | None = None
        self._entered_ns = self._since = _clock()

    # ---- what Python calls

    def event(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Take a line, return or exception; Python's trace function. Hot."""
        if torch.compiler.is_compiling():
            return None  # Dynamo looks at us too
        now = _clock()
        tracer = self.tracer
        if self.theirs is not None:
            self.theirs = self.theirs(frame, event, arg) or self.theirs
            tracer.stay()
        recorder = tracer.recorder
        if slot.recorder is recorder and recorder.full and not here.busy and recorder.on["lines"]:
            here.busy += 1
            try:
                with _no_functions():
                    self._take(frame, event, arg, now)
            except Exception as error:
                recorder.fault("lines", error)
            finally:
                here.busy -= 1
        self._since = _clock()
        return self.local

    def _take(self, frame: FrameType, event: str, arg: Any, now: int) -> None:
        if event == "return" and self._is_await(frame, arg):
            self._suspended = True
            return  # in the middle of a line
        changes = self._look(frame)
        if self._step != self.tracer.recorder.step:
            self._turn_over(frame, changes)
        if event == "line":
            self._finish(frame, changes, now)
            self._begin(frame)
        elif event == "return":
            self._finish(frame, changes, now)
            self._returns(frame, arg)
        elif event == "exception":
            self._raises(frame, changes, arg, now)

    def _look(self, frame: FrameType) -> list[Change]:
        """What changed since the last look. Hot."""
        changes = self.variables.look(frame.f_locals)
        watched = self.tracer.watched
        if watched is not None and self.recorded:
            found = watched.values(frame).items()
            # A name is a variable already.
            changes += self.expressions.look({k: v for k, v in found if k not in frame.f_locals})
        return changes

    # ---- entering and leaving

    def enter(self, frame: FrameType) -> None:
        """The frame begins, or a block begins in it: say what its variables are."""
        block = self.with_line > 0
        line = frame.f_lineno if block else self.tracer.definition_line(self.code)
        draft = self._draft("call", line, self._new_step())
        self._describe(draft, self._look(frame), sparing=block)
        self._tell_changes(frame, draft, starting=not block)
        if not block:
            self._tell_line(frame, line, "call")
        self._pend(draft)

    def resume(self, frame: FrameType) -> None:
        """A generator or coroutine goes on."""
        if self._suspended:
            self._suspended = False
            return  # from an await, which was no return
        changes = self._look(frame)
        if self._step != self.tracer.recorder.step:
            self._turn_over(frame, changes)
        draft = self._draft("call", frame.f_lineno, self.tracer.recorder.next_seq())
        self._describe(draft, changes)
        self._tell_changes(frame, draft)
        self._tell_line(frame, frame.f_lineno, "call")
        self._pend(draft)
        # The line of the yield goes on: what was sent is yet to be assigned.
        self._line, self._goes_on = frame.f_lineno, True
        self._seq, self._since = self.tracer.recorder.next_seq(), _clock()

    def wake(self, frame: FrameType) -> None:
        """Steps are followed again, from the middle of a line on."""
        self._look(frame)
        self._line = frame.f_lineno

    def close(self, frame: FrameType) -> None:
        """The block in this frame ends."""
        if self._line and self._line != self.with_line:
            changes = self._look(frame)
            if self._step != self.tracer.recorder.step:
                self._turn_over(frame, changes)
            self._finish(frame, changes, _clock())
        if self._passed and self._step == self.tracer.recorder.step:
            self._settle(frame)
        self._line = 0

    def _new_step(self) -> int:
        recorder = self.tracer.recorder
        self._step = recorder.step
        self._counts.clear()
        self._passed.clear()
        self._owed.clear()
        self._shapes.clear()
        self.first = recorder.next_seq()
        return self.first

    def _turn_over(self, frame: FrameType, changes: list[Change]) -> None:
        """A step began while a line ran: say what the variables are, but those it changed."""
        draft = self._draft("call", self._line or frame.f_lineno, self._new_step())
        fresh = {name for name, _, _ in changes}
        for known in (self.variables.known, self.expressions.known):
            for name, kept in known.items():
                if name not in fresh:
                    words = kept.words if isinstance(kept, Held) else self._atom(kept)
                    if words is not None:
                        draft.changed.append(VariableDraft(name, words, words))
        if self.tracer.live is not None:
            self.tracer.live.step(self._step, self.depth)
        self._pend(draft)
        if self._line:
            # What began in the step before ends in this one.
            self._seq, self._nth = self.tracer.recorder.next_seq(), 0
            self._counts[self._line] = 1
            self.recorded = True

    # ---- lines

    def _begin(self, frame: FrameType) -> None:
        line = frame.f_lineno
        nth = self._counts.get(line, 0)
        self._counts[line] = nth + 1
        self._line, self._nth = line, nth
        tracer = self.tracer
        if nth == 0 and self._passed:
            self._settle(frame)
        self._seq = tracer.recorder.next_seq()
        self._parent = None
        self.recorded = nth < _FIRST or not tracer.thin or is_taken(nth)
        if self.recorded:
            self._parent = tracer.parent()
            if tracer.live is not None and line != self.with_line:
                self._tell_line(frame, line, "line")

    def _finish(self, frame: FrameType, changes: list[Change], now: int) -> None:
        """The line in flight is over. Hot: most of those passed over end here."""
        line = self._line
        if not line:
            return
        self._line = 0
        goes_on, self._goes_on = self._goes_on, False
        if goes_on and not changes:
            return
        reshaped = bool(changes) and self._reshapes(line, changes)
        if not self.recorded:
            if not reshaped:
                self._pass_over(line, changes, now)
                return
            self._tell_line(frame, line, "line")
            self._parent = self.tracer.parent()
        draft = self._draft("line", line, self._seq)
        draft.parent, draft.nth = self._parent, self._nth
        draft.host_ns = now - self._since
        self._take_in(draft, frame, line, changes)
        self._describe(draft, changes)
        self._tell_changes(frame, draft)
        self._pend(draft)

    def _pass_over(self, line: int, changes: list[Change], now: int) -> None:
        """Count an execution, and remember what the next record of the line must make up for."""
        passed = self._passed.get(line)
        if passed is None:
            passed = self._passed[line] = _Passed(self._seq)
        passed.count += 1
        passed.seq, passed.nth, passed.host_ns = self._seq, self._nth, now - self._since
        for name, _, old in changes:
            owed = self._owed.get(name)
            self._owed[name] = (line, old if owed is None else owed[1])

    def _take_in(
        self, draft: LineDraft, frame: FrameType, line: int, changes: list[Change]
    ) -> None:
        """Let a record stand for the executions of its line that were passed over before it."""
        passed = self._passed.pop(line, None)
        if passed is not None:
            draft.passed_over, draft.since = passed.count, passed.first
        if self._owed:
            for name, _, _ in changes:
                self._owed.pop(name, None)
            self._pay(line, frame, changes)

    def _pay(self, line: int, frame: FrameType, changes: list[Change]) -> None:
        names = [name for name, (by, _) in self._owed.items() if by == line]
        for name in names:
            _, old = self._owed.pop(name)
            if name in frame.f_locals:
                changes.append((name, frame.f_locals[name], old))

    def _settle(self, frame: FrameType) -> None:
        """A loop is left: record the last execution of each line that was passed over since."""
        for line, passed in self._passed.items():
            draft = self._draft("line", line, passed.seq)
            draft.nth, draft.host_ns = passed.nth, passed.host_ns
            draft.passed_over, draft.since = passed.count - 1, passed.first
            changes: list[Change] = []
            self._pay(line, frame, changes)
            if self.tracer.live is not None:
                self._tell_line(frame, line, "line")
            self._describe(draft, changes)
            self._tell_changes(frame, draft)
            self._pend(draft, passed.seq)
        self._passed.clear()
        self._owed.clear()

    def _reshapes(self, line: int, changes: list[Change]) -> bool:
        """Whether a tensor that the line changed has another shape than the last time it did."""
        found = False
        for name, value, _ in changes:
            if isinstance(value, torch.Tensor):
                shape, key = _shape(value), (line, name)
                if self._shapes.get(key, shape) != shape:
                    found = True
                self._shapes[key] = shape
        return found

    def _returns(self, frame: FrameType, value: Any) -> None:
        tracer = self.tracer
        name = _instruction(frame)
        tracer.ended |= not self.depth
        if value is None and name not in _RETURNS:
            if tracer.live is not None:
                tracer.live.left_by_exception(self.depth)
            return
        yields = name in _YIELDS
        if self._passed:
            self._settle(frame)
        if tracer.is_target(self.code):
            tracer.recorder.holds_call = True  # a step, even if torch was never called
        draft = self._draft("return", frame.f_lineno, tracer.recorder.next_seq())
        words = tracer.reader.words(value, self._describer(draft))
        draft.value = VariableDraft("yield" if yields else "return", words, None)
        self._tell_value(frame, draft.value, "return")
        self._pend(draft)

    def _is_await(self, frame: FrameType, value: Any) -> bool:
        """Whether what Python calls a return is a coroutine that waits."""
        flags = self.code.co_flags
        if not flags & _ASYNCHRONOUS or _instruction(frame) not in _YIELDS:
            return False
        # What an async generator yields is wrapped; whatever else comes out of it is an await's.
        wrapped = type(value).__name__ == "async_generator_wrapped_value"
        return not (wrapped and flags & inspect.CO_ASYNC_GENERATOR)

    def _raises(self, frame: FrameType, changes: list[Change], arg: Any, now: int) -> None:
        if issubclass(arg[0], _STOPS) and _instruction(frame) in _ENDS_OF_LOOPS:
            return  # how a loop ends
        recorded = self.recorded
        self._finish(frame, changes, now)
        if not recorded:
            return
        draft = self._draft("exception", frame.f_lineno, self.tracer.recorder.next_seq())
        words = Words(self.tracer.reader.limit)
        words.pieces.append(_exception_text(arg[0], arg[1]))
        draft.value = VariableDraft("exception", words, None)
        self._tell_value(frame, draft.value, "exception")
        self._pend(draft)

    # ---- drafts

    def _draft(self, what: str, line: int, seq: int) -> LineDraft:
        tracer = self.tracer
        recorder = tracer.recorder
        location = recorder.sources.locate_line(self.code, line)
        draft = LineDraft(what, recorder.step, seq, location, tracer.tensor_words.say)
        draft.update, draft.frame, draft.depth = recorder.update, self.first, self.depth
        draft.parent = tracer.parent()
        if not recorder.owns_thread():
            draft.thread = recorder.thread_number()
        return draft

    def _describe(self, draft: LineDraft, changes: list[Change], sparing: bool = False) -> None:
        if not changes:
            return
        describe = self._describer(draft, sparing)
        for name, value, old in changes:
            words = self.tracer.reader.words(value, describe)
            kept = self.variables.known.get(name) or self.expressions.known.get(name)
            if isinstance(kept, Held):
                kept.words = words
            was = None
            if old is not NEW:
                was = old.words if isinstance(old, Held) else self._atom(old)
            draft.changed.append(VariableDraft(name, words, was))

    def _atom(self, value: Any) -> Words:
        return self.tracer.reader.words(value, _none)

    def _describer(self, draft: LineDraft, sparing: bool = False) -> Any:
        tracer = self.tracer

        def describe(tensor: torch.Tensor) -> tuple[int, TensorDraft]:
            return tracer.describe(tensor, draft.tensors, sparing)

        return describe

    def _pend(self, draft: LineDraft, end: int | None = None) -> None:
        recorder = self.tracer.recorder
        draft.end = recorder._seq if end is None else end
        recorder.pend(draft)

    # ---- live text

    def _tell_line(self, frame: FrameType, line: int, what: str) -> None:
        live = self.tracer.live
        if live is not None:
            live.begin(frame, line, what, self.depth, self._entered_ns)

    def _tell_changes(self, frame: FrameType, draft: LineDraft, starting: bool = False) -> None:
        live = self.tracer.live
        if live is not None:
            live.source(frame, self.depth)
            if draft.passed_over:
                live.passed_over(draft.passed_over, self.depth)
            for variable in draft.changed:
                text = self.tracer.text_now(variable.words)
                live.changed(variable, text, self.depth, starting)

    def _tell_value(self, frame: FrameType, value: VariableDraft, what: str) -> None:
        live = self.tracer.live
        if live is not None:
            live.begin(frame, frame.f_lineno, what, self.depth, self._entered_ns)
            live.value(value.name, self.tracer.text_now(value.words), self.depth)


def _shape(tensor: torch.Tensor) -> Any:
    try:
        shape = tensor.shape
    except RuntimeError:
        return None  # nested
    # A jagged dim is no number, and one to a batch.
    return shape if tensor.layout is not torch.jagged else None


def _instruction(frame: FrameType) -> str:
    """The name of the instruction that a frame is at."""
    if frame.f_lasti < 0:
        return ""
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]].removeprefix("INSTRUMENTED_")


def _none(tensor: torch.Tensor) -> Any:
    raise TypeError("no tensor is plain")


def _exception_text(kind: Any, error: Any) -> str:
    name = getattr(kind, "__name__", str(kind))
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    return f"{name}: {text}" if text else name
