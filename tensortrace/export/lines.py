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
from typing import TYPE_CHECKING

from tensortrace.errors import UsageError
from tensortrace.export.contents import read_to_the_end
from tensortrace.export.flows import DEFINED, FunctionFlow, LineFlow
from tensortrace.export.lines_reader import Reader
from tensortrace.export.steps import require_steps
from tensortrace.records import Source, Step
from tensortrace.text import LONGEST_NAME, escape, shorten

if TYPE_CHECKING:
    from tensortrace.run import Run

# Code of these has no text of its own: its lines stand in the function around it. Python 3.10 does
# not say which that is.
_NAMELESS = re.compile(r"(\.?(<locals>\.)?<(lambda|listcomp|setcomp|dictcomp|genexpr)>)+$")
Span = tuple[int, int, Source]
_KINDS = ("line", "call", "action", "optimizer", "finding", "step")


@dataclass(frozen=True, slots=True)
class Listing:
    """The functions of a run in order of first execution, and what was read of them.

    `recorded` says that the log has line records; else lines are those that called modules and ops.
    `steps` are the first and last step asked for, `whole` counts those with lines or calls.
    """

    run: Run
    functions: list[FunctionFlow]
    recorded: bool
    steps: range
    whole: int


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
    return Listing(run, functions, reader.recorded, wanted, reader.whole)


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
    return [(s.first_line, s.first_line + s.text.count("\n"), s) for s in sources]


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
