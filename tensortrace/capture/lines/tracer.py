"""Source lines: each executed line of the decorated function or block, and what it changed.

Python's own trace function, in the thread that entered. One that was there before (of a debugger,
of coverage) goes on being called, and is what it was afterwards. Nothing is traced in steps of
which the log keeps the step line only.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, CO_NESTED, CO_OPTIMIZED
from types import CodeType, FrameType, MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tensortrace.capture import compiled
from tensortrace.capture.active import here, slot
from tensortrace.capture.dynamo import leave_to_python
from tensortrace.capture.lines.calls import Calls
from tensortrace.capture.lines.comprehensions import Ranges, find_comprehensions
from tensortrace.capture.lines.deferred import Stores, find_stores
from tensortrace.capture.lines.frames import FrameTrace
from tensortrace.capture.lines.live import LiveText
from tensortrace.capture.lines.marks import Marks
from tensortrace.capture.lines.namespaces import HAS_ONE_DICT, asks_for_locals
from tensortrace.capture.lines.options import Lines
from tensortrace.capture.lines.reader import Reader
from tensortrace.capture.lines.statements import Statements, read_statements
from tensortrace.capture.lines.tensor_words import make_tensor_words
from tensortrace.capture.lines.tracing import BEGIN_REST, follow_thread, forget_thread
from tensortrace.capture.lines.variables import is_file
from tensortrace.capture.lines.watched import Watched
from tensortrace.capture.source import definition_line
from tensortrace.capture.tensors import LARGEST_WITHOUT_GRAD, TensorDraft, draft_of_head
from tensortrace.capture.turns import is_taken
from tensortrace.text import is_installed

if TYPE_CHECKING:
    from tensortrace.capture.drafts import Draft
    from tensortrace.capture.lines.reader import Words
    from tensortrace.capture.recorder import Recorder
    from tensortrace.records import Record

T = TypeVar("T")

# Called inside a line, and no function of its own to the reader.
_COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
# Larger tensors that a block finds are only named: a data set need not be read for it.
_LARGEST_FOUND = 1 << 20
_RESUMED = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


# Dynamo of torch 2.6 compiles trace functions too, and stumbles over their frames.
_IS_COMPILED = hasattr(torch._C._dynamo.eval_frame, "skip_code")


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
        self._names: set[str] = set()
        # Whether only these are followed, and no other trace function is there to be told.
        self._is_alone = options.depth == 1 and not _IS_COMPILED
        # How often a function was called that may change variables of one around it.
        self.closures = 0
        self._stores: dict[int, Stores] = {}
        self._definitions: dict[int, int] = {}
        self._comprehensions: dict[int, Ranges] = {}
        self._statements: dict[int, Statements] = {}
        self._closed: dict[int, bool] = {}
        self._codes_met: list[CodeType] = []  # their ids stay theirs
        self.calls = Calls(self)
        self._followed: dict[str, bool] = {}
        self._thread = _Thread()
        self.tensor_words = make_tensor_words(options.statistics)
        self._marks = Marks()
        followed = options.watch or options.watch_explode
        self.watched = Watched(options.watch, options.watch_explode) if followed else None
        self.live = None if options.output is None else LiveText(options, self._lose_text)
        # Generators that wait: their frames, until the step is over.
        self.waiting: dict[FrameTrace, FrameType] = {}
        self.ended = False  # whether an outermost function has returned, and not only waits
        # One object, so that it can be recognised.
        turns = None if _IS_COMPILED else compiled.turns
        self._global: Any = self._on_call if turns is None else MethodType(turns.met, self)
        recorder.tensors.drafts = {}
        recorder.thins_ops &= options.thin

    # ---- what `Trace` tells

    def target(self, function: Callable[..., Any]) -> None:
        """Follow every call of a function."""
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            self._codes[id(code)] = code
            self._names.add(code.co_name)

    def enter(self, frame: FrameType | None) -> None:
        """Begin to trace in this thread; `frame` is that of a block."""
        mine = self._thread
        mine.entered += 1
        mine.entered_ns.append(time.perf_counter_ns())
        mine.blocks.append(None)  # first of all, so that `leave` finds it whatever fails below
        if self.recorder.full and not mine.on:
            self._install()
        elif not self.recorder.full:
            self._safely(self._fall_silent, frame)
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
            self._forget_values(frame)
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
        for waiting in self.waiting.values():
            self._forget_values(waiting)
        self.waiting.clear()
        mine = self._thread
        if not mine.entered or self.recorder.full == mine.on:
            return
        if self.recorder.full:
            self._install()
        else:
            self._uninstall()
            self._safely(self._fall_silent, None)
        frame: FrameType | None = sys._getframe(1)
        inside = False
        while frame is not None:
            trace = _frame_trace(frame.f_trace, self)
            if trace is not None:
                if mine.on:
                    self._safely(trace.wake, frame)
                elif not inside:
                    self._forget_values(frame)
            # A debugger ended the step: Python will write the dict back into the frame it is at.
            inside = frame.f_code in _CALLED_BY_PYTHON
            frame = frame.f_back

    def step_ends(self) -> None:
        """Record what the step in flight had passed over."""
        frame: FrameType | None = sys._getframe(1)
        inside = False
        while frame is not None and self.is_on():
            trace = _frame_trace(frame.f_trace, self)
            if trace is not None and not inside:
                self._safely(trace.settle, frame)
            inside = frame.f_code in _CALLED_BY_PYTHON
            frame = frame.f_back
        if self.is_on():
            self._safely(lambda _: self.calls.settle(), None)

    def _fall_silent(self, frame: FrameType | None) -> None:
        if self.live is not None:
            self.live.fall_silent(self.recorder.step)

    # ---- the trace function

    def _install(self) -> None:
        mine = self._thread
        mine.prior = sys.gettrace()
        self._is_alone &= mine.prior is None
        mine.on = True
        sys.settrace(self._global)
        follow_thread(beside=mine.prior is not None)

    def _uninstall(self) -> None:
        mine = self._thread
        forget_thread()  # may put ours back
        here.line = None
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
            self._is_alone = False
            sys.settrace(self._global)

    @leave_to_python
    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Python calls this for each function that is called. Hot: torch calls many."""
        if _IS_COMPILED and torch.compiler.is_compiling():
            return None
        code = frame.f_code
        if code.co_flags & CO_NESTED:
            self.closures += 1
        if self._is_alone and code.co_name not in self._names:
            return None
        prior = self._thread.prior
        theirs = None
        if prior is not None:
            if code in BEGIN_REST:
                return None
            theirs = prior(frame, event, arg)
            self.stay()
        if id(code) not in self._codes and (self.options.depth == 1 or not self._is_followed(code)):
            return theirs
        if torch.compiler.is_compiling() or not self.is_listening():
            return theirs
        here.busy += 1
        trace = None
        try:
            trace = self._open(frame, code, theirs)
        except Exception as error:
            self.recorder.fault("lines", error)
        finally:
            here.busy -= 1
        if trace is None:
            return theirs
        if trace.shares:
            frame.f_locals  # noqa: B018 as in `FrameTrace.look_back`
        return trace.local

    def _open(self, frame: FrameType, code: CodeType, theirs: Any) -> FrameTrace | None:
        known = _frame_trace(frame.f_trace, self)
        with torch._C.DisableTorchFunction():
            if known is not None:
                known.theirs = theirs
                known.resume(frame)
                return known
            around, between = self._around(frame.f_back)
            depth = 0 if around is None else around.depth + 1
            if id(code) in self._codes:
                if self.thin and not is_taken(self.calls.count(code)):
                    self._miss(frame, depth)
                    return None
            elif around is None:
                return None
            elif depth >= self.options.depth or not around.recorded:
                # Deeper calls count only of functions that are shown for others.
                if depth + between < self.options.depth or id(code) in self._statements:
                    self._miss(frame, depth + between)
                return None
            trace = FrameTrace(self, code, depth, theirs)
            trace.enter(frame)
            return trace

    def _around(self, frame: FrameType | None) -> tuple[FrameTrace | None, int]:
        """The nearest frame that is followed, and how many of the user's lie before it."""
        between = 0
        while frame is not None:
            local = frame.f_trace
            if local is not None and (trace := _frame_trace(local, self)) is not None:
                return trace, between
            between += self._is_followed(frame.f_code)
            frame = frame.f_back
        return None, between

    def _miss(self, frame: FrameType, depth: int) -> None:
        # A generator that goes on is at its yield.
        if not frame.f_code.co_flags & _RESUMED or frame.f_lineno == frame.f_code.co_firstlineno:
            self.calls.miss(frame.f_code, depth)

    def _is_followed(self, code: CodeType) -> bool:
        name = code.co_filename
        followed = self._followed.get(name)
        if followed is None:
            # What dataclasses and named tuples generate is nobody's source.
            generated = name == "<string>"
            followed = (
                self.recorder.sources.is_user(code) and not generated and not is_installed(name)
            )
            self._followed[name] = followed
        # A class has lines, too; a file that is imported is no call.
        if not followed or is_file(code):
            return False
        return code.co_name not in _COMPREHENSIONS

    def _depth_under(self, frame: FrameType) -> int:
        around, _ = self._around(frame.f_back)
        return 0 if around is None else around.depth + 1

    # ---- what frames ask

    def is_on(self) -> bool:
        """Whether lines of the step in flight are recorded."""
        recorder = self.recorder
        return slot.recorder is recorder and recorder.full and recorder.on["lines"]

    def is_listening(self) -> bool:
        """Whether what happens now is recorded, and nothing of our own. Hot."""
        return not here.busy and self.is_on()

    def parent(self) -> int | None:
        """The seq of the module call that runs now."""
        recorder, stack = self.recorder, here.stack
        if not stack or not stack[-1].wanted or stack[-1].serial != recorder.serial:
            return None
        return stack[-1].seq if stack[-1].step == recorder.step else None

    def describe(self, fresh: list[TensorDraft], tensor: torch.Tensor) -> tuple[int, TensorDraft]:
        """The id of a tensor and its description, added to `fresh` if it is the first."""
        table = self.recorder.tensors
        measure = _numel(tensor) <= LARGEST_WITHOUT_GRAD or torch.is_grad_enabled()
        number, draft = table.identify(tensor, measure)
        if draft is not None:
            fresh.append(draft)
            return number, draft
        known = table.drafts.get(number) if table.drafts is not None else None
        return number, known or draft_of_head(tensor)

    def describe_found(
        self, fresh: list[TensorDraft], tensor: torch.Tensor
    ) -> tuple[int, TensorDraft]:
        """The same of a tensor that was there before: a large one is only named, its id is -1."""
        if _numel(tensor) > _LARGEST_FOUND and self.recorder.tensors.id_of(tensor) is None:
            return -1, draft_of_head(tensor)
        return self.describe(fresh, tensor)

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
        return self._once(self._definitions, code, definition_line)

    def statements(self, code: CodeType) -> Statements:
        """Which lines of a function are one statement."""
        return self._once(self._statements, code, read_statements)

    def comprehensions(self, code: CodeType) -> Ranges:
        """The instructions of a function that are turns of its comprehensions."""
        return self._once(self._comprehensions, code, find_comprehensions)

    def stores(self, code: CodeType) -> Stores:
        """The names that each line of a function stores."""
        return self._once(self._stores, code, find_stores)

    def _once(self, known: dict[int, T], code: CodeType, read: Callable[[CodeType], T]) -> T:
        found = known.get(id(code))
        if found is None:
            found = known[id(code)] = read(code)
            self._codes_met.append(code)
        return found

    def _lose_text(self, error: Exception) -> None:
        self.live = None
        self.recorder.warn(f"the live text of lines= stops, the log goes on: {error!r:.300}")

    def is_closed(self, code: CodeType) -> bool:
        """Whether the variables of a function are not to be asked for."""
        return self._once(self._closed, code, asks_for_locals)

    def _forget_values(self, frame: FrameType) -> None:
        """Until Python 3.12 a frame that was looked at keeps its variables' values in a dict."""
        code = frame.f_code
        if HAS_ONE_DICT and code.co_flags & CO_OPTIMIZED and not self.is_closed(code):
            frame.f_locals.clear()

    def _safely(self, act: Callable[[Any], None], frame: FrameType | None) -> None:
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


_CALLED_BY_PYTHON = (FrameTrace.event.__code__, LineTracer._on_call.__code__)


def _numel(tensor: torch.Tensor) -> int:
    try:
        number = tensor.numel()
    except (RuntimeError, TypeError, NotImplementedError):
        return 0
    return number if type(number) is int else 0
