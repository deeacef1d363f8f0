"""One traced frame: its trace function, which turns what Python tells into drafts of lines.

Hot: `FrameTrace.event` runs at every line. A line gets its seq when it begins, before the calls
that it makes, and what it changed when the next thing happens in its frame. Where `_turns.c` is
compiled it asks `event` of lines only that are not passed over.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import CO_OPTIMIZED
from types import CodeType, FrameType, MethodType
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture import compiled
from tensortrace.capture.active import here, slot
from tensortrace.capture.dynamo import leave_to_python
from tensortrace.capture.lines.comprehensions import is_inside
from tensortrace.capture.lines.deferred import Deferred, Execution
from tensortrace.capture.lines.drafts import LineDraft, VariableDraft
from tensortrace.capture.lines.events import ends_a_loop, exception_text, is_await, is_left, yields
from tensortrace.capture.lines.namespaces import HAS_ONE_DICT
from tensortrace.capture.lines.reader import Held, Words
from tensortrace.capture.lines.thinning import Thinning
from tensortrace.capture.lines.variables import NEW, Change, Variables
from tensortrace.capture.turns import is_taken

if TYPE_CHECKING:
    from tensortrace.capture.lines.tracer import LineTracer
    from tensortrace.capture.recorder import Recorder

_no_functions = torch._C.DisableTorchFunction
_clock = time.perf_counter_ns
_compiler = torch.compiler
# Dynamo of torch 2.6 looks at trace functions, too.
_IS_COMPILED = hasattr(torch._C._dynamo.eval_frame, "skip_code")


_HOT = (
    "_closures", "_deferred", "_goes_on", "_last", "_line", "_nth", "_raised_at", "_since", "_step",
    "_thinning", "_undisturbed", "began", "has_news", "local", "recorded", "recorder", "theirs",
    "tracer", "variables",
)  # fmt: skip
_OWN = (
    "_can_defer", "_comprehensions", "_entered_ns", "_is_closed", "_outer", "_parent",
    "_suspended", "_turned_over", "code", "depth", "expressions", "first", "shares", "with_line",
)  # fmt: skip


class FrameTrace(compiled.base_of("FrameTrace", _HOT)):  # type: ignore[misc] # where it can be
    """The trace function of one frame.

    Args:
        tracer: whose frame it is.
        code: of the frame.
        depth: frames of the user's above it that are traced.
        theirs: the trace function that the frame would have without us, called as before.
    """

    __slots__ = tuple(_OWN)

    def __init__(self, tracer: LineTracer, code: CodeType, depth: int, theirs: Any) -> None:
        self.tracer, self.code, self.depth, self.theirs = tracer, code, depth, theirs
        self.recorder = tracer.recorder
        self.variables = Variables(tracer.reader, code)
        self.expressions = Variables(tracer.reader, None)
        self.with_line = 0  # of a block: where it begins
        self.recorded = True
        self.first = 0  # the seq of its first record in the step
        self._step = -1
        self._suspended = self._goes_on = False
        self._raised_at = -1  # the instruction, if an exception was the last that happened
        self._comprehensions = tracer.comprehensions(code)
        self._thinning = Thinning(tracer.statements(code))
        # Not of a file or class, where other code may store, nor of inlined comprehensions.
        optimized = code.co_flags & CO_OPTIMIZED and not self._comprehensions
        self._is_closed = tracer.is_closed(code)
        self._can_defer = bool(optimized) and tracer.watched is None and not self._is_closed
        # Other frames, and other threads, may set those that it shares.
        self.shares = HAS_ONE_DICT and bool(code.co_cellvars or code.co_freevars)
        self.local: Any = self.event
        if compiled.turns is not None and self._can_defer and tracer.thin and not _IS_COMPILED:
            self.local = MethodType(compiled.turns.follow, self)
        self._deferred: Deferred | None = None
        self._undisturbed = self._closures = 0
        self.began = 0  # the seq of the line that runs
        self.has_news = False  # whether an op in it has news, so that it is recorded after all
        self._line = self._last = self._nth = 0
        self._parent: int | None = None
        self._turned_over = False  # while a line runs in which a step began
        self._outer: FrameTrace | None = None
        self._entered_ns = self._since = _clock()

    # ---- what Python calls

    @leave_to_python
    def event(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Take a line, return or exception; Python's trace function. Hot."""
        if _compiler._is_compiling_flag or (_IS_COMPILED and _compiler.is_compiling()):
            return None
        now = _clock()
        tracer = self.tracer
        if self.theirs is not None:
            self.theirs = self.theirs(frame, event, arg) or self.theirs
            tracer.stay()
        turns = self._comprehensions
        if turns and event == "line" and is_inside(turns, frame.f_lasti):
            return self.local  # in the middle of a line
        recorder = tracer.recorder
        if slot.recorder is recorder and recorder.full and not here.busy and recorder.on["lines"]:
            if (
                not self.recorded
                and event == "line"
                and recorder.seq - recorder.plain == self._undisturbed
                and not self.has_news
                and not self.variables.has_containers
                and self._may_wait(recorder)
            ):
                self._defer(frame, now, recorder)
                return self.local
            here.busy += 1
            try:
                with _no_functions():
                    if event != "line":
                        self._take(frame, event, arg, now)
                    else:
                        self._raised_at = -1
                        changes = self._look(frame)
                        if self._step != recorder.step:
                            self._turn_over(frame, changes)
                        if self._line:
                            self._finish(frame, changes, now)
                        line = frame.f_lineno
                        self._begin(frame, line, self._thinning.begin(line, self._last, frame))
            except Exception as error:
                recorder.fault("lines", error)
            finally:
                here.busy -= 1
        self._since = _clock()
        if self.shares:
            frame.f_locals  # noqa: B018 as below
        return self.local

    def _take(self, frame: FrameType, event: str, arg: Any, now: int) -> None:
        """The frame is left, for good or for a while, or an exception was raised in it."""
        thrown = event == "return" and arg is None and self._raised_at == frame.f_lasti
        self._raised_at = frame.f_lasti if event == "exception" else -1
        if event == "return":
            here.line, self._outer = self._outer, None
        if event == "return" and not thrown and is_await(frame, arg):
            self._suspended = True
            return  # in the middle of a line
        changes = self._look(frame)
        if self._step != self.tracer.recorder.step:
            self._turn_over(frame, changes)
        if event == "return":
            self._finish(frame, changes, now)
            self._returns(frame, arg, thrown)
        elif event == "exception":
            self._raises(frame, changes, arg, now)

    def _may_wait(self, recorder: Recorder) -> bool:
        """Whether the look at the line that ends, which is passed over, can be put off. Hot."""
        return (
            self._deferred is not None
            and self._step == recorder.step
            and self._line != 0
            and not self._goes_on
            and self._closures == self.tracer.closures
        )

    def _defer(self, frame: FrameType, now: int, recorder: Recorder) -> None:
        """Begin a line without a look at what the one before it has changed. Hot."""
        deferred = self._deferred
        assert deferred is not None
        last, line = self._line, frame.f_lineno
        execution = self.began, self._nth, now - self._since, recorder.seq
        is_due = deferred.add(last, execution, line)
        if deferred.disturbed:
            deferred.disturbed.discard(last)
        self._raised_at = -1
        nth = self._thinning.begin(line, self._last, frame)
        if not is_due and not is_taken(nth):
            self._line = self._last = line
            self._nth = nth
            self.began = seq = recorder.seq
            recorder.seq = seq + 1
            self._undisturbed = seq + 1 - recorder.plain
            self._closures = self.tracer.closures
            self._since = now
            return
        self.look_back(frame, line, nth, now)

    @leave_to_python
    def look_back(self, frame: FrameType, line: int, nth: int, now: int) -> None:
        """Begin a line, after a look at what was put off."""
        self._look_back(frame, line, nth)
        self._since = _clock() if self.recorded else now
        if self.shares:
            # Once a trace function has asked for them, Python 3.10 to 3.12 writes all variables
            # back after it: as they are now, whatever another thread has done meanwhile. No other
            # thread runs between here and there.
            frame.f_locals  # noqa: B018

    def _look_back(self, frame: FrameType, line: int, nth: int) -> None:
        here.busy += 1
        try:
            with _no_functions():
                self._catch_up(frame)
                self._begin(frame, line, nth)
        except Exception as error:
            self.tracer.recorder.fault("lines", error)
        finally:
            here.busy -= 1

    def _catch_up(self, frame: FrameType) -> None:
        """Look at what was put off."""
        assert self._deferred is not None
        waiting = self._deferred.take()
        if self._step != self.tracer.recorder.step:
            return  # a frame that was not there when its step ended
        found = self._values(frame)
        for line, (names, execution) in waiting.items():
            self.look_back_at(frame, found, line, names, execution)

    def look_back_at(
        self, frame: FrameType, found: Any, line: int, names: Iterable[str], execution: Execution
    ) -> None:
        """Look at a line that was put off. Hot."""
        changes = self.variables.look_at(found, names) if names else []
        if changes and self._thinning.reshapes(line, changes):
            self._tell_line(frame, line, "line")
            self._parent = self.tracer.parent()
            self._record(frame, line, execution, changes)
        else:
            seq, nth, host_ns, end = execution
            self._thinning.pass_over(line, changes, (seq, nth, host_ns, end == seq + 1))

    def _look(self, frame: FrameType) -> list[Change]:
        """What changed since the last look. Hot."""
        if self._deferred is not None and self._deferred.lines:
            self._catch_up(frame)
        if self._comprehensions and is_inside(self._comprehensions, frame.f_lasti):
            return []  # its variables are not the function's
        values = self._values(frame)
        changes = self.variables.look(values)
        if self.tracer.watched is not None and self.recorded:
            found = self.tracer.watched.values(frame.f_globals, values).items()
            # A name is a variable already.
            changes += self.expressions.look({k: v for k, v in found if k not in values})
        return changes

    def _values(self, frame: FrameType) -> Mapping[str, Any]:
        """The variables by name; none of a function whose dict of them is its own."""
        return {} if self._is_closed else frame.f_locals

    # ---- entering and leaving

    def enter(self, frame: FrameType) -> None:
        """The frame begins, or a block begins in it: say what its variables are."""
        block = self.with_line > 0
        if self.tracer.live is not None:
            self.tracer.live.speak(self.tracer.recorder.step, self.depth)
        line = frame.f_lineno if block else self.tracer.definition_line(self.code)
        draft = self._draft("call", line, self._new_step())
        self._outer, here.line = here.line, self
        if not block:
            draft.passed_over = self.tracer.calls.take(self.code)
        self._describe(draft, self._look(frame), sparing=block)
        self._tell_changes(frame, draft, starting=not block)
        if not block:
            self._tell_line(frame, line, "call")
        self._pend(draft)

    def resume(self, frame: FrameType) -> None:
        """A generator or coroutine goes on."""
        self.tracer.waiting.pop(self, None)
        self._outer, here.line = here.line, self
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
        self.began, self._since = self.tracer.recorder.next_seq(), _clock()

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
        self.settle(frame)
        self._line = 0
        here.line, self._outer = self._outer, None

    def settle(self, frame: FrameType) -> None:
        """The step or the block ends: record the last executions that were passed over."""
        if self._step == self.tracer.recorder.step:
            if self._deferred is not None and self._deferred.lines:
                self._catch_up(frame)
            if self._thinning.passed:
                self._settle(frame)

    def _new_step(self) -> int:
        recorder = self.tracer.recorder
        self._step = recorder.step
        self._thinning.begin_step(self._line)
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
            self.began, self._nth = self.tracer.recorder.next_seq(), self._thinning.nth_in_flight
            self.recorded = self._turned_over = True

    # ---- lines

    def _begin(self, frame: FrameType, line: int, nth: int) -> None:
        """Hot."""
        thinning, tracer = self._thinning, self.tracer
        self._line = self._last = line
        self._nth = nth
        if nth == 0 and thinning.passed and thinning.is_first(nth):
            self._settle(frame)
        recorder = tracer.recorder
        self.began = seq = recorder.next_seq()
        self._undisturbed = seq + 1 - recorder.plain
        self._closures = tracer.closures
        self.has_news = False
        here.line = self
        self.recorded = not tracer.thin or is_taken(nth)
        if self.recorded:
            self._parent = tracer.parent()
            if tracer.live is not None and line != self.with_line:
                self._tell_line(frame, line, "line")
        elif self._deferred is None and self._can_defer:
            self._deferred = Deferred(tracer.stores(self.code))

    def _finish(self, frame: FrameType, changes: list[Change], now: int) -> None:
        """The line in flight is over. Hot."""
        line = self._line
        if not line:
            return
        self._line = 0
        if self._goes_on:
            self._goes_on = False
            if not changes:
                return
        thinning, recorder = self._thinning, self.tracer.recorder
        if self._deferred is not None:
            if recorder.seq - recorder.plain != self._undisturbed:
                self._deferred.disturbed.add(line)
            else:
                self._deferred.disturbed.discard(line)
        reshaped = bool(changes) and thinning.reshapes(line, changes)
        seq, nth, host_ns = self.began, self._nth, now - self._since
        if not self.recorded:
            if not reshaped and not self.has_news:
                thinning.pass_over(line, changes, (seq, nth, host_ns, recorder.seq == seq + 1))
                return
            self._tell_line(frame, line, "line")
            self._parent = self.tracer.parent()
        self._record(frame, line, (seq, nth, host_ns, recorder.seq), changes)

    def _record(
        self, frame: FrameType, line: int, execution: Execution, changes: list[Change]
    ) -> None:
        seq, nth, host_ns, end = execution
        draft = self._draft("line", line, seq)
        draft.parent, draft.nth, draft.host_ns = self._parent, nth, host_ns
        if self._turned_over:
            draft.first, self._turned_over = 0, False
        self._take_in(draft, frame, line, changes)
        self._describe(draft, changes)
        self._tell_changes(frame, draft)
        self._pend(draft, end)

    def _take_in(
        self, draft: LineDraft, frame: FrameType, line: int, changes: list[Change]
    ) -> None:
        """Let a record stand for the executions of its line that were passed over before it."""
        thinning = self._thinning
        passed = thinning.passed.pop(line, None)
        if passed is not None:
            draft.passed_over, draft.since = passed.count, passed.first
        if thinning.owed:
            for name, _, _ in changes:
                thinning.owed.pop(name, None)
            thinning.pay(line, self._values(frame), changes)

    def _settle(self, frame: FrameType) -> None:
        """A loop is left: record the last execution of each line that was passed over since."""
        thinning = self._thinning
        for line, passed in sorted(thinning.passed.items(), key=lambda item: item[1].seq):
            draft = self._draft("line", line, passed.seq)
            draft.nth, draft.host_ns = passed.nth, passed.host_ns
            draft.passed_over, draft.since = passed.count - 1, passed.first
            changes: list[Change] = []
            thinning.pay(line, self._values(frame), changes)
            if self.tracer.live is not None:
                self._tell_line(frame, line, "line")
            self._describe(draft, changes)
            self._tell_changes(frame, draft)
            self._pend(draft, passed.seq)
        thinning.passed.clear()
        thinning.owed.clear()

    def _returns(self, frame: FrameType, value: Any, thrown: bool) -> None:
        tracer = self.tracer
        tracer.ended |= not self.depth
        if thrown or is_left(frame, value):
            if tracer.live is not None:
                tracer.live.left_by_exception(self.depth)
            return
        waits = yields(frame)
        if self._thinning.passed:
            self._settle(frame)
        draft = self._draft("return", frame.f_lineno, tracer.recorder.next_seq())
        words = tracer.reader.words(value, self._describer(draft))
        draft.value = VariableDraft("yield" if waits else "return", words, None)
        self._tell_value(frame, draft.value, "return")
        self._pend(draft)
        if waits:
            tracer.waiting[self] = frame
        else:
            tracer.waiting.pop(self, None)

    def _raises(self, frame: FrameType, changes: list[Change], arg: Any, now: int) -> None:
        if ends_a_loop(frame, arg[0]):
            return
        recorded = self.recorded
        self._finish(frame, changes, now)
        if not recorded:
            return
        draft = self._draft("exception", frame.f_lineno, self.tracer.recorder.next_seq())
        words = Words(self.tracer.reader.limit)
        words.pieces.append(exception_text(arg[0], arg[1]))
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
            was = None
            if old is not NEW:
                was = old.words if isinstance(old, Held) else self._atom(old)
            kept = self.variables.known.get(name) or self.expressions.known.get(name)
            if isinstance(kept, Held):
                kept.words = words  # which may be what was there before, too
            draft.changed.append(VariableDraft(name, words, was))

    def _atom(self, value: Any) -> Words:
        return self.tracer.reader.words(value, _none)

    def _describer(self, draft: LineDraft, sparing: bool = False) -> Any:
        describe = self.tracer.describe_found if sparing else self.tracer.describe
        return partial(describe, draft.tensors)

    def _pend(self, draft: LineDraft, end: int | None = None) -> None:
        recorder = self.tracer.recorder
        draft.end = recorder.seq if end is None else end
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
                live.passed_over(draft.passed_over, draft.what, self.depth)
            for variable in draft.changed:
                text = self.tracer.text_now(variable.words)
                live.changed(variable, text, self.depth, starting)

    def _tell_value(self, frame: FrameType, value: VariableDraft, what: str) -> None:
        live = self.tracer.live
        if live is not None:
            live.begin(frame, frame.f_lineno, what, self.depth, self._entered_ns)
            live.value(value.name, self.tracer.text_now(value.words), self.depth)


def _none(tensor: torch.Tensor) -> Any:
    raise TypeError("no tensor is plain")
