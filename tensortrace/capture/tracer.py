"""`trace()`: one object that is a context manager and a decorator.

One object is one run. While it is active its recorder sits in the slot and hooks are in place; a
decorated function keeps its hooks registered between calls (registering them anew makes Dynamo
recompile) and only empties the slot.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import difflib
import inspect
import os
import sys
import threading
from collections.abc import (
    Callable,
    Container,
    Iterable,
    Mapping,
)
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, overload

import torch
from torch import nn

from tensortrace.capture import exceptions
from tensortrace.capture.active import Alone, Ours, here, slot
from tensortrace.capture.driven import Turns, driven, is_ours
from tensortrace.capture.header import make_header, ranks
from tensortrace.capture.journal import Journal, is_full
from tensortrace.capture.lines.events import message_of
from tensortrace.capture.loop.optimizers import OptimizerHooks
from tensortrace.capture.loop.wrappers import Patches
from tensortrace.capture.modules import ModuleHooks
from tensortrace.capture.names import ModuleNames
from tensortrace.capture.notices import Notices, tell
from tensortrace.capture.ops import function_mode
from tensortrace.capture.options import OPTION_NAMES, Options, parse_options
from tensortrace.capture.recorder import Recorder
from tensortrace.capture.replay.narrow import Narrower
from tensortrace.capture.source import SourceLines, with_code
from tensortrace.capture.stats.queue import Level, StatsQueue
from tensortrace.engine import Engine
from tensortrace.errors import LogError, UsageError
from tensortrace.log import LogWriter, open_sink
from tensortrace.records import Failure, Finding
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.lines.options import Lines
    from tensortrace.capture.lines.tracer import LineTracer

F = TypeVar("F", bound=Callable[..., Any])
StopOn = str | Callable[[Finding], object] | None
Out = str | os.PathLike[str] | BinaryIO | Callable[[Any], object]
_OFF = "Tracing is switched off (TENSORTRACE)."


def switched_off() -> bool:
    """Whether ``TENSORTRACE`` in the environment turns tracing off."""
    return os.environ.get("TENSORTRACE", "").lower() in ("off", "0", "false", "no")


class Trace:
    """A run being traced; made by `trace`."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._recorder: Recorder | None = None
        self._joined: Trace | None = None
        # The one whose run was in flight in another thread, which the two share from then on.
        self._shared: Trace | None = None
        self._attached = False
        self._pid = os.getpid()
        # How many blocks of this run each thread is in.
        self._blocks: dict[int, int] = {}
        self._decorates = False
        self._functions: list[Callable[..., Any]] = []
        self._lines: LineTracer | None = None
        self._stance: Any = None
        self._end_mark: int | None = None
        self._notices = Notices()
        self._off = switched_off()

    def __copy__(self) -> Trace:
        return self  # one object is one run: a model that holds its trace shares it with its copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the options alone: what is loaded has not begun."""
        given = self._options.as_given()
        return _made_anew, (self._options.out, given)

    def step(self) -> None:
        """Say that one turn of the loop is over; from now on only this ends a step."""
        joined = self._joined
        if joined is not None:
            recorder = joined._recorder
            if recorder is None or recorder.owns_thread():  # no other thread ends a step
                joined.step()
        elif self._recorder is not None and slot.recorder is self._recorder:
            self._recorder.rules.manual = True
            with Ours(self._recorder, "gate"):
                self._recorder.close_step()
            self._recorder.raise_if_stopped()

    @property
    def findings(self) -> list[Finding]:
        """What was found so far, in order."""
        if self._joined is not None:
            return self._joined.findings
        return list(self._recorder.journal.findings) if self._recorder is not None else []

    @property
    def ok(self) -> bool:
        """Whether no error was found so far."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def path(self) -> Path | None:
        """The log file; None before the run begins and where `out` is no path."""
        if self._joined is not None:
            return self._joined.path
        sink = self._recorder.journal.sink if self._recorder is not None else None
        return sink.found_at() if isinstance(sink, LogWriter) else None

    def report(self) -> str:
        """The report of the log so far, as plain text; one sentence where there is none to read."""
        if self._joined is not None:
            return self._joined.report()
        if self._recorder is None and self._off:
            return f"trace: {_OFF}\n"
        path = self.path
        if self._recorder is None or path is None:
            raise UsageError("report() needs a log file: the run has not begun, or out= is no path")
        from tensortrace.export.text import render_report
        from tensortrace.run import open_run

        if slot.recorder is self._recorder:
            with Ours(self._recorder, "gate"):
                self._recorder.hand_on()
        self._recorder.journal.flush()
        try:
            return render_report(open_run(path))
        except LogError as error:  # it was moved or deleted: no mistake of the program's
            return f"trace: no report: {error}\n"

    def _repr_html_(self) -> str:
        """What a notebook shows: the page of the log so far, or one sentence that says why not."""
        if self._joined is not None:
            return self._joined._repr_html_()
        from tensortrace.export.notebook import show_reason, show_run

        path = self.path
        if self._recorder is None:
            return show_reason(f"trace: {_OFF if self._off else 'Not begun yet.'}")
        try:
            if path is None:
                raise UsageError("the records go to out=, which is no path, so there is no log")
            if slot.recorder is self._recorder:
                with Ours(self._recorder, "gate"):
                    self._recorder.hand_on()
            self._recorder.journal.flush()
            return show_run(path)
        except Exception as error:  # a notebook would show a traceback instead of the cell's value
            return show_reason(f"trace: no page: {error}", self.findings)

    def close(self) -> None:
        """End the run and take every hook away; a decorated function is no longer traced."""
        if self._recorder is None or self._off or self._is_forked():
            return
        with Alone():
            if slot.running is self:
                self._pause()
            ended = self._end_mark is not None
            if not ended:
                self._settle()
            self._finish("exit", None)
            self._detach()
            with contextlib.suppress(LogError):
                self._recorder.journal.sink.close()
            self._off = True
        atexit.unregister(self.close)
        if self._decorates or not ended:
            self._notices.goodbye(self._recorder, self.path, self._decorates)

    def __enter__(self) -> Trace:  # noqa: PYI034 a nested block is its outer one's
        if self._off or self._is_forked():
            return self
        with Alone():
            run = self._run_to_enter()
            self._joined = None if run is self else run
            run._come_in()
        self._lines_on(sys._getframe(1))
        return self

    def _run_to_enter(self) -> Trace:
        """Whose run a block is part of: of the one in flight, or that was when threads met.

        All threads report to one recorder. Were each call of two decorated functions in the run
        that is in flight by chance, both logs would hold half of each.
        """
        outer = slot.running
        if outer is None:
            shared = self._shared
            if shared is None or shared._off or shared._is_forked():
                return self
            return shared._run_to_enter()
        if outer is self:
            return self
        if not outer._blocks_here():
            if self._decorates and outer._decorates:
                self._shared = outer
            outer._notices.warn(
                "another thread entered a trace of its own while this run was in flight. A process "
                "records one run at a time: what that thread does joins this one, with its number, "
                "and ends no step of it"
            )
        elif self._options.out not in (outer._options.out, "log.jsonl"):
            outer._notices.warn(
                f"a block inside another joins its run: nothing is written to "
                f"{str(self._options.out)[:200]}"
            )
        return outer

    def _come_in(self) -> None:
        """Enter a block of this run; the first one begins it."""
        thread = threading.get_ident()
        if not self._blocks:
            self._begin()
        elif thread not in self._blocks:
            function_mode.mode_on()
        self._blocks[thread] = self._blocks.get(thread, 0) + 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        run = self._run
        if self._lines is not None:
            with Ours(run._recorder, "lines"):
                self._lines.leave(_outside(sys._getframe(1)))
        # Blocks may end in any order (two generators): the last one out closes the run.
        run._leave(error, traceback)

    def _leave(self, error: BaseException | None, traceback: TracebackType | None) -> None:
        with Alone():
            if self._recorder is None or not self._blocks:
                return
            self._go_out()
            if self._blocks or self._off:
                return
            self._pause()
            if self._is_forked():
                return
            if error is not None:
                self._explain(error, traceback)
            if not self._decorates or error is not None:
                failure = None
                with Ours(self._recorder, "exceptions"):
                    failure = self._failure(error, traceback)
                self._settle(error)
                self._finish(_reason(error), failure)
            if not self._decorates:
                self._detach()
                self._notices.goodbye(self._recorder, self.path, self._decorates)
        if error is None:
            self._recorder.raise_if_stopped()

    @property
    def _run(self) -> Trace:
        """The trace whose run this is: the outer one's, if this block has joined it."""
        return self if self._joined is None else self._joined

    def _go_out(self) -> None:
        """Leave a block of this run; if others are still in it, theirs is the loop to follow."""
        thread = threading.get_ident()
        if thread not in self._blocks:  # a generator's, which another thread has begun
            thread = next(iter(self._blocks))
        self._blocks[thread] -= 1
        if not self._blocks[thread]:
            del self._blocks[thread]
            function_mode.mode_off()
            recorder = self._recorder
            if self._blocks and recorder is not None and recorder.owns_thread():
                recorder.own_thread(next(iter(self._blocks)))

    def _lines_on(self, frame: FrameType) -> None:
        """Follow source lines from here on, if that is wanted."""
        recorder = self._run._recorder
        if recorder is None or (self._options.lines is None and recorder.lines is None):
            return
        with Ours(recorder, "lines"):
            if recorder.lines is None and self._options.lines is not None:
                from tensortrace.capture.lines.tracer import LineTracer

                recorder.lines = LineTracer(self._options.lines, recorder)
            self._lines = recorder.lines
            if self._lines is not None:
                for function in self._functions:
                    self._lines.target(function)
                self._lines.enter(_outside(frame))

    def __call__(self, function: F) -> F:
        """Trace every call of a function, method, generator or async function as one step."""
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        if inspect.isclass(function) or not callable(function):
            raise UsageError(
                f"@trace decorates functions, and {function!r:.80} is none; decorate its method, "
                "or use `with trace():` around the loop"
            )
        if self._off:
            return function
        self._functions.append(function)
        if not self._decorates:
            self._decorates = True
            atexit.register(self.close)
        turns = Turns(self, self._turn_over, self._items_end)
        return driven(function, turns)  # type: ignore[return-value]

    def _turn_over(self) -> None:
        """A decorated call has returned or yielded: that is a step, whatever it held.

        One of another thread than that whose loop is followed is none.
        """
        run = self._run
        recorder = run._recorder
        if recorder is None or slot.recorder is not recorder:
            return
        if run._blocks_here() == 1 and recorder.owns_thread():
            recorder.rules.manual = True
            with Ours(recorder, "gate"):
                recorder.close_step()
            recorder.raise_if_stopped()

    def _items_end(self) -> None:
        """A decorated generator has ended: what came after its last item is a step, if anything."""
        recorder = self._run._recorder
        if recorder is None:
            return
        if recorder.holds_more_than_lines():
            self._turn_over()
        elif slot.recorder is recorder and recorder.owns_thread():
            with Ours(recorder, "gate"):
                recorder.hand_on()  # its last lines: it may be long until the next step ends

    def _blocks_here(self) -> int:
        return self._blocks.get(threading.get_ident(), 0)

    def _is_forked(self) -> bool:
        """Whether this is a child of the process whose run it is: such a one is inert."""
        return self._recorder is not None and self._pid != os.getpid()

    def _begin(self) -> None:
        if self._recorder is None:
            self._recorder = self._make_recorder()
            self._pid = os.getpid()
        elif self._end_mark is not None:
            self._reopen()
        was_attached = self._attached
        try:
            self._attach()
            if self._options.compiled == "eager":
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._recorder.places.met_compiled = slot.hooks[0].take_in
            here.stack.clear()
            self._recorder.rules.decorates = self._decorates
            self._recorder.rules.enter(self._recorder.sources.user_frame(sys._getframe()))
            self._recorder.own_thread(threading.get_ident())
            slot.recorder, slot.running = self._recorder, self
            function_mode.mode_on()
        except BaseException:  # an interrupt too: no block is left that would take the hooks away
            self._pause()
            if not was_attached:
                self._detach()
            raise

    def _attach(self) -> None:
        """Put the hooks in place, unless they are."""
        if self._attached:
            return
        if not slot.users:
            try:
                for kind in (ModuleHooks, OptimizerHooks, Patches):
                    slot.hooks.append(kind())
            except BaseException:
                _take_away(slot.hooks)
                raise
        slot.users += 1
        self._attached = True

    def _make_recorder(self) -> Recorder:
        model = self._options.model
        # Once its names are given, nothing of ours keeps the user's model alive.
        options = self._options = replace(self._options, model=None)
        engine = Engine(options.checks, options.settings)
        mine = ranks()
        sink = open_sink(options.out, mine)
        journal = Journal(
            sink,
            engine,
            full=lambda step: is_full(step, options.every, options.steps, engine.brings_update),
            max_bytes=options.max_bytes,
            on_finding=partial(tell, ranks=mine),
            warn=self._notices.warn,
        )
        journal.write(make_header(options.as_json(), *mine))
        journal.flush()
        recorder = Recorder(
            journal,
            queue=StatsQueue(options.stats),
            names=ModuleNames(model),
            sources=SourceLines(keep_text=options.source),
            wanted=options.modules,
            op_level=options.level == "op",
            narrow=options.narrow,
            shows_compiled=options.compiled == "eager",
            should_stop=options.should_stop,
            warn=self._notices.warn,
        )
        if recorder.roots is not None:
            recorder.look = Narrower(recorder, recorder.roots).look
        return recorder

    def _pause(self) -> None:
        """Stop listening; hooks stay where they are."""
        function_mode.mode_off()
        slot.recorder = slot.running = None
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _settle(self, error: BaseException | None = None) -> None:
        recorder = self._recorder
        if recorder is not None:
            # Not while memory is short, and not what the user has just interrupted.
            fatal = error is not None and not isinstance(error, Exception)
            with Ours(self._recorder, "gate"):
                recorder.settle(not fatal and not isinstance(error, torch.OutOfMemoryError))
            here.stack.clear()

    def _finish(
        self, why: Literal["exit", "exception", "interrupt"], failure: Failure | None
    ) -> None:
        recorder = self._recorder
        if recorder is None or self._end_mark is not None:
            return
        self._end_mark = -1
        with Ours(self._recorder, "gate"):
            self._end_mark = recorder.journal.end(
                step=recorder.last_step(), update=recorder.update, why=why, failure=failure
            )

    def _reopen(self) -> None:
        """The block is entered again: the run goes on, so its end line goes."""
        recorder = self._recorder
        assert recorder is not None
        assert self._end_mark is not None
        sink = recorder.journal.sink
        if isinstance(sink, LogWriter) and recorder.journal.writable:
            with contextlib.suppress(LogError):  # a pipe cannot be cut: it gets another end line
                sink.truncate(self._end_mark)
                recorder.journal.reopen()
        self._end_mark = None

    def _detach(self) -> None:
        if self._attached:
            self._attached = False
            slot.users -= 1
            if not slot.users:
                _take_away(slot.hooks)
        if self._recorder is not None:
            self._recorder.release()

    def _failure(
        self, error: BaseException | None, traceback: TracebackType | None
    ) -> Failure | None:
        recorder = self._recorder
        if error is None or recorder is None or isinstance(error, (GeneratorExit, SystemExit)):
            return None
        return Failure(
            type=shorten(type(error).__name__),
            message=message_of(error)[:2000],
            module=recorder.failed_module(traceback),
            location=with_code(recorder.sources.locate_traceback(traceback)),
        )

    def _explain(self, error: BaseException, traceback: TracebackType | None) -> None:
        recorder = self._recorder
        if recorder is not None and recorder.on["exceptions"]:
            with Ours(self._recorder, "exceptions"):
                exceptions.explain(recorder, error, traceback)


