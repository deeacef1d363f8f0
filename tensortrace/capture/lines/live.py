"""Source lines as text while they run, in PySnooper's words, colours and places.

Built on its `Tracer`, which knows how to write, to colour and to find source; what is told comes
from the same drafts as the log, so nothing is formatted twice.
"""

from __future__ import annotations

import datetime
import linecache
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pysnooper import pycompat
from pysnooper.tracer import Tracer, get_path_and_source_from_frame, get_write_function

from tensortrace.capture.lines.options import Lines, is_on_terminal
from tensortrace.signal_handlers import let_through
from tensortrace.text import escape

if TYPE_CHECKING:
    from tensortrace.capture.lines.drafts import VariableDraft


class LiveText(Tracer):  # type: ignore[misc] # PySnooper has no types
    """Tells lines as they run.

    Args:
        options: of `lines=`.
        lost: told once of the error when nothing can be written any more.
    """

    def __init__(self, options: Lines, lost: Callable[[Exception], None]) -> None:
        color = is_on_terminal(options.output) if options.color is None else options.color
        super().__init__(
            prefix=options.prefix, thread_info=options.thread_info, normalize=options.normalize,
            relative_time=options.relative_time, color=color,
        )  # fmt: skip
        to = None if options.output == "stderr" else options.output
        # As PySnooper does with stderr, whatever stands there when it is written to.
        write = _write_to_stdout if to == "stdout" else get_write_function(to, options.overwrite)
        self._write = write
        self._lost, self._is_lost = lost, False
        self._path: str | None = None
        self._silent = False

    def write(self, text: str) -> None:
        """Write one line; what cannot be written stops no program."""
        if self._is_lost:
            return
        try:
            super().write(text)
        except Exception as error:
            let_through(error)
            self._is_lost = True
            self._lost(error)

    def begin(self, frame: FrameType, line: int, what: str, depth: int, started_ns: int) -> None:
        """A line, call, return or exception: when, which line, and its text."""
        source = self.source(frame, depth)
        indent = " " * 4 * depth
        try:
            text = source[line - 1].rstrip("\n")
        except IndexError:
            text = "SOURCE IS UNAVAILABLE"
        threads = ""
        if self.thread_info:
            thread = threading.current_thread()
            threads = self.set_thread_info_padding(f"{thread.ident}-{thread.name} ")
        self.write(
            f"{indent}{self._STYLE_DIM}{self._time(started_ns)} {threads}{what:9} {line:4}"
            f"{self._STYLE_RESET_ALL} {escape(text)}"
        )

    def source(self, frame: FrameType, depth: int) -> Any:
        """The lines of a frame's file, which is named when it is another than before."""
        path = frame.f_code.co_filename
        source: Any = []
        # By the name of a module PySnooper would find the module's source for it.
        if path != "<string>":
            # Whatever a notebook or shell names what was typed into it, its text is there.
            source = linecache.getlines(path, frame.f_globals)
            source = source or get_path_and_source_from_frame(frame)[1]
        if self.normalize:
            path = Path(path).name
        if path != self._path:
            self._path = path
            indent = " " * 4 * depth
            self._say(indent, self._FOREGROUND_YELLOW, "Source path:... ", escape(path))
        return source

    def changed(self, variable: VariableDraft, text: str, depth: int, starting: bool) -> None:
        """A variable that is new or not what it was."""
        new = "Starting var:.. " if starting else "New var:....... "
        label = new if variable.was is None else "Modified var:.. "
        words = f"{escape(variable.name)} = {escape(text)}"
        self._say(" " * 4 * depth, self._FOREGROUND_GREEN, label, words)

    def value(self, name: str, text: str, depth: int) -> None:
        """What was returned, yielded or raised."""
        indent = " " * 4 * depth
        if name == "exception":
            self.write(
                f"{indent}{self._FOREGROUND_RED}Exception:..... {self._STYLE_BRIGHT}{escape(text)}"
                f"{self._STYLE_RESET_ALL}"
            )
        else:
            self._say(indent, self._FOREGROUND_CYAN, "Return value:.. ", escape(text))

    def passed_over(self, count: int, what: str, depth: int) -> None:
        """Executions of a line, or calls of a function, that were not told."""
        of = "call" if what == "call" else "execution"
        turns = f"{count} {of}{'s' * (count != 1)} of the line above"
        self._say(" " * 4 * depth, self._FOREGROUND_YELLOW, "Passed over:... ", turns)

    def step(self, number: int, depth: int) -> None:
        """A step of the run begins."""
        self._silent = False
        self._say(" " * 4 * depth, self._FOREGROUND_YELLOW, "Step:.......... ", str(number))

    def fall_silent(self, number: int) -> None:
        """Lines of this step, and of those after it that are not full, are not told."""
        if not self._silent:
            self._silent = True
            told = f"from step {number} on, until a step is full again; every=1 tells all"
            self._say("", self._FOREGROUND_YELLOW, "Silent:........ ", told)

    def speak(self, number: int, depth: int) -> None:
        """A function is entered; after silence it is said in which step."""
        if self._silent:
            self.step(number, depth)

    def left_by_exception(self, depth: int) -> None:
        """A frame was left by an exception."""
        indent = " " * 4 * depth
        self.write(f"{indent}{self._FOREGROUND_RED}Call ended by exception{self._STYLE_RESET_ALL}")

    def elapsed(self, started_ns: int, depth: int) -> None:
        """How long the function or block took."""
        took = "" if self.normalize else _duration(started_ns)
        self._say(" " * 4 * depth, self._FOREGROUND_YELLOW, "Elapsed time: ", took)

    def _say(self, indent: str, color: str, label: str, words: str) -> None:
        self.write(
            f"{indent}{color}{self._STYLE_DIM}{label}{self._STYLE_NORMAL}{words}"
            f"{self._STYLE_RESET_ALL}"
        )

    def _time(self, started_ns: int) -> str:
        if self.normalize:
            return " " * 15
        if self.relative_time:
            return _duration(started_ns)
        return str(pycompat.time_isoformat(datetime.datetime.now().time(), timespec="microseconds"))


def _write_to_stdout(text: str) -> None:
    if sys.stdout is not None:
        sys.stdout.write(text)


def _duration(started_ns: int) -> str:
    elapsed = datetime.timedelta(microseconds=(time.perf_counter_ns() - started_ns) // 1000)
    return str(pycompat.timedelta_format(elapsed))
