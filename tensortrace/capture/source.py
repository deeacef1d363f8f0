"""The user's own frame: which source line a call comes from, and the text around it."""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import sys
import sysconfig
import warnings
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import executing
import torch
from msgspec import structs

from tensortrace.records import Location, Source
from tensortrace.signal_handlers import let_through
from tensortrace.text import LONGEST_SOURCE, is_installed, shorten

if TYPE_CHECKING:
    from tensortrace.capture.ops.places import Place

_PACKAGE = Path(__file__).resolve().parent.parent
# Frames of these are never the user's; the demo lives in our package but plays the user.
_FOREIGN = tuple(
    str(folder) + "/" for folder in (Path(torch.__file__).resolve().parent, _PACKAGE / "capture")
)
# Between what is run again and whoever asked for that: its frames say nothing of the first time.
_REPLAY = str(_PACKAGE / "capture" / "replay" / "rerun.py")
# What pip makes to start an installed program.
_SCRIPTS = str(Path(sysconfig.get_paths()["scripts"]).resolve()) + "/"
_STDLIB = str(Path(sysconfig.get_paths()["stdlib"]).resolve()) + "/"
# The last row: cells of IPython's %%time and %%timeit, IDLE, bpython, xonsh, Databricks.
_TYPED_IN = (
    "<stdin>", "<string>", "<ipython", "<doctest", "<console>", "<input>", "<python-input",
    "<timed ", "<magic-timeit", "<pyshell#", "<bpython-input", "<xonsh-code>", "<command-",
)  # fmt: skip
# What `exec` runs has no text. Python 3.13 shows that of ``python -c`` in its place.
_NAMELESS = "<string>"
_LONGEST_DECORATORS = 200
# A program that makes other functions in each step would fill memory with them.
_MOST_CODES = 10_000


class Code:
    """What was met in some code: its lines, by number and by instruction, and its calls of ops.

    Args:
        code: of a function.
        own: whether it is of no installed package; else `called` has its lines with their callers.
    """

    __slots__ = ("at", "called", "code", "lines", "own", "places")

    def __init__(self, code: CodeType, own: bool = True) -> None:
        self.code = code  # so that its id stays its own
        self.own = own
        self.lines: dict[int | None, Location] = {}
        self.at: dict[int, Location] = {}
        self.called: dict[tuple[int, Location], Location] = {}
        self.places: dict[tuple[str, int, int | None], Place] = {}


