"""Source lines: each executed line of the decorated function or block, and what it changed.

Python's own trace function, in the thread that entered. One that was there before (of a debugger,
of coverage) goes on being called, and is what it was afterwards. Nothing is traced in steps of
which the log keeps the step line only.
"""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.active import here, slot
from tensortrace.capture.line_frames import FrameTrace, is_taken
from tensortrace.capture.line_marks import Marks
from tensortrace.capture.lines_options import Lines
from tensortrace.capture.reader import Reader
from tensortrace.capture.tensors import LARGEST_WITHOUT_GRAD, TensorDraft, draft_of_head
from tensortrace.capture.tracing import follow_thread, forget_thread

if TYPE_CHECKING:
    from tensortrace.capture.drafts import Draft
    from tensortrace.capture.live import LiveText
    from tensortrace.capture.reader import Words
    from tensortrace.capture.recorder import Recorder
    from tensortrace.capture.watched import Watched
    from tensortrace.records import Record

# Called inside a line, and no function of its own to the reader.
_COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
# Larger tensors that a block finds are only named: a data set need not be read for it.
_LARGEST_FOUND = 1 << 20
_LONGEST_DECORATORS = 200
_INSTALLED = ("site-packages", "dist-packages")


class _Thread(threading.local):
    """Of each thread: how often it entered, its blocks, and the trace function before ours."""

    def __init__(self) -> None:
        self.entered = 0
        self.on = False
        self.prior: Any = None
        self.blocks: list[FrameTrace | None] = []
        self.entered_ns: list[int] = []


