"""What flowed through the source lines of a run, as data: by function, by line, by name.

One pass over the log. What it holds grows with the lines of the program, not with the log; of the
step that is read it holds what tensors were.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING

from tensortrace.errors import UsageError
from tensortrace.export.contents import read_to_the_end
from tensortrace.export.flows import DEFINED, FunctionFlow, LineFlow
from tensortrace.export.lines_reader import FirstBad, Reader
from tensortrace.export.steps import require_steps
from tensortrace.records import Line, Source, Step
from tensortrace.text import LONGEST_NAME, escape, shorten

if TYPE_CHECKING:
    from tensortrace.run import Run

# Code of these has no text of its own: its lines stand in the function around it. Python 3.10 does
# not say which that is.
_NAMELESS = re.compile(r"(\.?(<locals>\.)?<(lambda|listcomp|setcomp|dictcomp|genexpr)>)+$")
# Steps beyond which a step is not near, and full ones that are looked at.
FAR, TRIED = 2000, 20
Span = tuple[int, int, Source]
_KINDS = ("line", "call", "action", "optimizer", "finding", "step")


@dataclass(frozen=True, slots=True)
class Listing:
    """The functions of a run in order of first execution, and what was read of them.

    Attributes:
        recorded: whether these steps have line records; else lines are those that called modules
            and ops.
        steps: those that were asked for; `whole` counts those with lines or calls.
        first_bad: the line that made the first NaN or infinity of the run, whether it is among
            these or not; known if one of these made any. `first_bad_here` is the first step here.
        near: of a run with lines, where none of these steps has any, the nearest steps that do.
    """

    run: Run
    functions: list[FunctionFlow]
    recorded: bool
    steps: range
    whole: int
    first_bad: FirstBad | None = None
    first_bad_here: int | None = None
    near: tuple[int, ...] = ()


def gather_lines(
    run: Run,
    *,
    steps: range | None = None,
    function: str | None = None,
    tick: Callable[[int], None] = lambda step: None,
) -> Listing:
    """Collect what flowed through the lines of a run.

    Args:
        run: the log.
        steps: those to read; all by default.
        function: only functions of this name: whole (`Net.forward`), its end (`forward`) or a glob.
        tick: called with the number of each step that was read, to show progress.
    Raises:
        UsageError: the run has none of the steps, or no such function.
    """
    wanted = run.steps if steps is None else steps
    if steps is not None:
        require_steps([run], steps)
    read_to_the_end(run)
    reader = Reader(run.modules)
    if wanted:
        for record in run.records(wanted[0], wanted[-1] + 1, kinds=_KINDS):
            reader.feed(record)
            if isinstance(record, Step):
                tick(record.step)
    functions = _with_sources(reader.finish(), run.sources)
    if function is not None:
        functions = _chosen(functions, function)
    first = here = reader.first_bad
    if here is not None and wanted[0] > run.first_step():
        first = _first_bad_before(run, wanted[0]) or here
    near = () if reader.recorded or not run.header.options.get("lines") else _near(run, wanted)
    return Listing(
        run, functions, reader.recorded, wanted, reader.whole,
        first_bad=first, first_bad_here=here.step if here else None, near=near,
    )  # fmt: skip


def _first_bad_before(run: Run, stop: int) -> FirstBad | None:
    for record in run.records(run.first_step(), stop, kinds=("line",)):
        if isinstance(record, Line) and "nonfinite" in record.flags:
            return FirstBad(record.step, record.location)
    return None


def _near(run: Run, steps: range) -> tuple[int, ...]:
    """The nearest steps before and after some that have lines, as far as they are not far."""
    if not steps:
        return ()
    before = (s.step for s in reversed(run.summaries(max(0, steps[0] - FAR), steps[0])) if s.full)
    after = (s.step for s in run.summaries(steps[-1] + 1, steps[-1] + 1 + FAR) if s.full)
    # A step that became full for a finding has none all the same.
    found = (next((n for n in some if len(run.step(n).indices("line"))), None)
             for some in (islice(before, TRIED), islice(after, TRIED)))  # fmt: skip
    return tuple(n for n in found if n is not None)


def _with_sources(
    functions: Iterable[FunctionFlow], sources: Sequence[Source]
) -> list[FunctionFlow]:
    """Give each function its text; lines of a lambda or comprehension go to the one around it."""
    by_file: dict[str, list[Span]] = {}
    for span in spans_of(sources):
        by_file.setdefault(span[2].file, []).append(span)
    found: dict[tuple[str, str, int], FunctionFlow] = {}
    for function in functions:
        for number, line in sorted(function.lines.items()):
            source = source_of(function.name, number, by_file.get(function.file, []))
            name = function_name(source.name if source is not None else function.name, source)
            key = function.file, name, -1 if source is None else source.first_line
            whole = found.setdefault(key, FunctionFlow(function.file, name, source))
            own = name == function.name
            here = whole.lines.get(number)
            if here is None and own:
                whole.lines[number] = line
            else:
                whole.lines.setdefault(number, LineFlow(number)).join(line, counting=own)
    return list(found.values())


def spans_of(sources: Iterable[Source]) -> list[Span]:
    """The first and last line of each stored text, for `source_of`."""
    return [(s.first_line, s.first_line + len(s.lines) - 1, s) for s in sources]


def source_of(name: str, number: int, spans: Iterable[Span]) -> Source | None:
    """The stored text of a function that holds a line of it.

    Args:
        name: of the function; a lambda or comprehension is found in the function around it.
        number: of the line.
        spans: the stored texts of its file.
    """
    holding = [source for first, last, source in spans if first <= number <= last]
    wanted = _around(name)
    if not wanted:
        named = [s for s in holding if _around(s.name) == s.name]
        return max(named or holding, key=lambda s: s.first_line, default=None)
    exact = [s for s in holding if s.name == wanted]
    if exact:
        return max(exact, key=lambda s: s.first_line)
    # The function itself may be known only as the text around a comprehension: the larger one.
    near = [s for s in holding if function_name(s.name, s) == wanted]
    return min(near, key=lambda s: s.first_line, default=None)


def function_name(name: str, source: Source | None) -> str:
    """Name a function as its `def` does, for code within it that has no name of its own."""
    around = _around(name)
    if around or source is None:
        return around or name
    begins = DEFINED.search(source.text)
    return begins[1] if begins else name


def _around(name: str) -> str:
    """The function around what has no name; empty if it is not said."""
    return name if len(name) > LONGEST_NAME else _NAMELESS.sub("", name)


def _chosen(functions: Sequence[FunctionFlow], name: str) -> list[FunctionFlow]:
    """The functions that a name means.

    Raises:
        UsageError: none; names the closest.
    """
    chosen = [
        f for f in functions
        if f.name == name or f.name.endswith(f".{name}") or fnmatchcase(f.name, name)
    ]  # fmt: skip
    if chosen:
        return chosen
    names = list(dict.fromkeys(f.name for f in functions))
    if not names:
        raise UsageError(f"--function {name!r}: the log has no lines of any function there.")
    ends = {n.rpartition(".")[2]: n for n in reversed(names)}
    close = [ends.get(n, n) for n in difflib.get_close_matches(name, [*names, *ends], 3, 0.5)]
    told = [escape(shorten(n, 80)) for n in dict.fromkeys(close or names[:5])]
    word = "Closest" if close else "It has"
    raise UsageError(f"no function {name!r} has lines there. {word}: {', '.join(told)}.")