class SourceLines:
    """Find the user's frame fast, and collect the text of each function met once.

    Args:
        keep_text: whether to collect source text at all.
    """

    def __init__(self, keep_text: bool = True) -> None:
        self._foreign: dict[str, bool] = {}
        self._own: dict[str, bool] = {}
        # By id, since to hash code takes a microsecond, and by what it is: a function that is made
        # anew in each step is one. Code does not compare its file.
        self._codes: dict[int, Code] = {}
        self._same: dict[tuple[str, CodeType], Code] = {}
        self._met: set[tuple[str, CodeType]] = set()
        self._fresh: list[CodeType] = []
        self.keep_text = keep_text

    def is_user(self, code: CodeType) -> bool:
        """Whether code is the user's: not torch's, not ours, not the standard library's."""
        foreign = self._foreign.get(code.co_filename)
        if foreign is None:
            foreign = self._foreign[code.co_filename] = _is_foreign(code.co_filename)
        return not foreign

    def is_own(self, code: CodeType) -> bool:
        """Whether code of the user's is of no installed package. Hot."""
        own = self._own.get(code.co_filename)
        if own is None:
            own = self._own[code.co_filename] = _is_own(code.co_filename)
        return own

    def user_frame(self, frame: FrameType | None) -> FrameType | None:
        """The nearest user frame, from this frame upwards. Hot."""
        foreign = self._foreign
        while frame is not None:
            code = frame.f_code
            known = foreign.get(code.co_filename)
            if known is False or (known is None and self.is_user(code)):
                return frame
            frame = frame.f_back
        return None

    def locate_frame(self, frame: FrameType | None) -> Location | None:
        """The location of the nearest user frame, from this frame upwards. Hot.

        Of a line in an installed package it names the line above that had it called.
        """
        frame = self.user_frame(frame)
        if frame is None:
            return None
        known = self.code_of(frame.f_code)
        location = self._locate_at(known, frame)
        return location if known.own else self._with_caller(known, location, frame)

    def _locate_at(self, known: Code, frame: FrameType) -> Location:
        # What line it is takes Python longer to find than all of this.
        location = known.at.get(frame.f_lasti)
        if location is None:
            location = known.at[frame.f_lasti] = self._locate(known, frame.f_lineno)
        return location

    def _with_caller(self, known: Code, location: Location, frame: FrameType) -> Location:
        above = frame.f_back
        while above is not None:
            code = above.f_code
            if self.is_user(code):
                if self.is_own(code) and not _is_generated(above):
                    break
            elif code.co_filename == _REPLAY:
                return location
            above = above.f_back
        if above is None:
            return location
        caller = self._locate_at(self.code_of(above.f_code), above)
        key = frame.f_lasti, caller
        found = known.called.get(key)
        if found is None:
            found = known.called[key] = structs.replace(location, caller=caller)
        return found

    def locate_place(self, frame: FrameType | None) -> tuple[Location | None, bool]:
        """The location of the nearest user frame, as it is each time that is there.

        Returns:
            The location without its caller, and whether it is in no installed package.
        """
        frame = self.user_frame(frame)
        if frame is None:
            return None, True
        known = self.code_of(frame.f_code)
        return self._locate_at(known, frame), known.own

    def locate_below(
        self, frame: FrameType | None, outer: FrameType, known: Location | None
    ) -> Location | None:
        """The nearest user frame's, where the location of an outer frame is known already. Hot.

        That one's caller is the caller of all below it.
        """
        foreign = self._foreign
        while frame is not None:
            if frame is outer:
                return known
            if foreign.get(frame.f_code.co_filename) is not True and self.is_user(frame.f_code):
                return self._locate_at(self.code_of(frame.f_code), frame)
            frame = frame.f_back
        return None

    def locate_traceback(self, traceback: TracebackType | None) -> Location | None:
        """The innermost user line of a traceback, with its text, and its caller if installed."""
        found = own = None
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if self.is_user(code):
                found = code, traceback.tb_lineno
                if self.is_own(code):
                    own = found
            traceback = traceback.tb_next
        if found is None:
            return None
        location = with_code(self._locate(self.code_of(found[0]), found[1]))
        if location is None or own is None or own == found:
            return location
        return structs.replace(
            location, caller=with_code(self._locate(self.code_of(own[0]), own[1]))
        )

    def locate_code(self, code: CodeType) -> Location | None:
        """Where a function of the user's is defined."""
        if not self.is_user(code):
            return None
        return Location(_file_of(code), code.co_firstlineno, _name(code))

    def locate_line(self, code: CodeType, line: int) -> Location:
        """A line of a function, whoever wrote it. Hot."""
        return self._locate(self.code_of(code), line)

    def code_of(self, code: CodeType) -> Code:
        """What was met in some code, or in code of the same file that is equal to it. Hot."""
        known = self._codes.get(id(code))
        if known is None:
            key = code.co_filename, code
            known = self._same.get(key)
            if known is None:
                if len(self._codes) >= _MOST_CODES:
                    self._codes.clear()
                    self._same.clear()
                known = self._codes[id(code)] = self._same[key] = Code(code, self.is_own(code))
        return known

    def _locate(self, known: Code, line: int | None) -> Location:
        location = known.lines.get(line)
        if location is None:
            code = known.code
            location = Location(_file_of(code), line or code.co_firstlineno, _name(code))
            known.lines[line] = location
            if self.keep_text and (code.co_filename, code) not in self._met:
                self._met.add((code.co_filename, code))
                self._fresh.append(code)
        return location

    def take_sources(self, step: int) -> list[Source]:
        """The text of the functions met since the last call, as records."""
        if not self._fresh:
            return []
        fresh, self._fresh = self._fresh, []
        return [found for code in fresh if (found := _read_source(code, step)) is not None]