class LineTracer:
    """Follows the frames of a run that are to be followed.

    Args:
        options: of `lines=`.
        recorder: gets the lines.
    """

    def __init__(self, options: Lines, recorder: Recorder) -> None:
        self.options, self.recorder = options, recorder
        self.thin = options.thin
        self.reader = Reader(
            options.max_variable_length,
            tuple((_condition(one), action) for one, action in options.custom_repr),
            options.normalize,
            recorder.names.known,
        )
        self._codes: dict[int, CodeType] = {}
        self._definitions: dict[int, int] = {}
        self._codes_met: list[CodeType] = []  # their ids stay theirs
        self._calls: dict[int, int] = {}
        self._followed: dict[str, bool] = {}
        self._thread = _Thread()
        self._step = -1
        from tensortrace.capture.tensor_words import make_tensor_words

        self.tensor_words = make_tensor_words(options.statistics)
        self._marks = Marks()
        self.watched: Watched | None = None
        self.live: LiveText | None = None
        if options.watch or options.watch_explode:
            from tensortrace.capture.watched import Watched

            self.watched = Watched(options.watch, options.watch_explode)
        if options.output is not None:
            from tensortrace.capture.live import LiveText

            self.live = LiveText(options, self._lose_text)
        self.ended = False  # whether an outermost function has returned, and not only waits
        # One object, so that it can be recognised.
        self._global = self._on_call
        recorder.tensors.drafts = {}

    # ---- what `Trace` tells

    def target(self, function: Callable[..., Any]) -> None:
        """Follow every call of a function."""
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            self._codes[id(code)] = code

    def enter(self, frame: FrameType | None) -> None:
        """Begin to trace in this thread; `frame` is that of a block."""
        mine = self._thread
        mine.entered += 1
        mine.entered_ns.append(time.perf_counter_ns())
        mine.blocks.append(None)  # first of all, so that `leave` finds it whatever fails below
        if self.recorder.full and not mine.on:
            self._install()
        known = None if frame is None else frame.f_trace
        if frame is None:
            return
        around = _frame_trace(known, self)
        if around is not None:
            if around in mine.blocks:
                mine.blocks[-1] = around
            return
        trace = FrameTrace(self, frame.f_code, self._depth_under(frame), known)
        trace.with_line = frame.f_lineno
        frame.f_trace = trace.local
        mine.blocks[-1] = trace
        if self.is_on():
            self._safely(trace.enter, frame)

    def leave(self, frame: FrameType | None) -> None:
        """The opposite of `enter`."""
        mine = self._thread
        if not mine.entered:
            return
        mine.entered -= 1
        frame, trace = self._ending(frame)
        # The last of its kind, while others may have begun since.
        place = len(mine.blocks) - 1 - mine.blocks[::-1].index(trace)
        entered_ns = mine.entered_ns.pop(place)
        del mine.blocks[place]
        if trace in mine.blocks:
            trace = None  # one around it in the same function goes on
        if frame is not None and trace is not None:
            if self.is_on():
                self._safely(trace.close, frame)
            frame.f_trace = trace.theirs
            _forget_values(frame)
        if self.live is not None and self.is_on() and (trace is not None or self.ended):
            self.live.elapsed(entered_ns, mine.entered)
        self.ended = False
        if not mine.entered:
            self._uninstall()

    def _ending(self, frame: FrameType | None) -> tuple[FrameType | None, FrameTrace | None]:
        """The block that ends: generators may end theirs in another order than they began them."""
        blocks = self._thread.blocks
        at = frame
        while at is not None:
            trace = _frame_trace(at.f_trace, self)
            if trace is not None and trace in blocks:
                return at, trace
            if trace is not None and at is frame and None in blocks:
                break  # a block in a function that was followed already
            at = at.f_back
        return None, None if None in blocks else blocks[-1]

    def step_began(self) -> None:
        """Only full steps are traced: begin or stop in the middle of the program."""
        mine = self._thread
        if not mine.entered or self.recorder.full == mine.on:
            return
        if self.recorder.full:
            self._install()
        else:
            self._uninstall()
        frame: FrameType | None = sys._getframe(1)
        inside = False
        while frame is not None:
            trace = _frame_trace(frame.f_trace, self)
            if trace is not None:
                if mine.on:
                    self._safely(trace.wake, frame)
                elif not inside:
                    _forget_values(frame)
            # A debugger ended the step: Python will write the dict back into the frame it is at.
            inside = frame.f_code in _CALLED_BY_PYTHON
            frame = frame.f_back

    # ---- the trace function

    def _install(self) -> None:
        mine = self._thread
        mine.prior = sys.gettrace()
        mine.on = True
        sys.settrace(self._global)
        follow_thread()

    def _uninstall(self) -> None:
        mine = self._thread
        forget_thread()  # may put ours back
        # A debugger that was started inside is left where it is. Python takes off what an interrupt
        # came out of.
        if mine.on and sys.gettrace() in (self._global, None):
            sys.settrace(mine.prior)
        mine.on, mine.prior = False, None

    def stay(self) -> None:
        """Go on after the trace function before ours was called: it may have put itself back."""
        now = sys.gettrace()
        if self._thread.on and now is not self._global:
            self._thread.prior = now
            sys.settrace(self._global)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Python calls this for each function that is called. Hot: torch calls many."""
        prior = self._thread.prior
        theirs = None
        if prior is not None:
            theirs = prior(frame, event, arg)
            self.stay()
        code = frame.f_code
        if id(code) not in self._codes and (self.options.depth == 1 or not self._is_followed(code)):
            return theirs
        if torch.compiler.is_compiling() or not self.is_listening():
            return theirs
        here.busy += 1
        try:
            trace = self._open(frame, code, theirs)
            return theirs if trace is None else trace.local
        except Exception as error:
            self.recorder.fault("lines", error)
            return theirs
        finally:
            here.busy -= 1

    def _open(self, frame: FrameType, code: CodeType, theirs: Any) -> FrameTrace | None:
        known = _frame_trace(frame.f_trace, self)
        with torch._C.DisableTorchFunction():
            if known is not None:
                known.theirs = theirs
                known.resume(frame)
                return known
            around = _nearest(frame.f_back, self)
            depth = 0 if around is None else around.depth + 1
            if id(code) in self._codes:
                if self.thin and not is_taken(self._count(code)):
                    return None
            elif around is None or depth >= self.options.depth or not around.recorded:
                return None
            trace = FrameTrace(self, code, depth, theirs)
            trace.enter(frame)
            return trace

    def _count(self, code: CodeType) -> int:
        if self._step != self.recorder.step:
            self._step = self.recorder.step
            self._calls.clear()
        nth = self._calls.get(id(code), 0)
        self._calls[id(code)] = nth + 1
        return nth

    def _is_followed(self, code: CodeType) -> bool:
        name = code.co_filename
        followed = self._followed.get(name)
        if followed is None:
            # What dataclasses and named tuples generate is nobody's source.
            generated = name == "<string>"
            installed = any(part in _INSTALLED for part in Path(name).parts)
            followed = self.recorder.sources.is_user(code) and not generated and not installed
            self._followed[name] = followed
        if not followed or not code.co_flags & CO_OPTIMIZED:
            return False
        return code.co_name not in _COMPREHENSIONS

    def _depth_under(self, frame: FrameType) -> int:
        around = _nearest(frame.f_back, self)
        return 0 if around is None else around.depth + 1

    # ---- what frames ask

    def is_on(self) -> bool:
        """Whether lines of the step in flight are recorded."""
        recorder = self.recorder
        return slot.recorder is recorder and recorder.full and recorder.on["lines"]

    def is_listening(self) -> bool:
        """Whether what happens now is recorded, and nothing of our own. Hot."""
        return not here.busy and self.is_on()

    def is_target(self, code: CodeType) -> bool:
        """Whether this is the code of a decorated function."""
        return id(code) in self._codes

    def parent(self) -> int | None:
        """The seq of the module call that runs now."""
        stack = here.stack
        if not stack or not stack[-1].wanted or stack[-1].step != self.recorder.step:
            return None
        return stack[-1].seq

    def describe(
        self, tensor: torch.Tensor, fresh: list[TensorDraft], sparing: bool
    ) -> tuple[int, TensorDraft]:
        """The id of a tensor and its description, added to `fresh` if it is the first."""
        table = self.recorder.tensors
        numel = _numel(tensor)
        if sparing and numel > _LARGEST_FOUND and table.id_of(tensor) is None:
            return -1, draft_of_head(tensor)
        measure = numel <= LARGEST_WITHOUT_GRAD or torch.is_grad_enabled()
        number, draft = table.identify(tensor, measure)
        if draft is not None:
            fresh.append(draft)
            return number, draft
        known = table.drafts.get(number) if table.drafts is not None else None
        return number, known or draft_of_head(tensor)

    def mark(self, ended: list[Draft], batch: list[Draft], records: list[Record]) -> list[Record]:
        """Flag the lines among the records of drafts; `ended` are these as they ended."""
        try:
            by_draft = {id(draft): record for draft, record in zip(batch, records, strict=True)}
            by_draft.update(self._marks.mark(ended, by_draft))
            return [by_draft[id(draft)] for draft in batch]
        except Exception as error:
            self.recorder.fault("lines", error)
            return records

    def text_now(self, words: Words) -> str:
        """A text for somebody who reads along: that waits for the device."""
        if words.tensors:
            self.recorder.queue.resolve()
        return words.say(self.tensor_words.say_now)

    def definition_line(self, code: CodeType) -> int:
        """Where the ``def`` of a function is, below its decorators."""
        line = self._definitions.get(id(code))
        if line is None:
            line = self._definitions[id(code)] = _definition_line(code)
            self._codes_met.append(code)
        return line

    def _lose_text(self, error: Exception) -> None:
        self.live = None
        self.recorder.warn(f"the live text of lines= stops, the log goes on: {error!r:.300}")

    def _safely(self, act: Callable[[FrameType], None], frame: FrameType) -> None:
        here.busy += 1
        try:
            with torch._C.DisableTorchFunction():
                act(frame)
        except Exception as error:
            self.recorder.fault("lines", error)
        finally:
            here.busy -= 1


def _condition(one: Any) -> Callable[[Any], bool]:
    return (lambda value: isinstance(value, one)) if isinstance(one, type) else one


def _frame_trace(local: Any, tracer: LineTracer) -> FrameTrace | None:
    """Our trace function of a frame, if it has one of this tracer's."""
    trace = getattr(local, "__self__", None)
    return trace if isinstance(trace, FrameTrace) and trace.tracer is tracer else None


def _nearest(frame: FrameType | None, tracer: LineTracer) -> FrameTrace | None:
    while frame is not None:
        local = frame.f_trace
        if local is not None and (trace := _frame_trace(local, tracer)) is not None:
            return trace
        frame = frame.f_back
    return None


def _forget_values(frame: FrameType) -> None:
    """Until Python 3.12 a frame that was looked at keeps its variables' values in a dict."""
    if sys.version_info < (3, 13) and frame.f_code.co_flags & CO_OPTIMIZED:
        frame.f_locals.clear()


_CALLED_BY_PYTHON = (FrameTrace.event.__code__, LineTracer._on_call.__code__)


def _definition_line(code: CodeType) -> int:
    first = code.co_firstlineno
    for line in range(first, first + _LONGEST_DECORATORS):
        text = linecache.getline(code.co_filename, line).lstrip()
        if text.startswith(("def ", "async def ")):
            return line
        if not text or (line == first and not text.startswith("@")):
            break
    return first


def _numel(tensor: torch.Tensor) -> int:
    try:
        number = tensor.numel()
    except (RuntimeError, TypeError, NotImplementedError):
        return 0
    return number if type(number) is int else 0