@overload
def trace(function: F, /) -> F: ...  # type: ignore[overload-overlap]
@overload
def trace(
    out: Out = ...,
    *,
    model: nn.Module | None = ...,
    level: Literal["module", "op"] = ...,
    lines: bool | Lines | Mapping[str, Any] = ...,
    every: int | Literal["auto"] = ...,
    steps: int | Container[int] | None = ...,
    modules: str | Iterable[str] | None = ...,
    stats: Level = ...,
    checks: str | Iterable[str] | Mapping[str, Any] | None = ...,
    stop_on: StopOn = ...,
    narrow: bool = ...,
    compiled: Literal["boundary", "eager"] = ...,
    source: bool = ...,
    max_bytes: int = ...,
) -> Trace: ...
def trace(*positional: Any, **options: Any) -> Any:
    """Trace a PyTorch program: ``with trace(): ...``, ``@trace`` or ``@trace("run.jsonl", ...)``.

    Args:
        out: the log's path, a binary file, or (by keyword) a callable that gets each record.
        model: the module whose paths are plain; otherwise the first one called.
        level: "module" records calls of modules and ops outside them, of those that a loop runs
            without grad few, and every one with news; "op" every op, inside and in loops, too.
        lines: whether each executed source line of the decorated function or block is recorded,
            with the variables that it changed; ``Lines(depth=2, ...)`` or a dict says how.
        every: which steps write all their records: "auto" (0 to 19, then 1 in 10, 1 in 100, ...)
            or every n-th. Past step 20 checks look at the calls of one in ten of the others, past
            step 1000 of one in fifty, and of each with a NaN, an infinity or an exception.
        steps: only these steps write all their records: a number, a range, a set.
        modules: glob patterns of module paths to record, such as "encoder.*".
        stats: "full"; "light" keeps the counts and the norm alone of larger tensors; "minmax"
            leaves out zeros, mean, std and norm; "none" measures nothing.
        checks: codes, prefixes or names to run, or {"TT201.ratio": 50} to set thresholds.
        stop_on: "error", "warning", "note", a code, or a callable that gets each finding and
            returns true to stop: `TraceStoppedError` is raised before the optimizer moves the
            weights.
        narrow: whether a module call that makes NaN or inf is run again, once and on stand-ins, to
            name the op and the line; it changes no result.
        compiled: "boundary" leaves compiled modules compiled and sees only their outside;
            "eager" runs them uncompiled inside the block, so that all is seen.
        source: whether the text of traced functions is stored in the log.
        max_bytes: what the log may grow to. Once full steps have taken half of it, only those
            with a finding are full; once step lines have filled it, only findings are written.

    Raises:
        UsageError: an option that makes no sense, a file that is not a log in the log's place.
    """
    for name in options.keys() - {"out", *OPTION_NAMES}:
        close = difflib.get_close_matches(name, OPTION_NAMES, 1)
        meant = f" Did you mean {close[0]}=?" if close else ""
        known = ", ".join(OPTION_NAMES)
        raise UsageError(f"trace() has no option {name}=.{meant} It takes out, {known}.")
    if len(positional) == 1 and not options and _is_function(positional[0]):
        return Trace(parse_options())(positional[0])
    return Trace(parse_options(*positional, **options))


def _take_away(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()


def _made_anew(out: Any, given: Mapping[str, Any]) -> Trace:
    return Trace(parse_options(out, **given))


def _outside(frame: FrameType) -> FrameType | None:
    """The frame of a block; None where a wrapper of ours enters for a decorated function."""
    if is_ours(frame):
        return None
    found: FrameType | None = frame
    while found is not None and found.f_code.co_filename == contextlib.__file__:
        found = found.f_back  # ExitStack
    return found


def _is_function(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value)


def _reason(error: BaseException | None) -> Literal["exit", "exception", "interrupt"]:
    # An event loop that gets Ctrl-C cancels the task, and so does whoever no longer waits for it.
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return "interrupt"
    if exceptions.quits_debugger(error):
        return "interrupt"
    if error is None or isinstance(error, (GeneratorExit, SystemExit)):
        return "exit"
    return "exception"