def definition_line(code: CodeType) -> int:
    """Where the ``def`` of a function is, below its decorators."""
    first = code.co_firstlineno
    for line in range(first, first + _LONGEST_DECORATORS):
        text = linecache.getline(code.co_filename, line).lstrip()
        if text.startswith(("def ", "async def ")):
            return line
        if not text or (line == first and not text.startswith("@")):
            break
    return first


def with_code(location: Location | None) -> Location | None:
    """Add the text of the line, where it can be read."""
    if location is None or location.code is not None:
        return location
    text = line_text(location.file, location.line).strip()
    return structs.replace(location, code=text[:500] or None)


def line_text(file: str, line: int) -> str:
    """A line of a file as it is written, with its end; empty where there is none to read."""
    return linecache.getline(_cells.get(file, file), line) if file != _NAMELESS else ""


# By what a notebook calls them: the names under which cells were compiled.
_cells: dict[str, str] = {}


def _file_of(code: CodeType) -> str:
    """The file of some code, as one would write it; the cell of a notebook."""
    name = code.co_filename
    if "ipykernel_" in name or name.startswith("<ipython-input"):
        return _cell_of(name)
    return _plain(name) if "/../" in name or "/./" in name else name


def _cell_of(name: str) -> str:
    """What IPython's own tracebacks call a cell: ``Cell In[4]``."""
    ipython: Any = sys.modules.get("IPython")
    try:
        cell = " ".join(ipython.get_ipython().compile.format_code_name(name))
    except Exception as error:  # older, or not at work, or no cell
        let_through(error)
        return name
    _cells[cell] = name
    return cell


@functools.lru_cache(1000)
def _plain(name: str) -> str:
    """A path without the ``..`` of ``python ../x.py``, but where a link is passed on the way."""
    plain = os.path.normpath(name)
    try:
        return plain if Path(plain).samefile(name) else name
    except (OSError, ValueError):
        return name


def _name(code: CodeType) -> str:
    name = getattr(code, "co_qualname", None)
    return shorten(_written_name(code) if name is None else name)


def _written_name(code: CodeType) -> str:
    """Before Python 3.11 a function's code does not know what it is in; its source does."""
    if code.co_filename.startswith("<"):
        return code.co_name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user's source is parsed anew
            return executing.Source.for_filename(code.co_filename).code_qualname(code)
    except Exception as error:
        let_through(error)
        return code.co_name  # source that is not there


def _is_foreign(filename: str) -> bool:
    if filename.startswith("<"):
        return not filename.startswith(_TYPED_IN)
    path = filename if filename.startswith("/") else str(Path(filename).resolve())
    if path.startswith(_FOREIGN):
        return True
    inside = path.startswith(str(_PACKAGE) + "/")
    if inside:
        return Path(path).name != "demo.py"
    return path.startswith(_STDLIB) and not is_installed(path)


def _is_generated(frame: FrameType) -> bool:
    """Whether a package made the code, as a dataclass makes its ``__init__``."""
    made = frame.f_code.co_filename == _NAMELESS
    return made and is_installed(str(frame.f_globals.get("__file__", "")))


def _is_own(filename: str) -> bool:
    path = filename if filename.startswith(("/", "<")) else str(Path(filename).resolve())
    if path.startswith(str(_PACKAGE) + "/"):
        return True  # the demo, which plays the user wherever we are installed
    return not is_installed(path) and not path.startswith(_SCRIPTS)


def _read_source(code: CodeType, step: int) -> Source | None:
    if code.co_filename == _NAMELESS:
        return None
    try:
        if code.co_name == "<module>":
            lines, first = linecache.getlines(code.co_filename), 1
        else:
            lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError, IndexError, SyntaxError):
        return None
    if not lines:
        return None
    text = "".join(lines)[:LONGEST_SOURCE]
    return Source(step=step, file=_file_of(code), name=_name(code), first_line=first, text=text)
