"""The annotated listing as a terminal shows it: source lines, what flowed through them, findings.

Everything that comes from the log passes `escape`. Without colour no escape byte is written; with
`plain` the drawing itself is ASCII.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, chop_cells
from rich.color import ColorSystem
from rich.style import Style

from tensortrace.export.finding_words import place_text
from tensortrace.export.flows import LISTED, UNTOLD, FunctionFlow, LineFlow, bad_text, grouped
from tensortrace.export.lines import Listing
from tensortrace.export.margins import margin
from tensortrace.export.steps import range_text
from tensortrace.records import Location, Severity
from tensortrace.text import SEVERITY_SIGN, duration_text, escape, shorten

# A piece of a line: escaped text and the name of a style.
Piece = tuple[str, str]
STYLES = {
    "": Style.null(),
    "head": Style.parse("bold"),
    "faint": Style.parse("dim"),
    "flow": Style.parse("cyan"),
    "error": Style.parse("bold red"),
    "warning": Style.parse("yellow"),
    "note": Style.parse("cyan"),
}
MOST_GROUPS = 6
# Longer runs of lines that nothing is known of are folded; so many stay beside those that are.
FOLDED_FROM, BESIDE = 7, 1
# What is said stands right of the code if so many columns are left for it, else below.
ROOM = 26
LONGEST_CODE, LONGEST_MESSAGE = 2000, 400
TIME_FROM, SHARE_FROM = 60, 72
# Lines of a function by whose length the column of the code is chosen.
MOST_TRIED = 1000
HARD = "\xa0"


@dataclass(frozen=True, slots=True)
class Look:
    """How to draw: columns, and signs beyond ASCII or not."""

    width: int
    plain: bool = False

    @property
    def arrow(self) -> str:
        """Between the lengths that a dim had."""
        return "->" if self.plain else "→"


def render_lines(
    listing: Listing, *, width: int = 100, colour: bool = False, plain: bool = False
) -> Iterator[str]:
    """Write a listing, line by line, each with its line feed.

    Args:
        listing: what `gather_lines` collected.
        width: columns to keep to.
        colour: with terminal colours; without, the text has no escape byte.
        plain: whether to draw in ASCII only.
    """
    look = Look(width, plain)
    for pieces in _lines(listing, look):
        text = "".join(_paint(piece, style) if colour else piece for piece, style in pieces)
        yield (text if colour else text.rstrip()) + "\n"


def _paint(text: str, style: str) -> str:
    return STYLES[style].render(text, color_system=ColorSystem.STANDARD) if style else text


def _lines(listing: Listing, look: Look) -> Iterator[list[Piece]]:
    yield from _wrapped(_head(listing), look.width, "head")
    yield from _first_elsewhere(listing, look)
    for function in listing.functions:
        yield []
        yield from _function(listing, function, look)
    if not listing.functions:
        yield []
        yield from _wrapped("No line of a function of yours is in these steps.", look.width)
    if listing.near:
        yield []
        yield from _wrapped(_thinned(listing), look.width)
    elif not listing.recorded:
        yield []
        yield from _wrapped(
            "Source lines were not recorded: these are the lines that called modules and "
            "operations. All lines and their variables: trace(lines=True).",
            look.width,
        )


def _first_elsewhere(listing: Listing, look: Look) -> Iterator[list[Piece]]:
    """Name the line that made the first NaN or infinity, if it is not among those that follow."""
    first = listing.first_bad
    if first is None:
        return
    place = first.location
    shown = any(
        function.file == place.file and place.line in function.lines
        for function in listing.functions
    )
    if first.step in listing.steps and shown:
        return
    where = f"{escape(shorten(place.function, 200))}, {place_text(listing.run, place)}"
    told = f"x the first NaN or infinity of the run was made elsewhere: {where} (step {first.step})"
    yield from _wrapped(told, look.width, "error")


def _thinned(listing: Listing) -> str:
    steps, plural = listing.steps, "" if len(listing.steps) == 1 else "s"
    near = " and ".join(map(str, listing.near))
    those = "step" if len(listing.near) == 1 else "steps"
    have = "has" if len(listing.near) == 1 else "have"
    return (
        f"Step{plural} {range_text(steps)}: not recorded in full, so without lines. The nearest "
        f"{those} that {have} them: {near}. trace(every=1) records all, steps= chooses some."
    )


def _head(listing: Listing) -> str:
    run = listing.run
    rank = f", rank {run.header.rank}" if run.header.world_size > 1 else ""
    steps = listing.steps
    if not steps:
        return f"{escape(str(run.path))}{rank}: no steps"
    kept = "lines" if listing.recorded else "calls"
    plural = "" if len(steps) == 1 else "s"
    whole = ""
    if len(steps) > 1 or not listing.whole:
        whole = f", {listing.whole} of them with {kept}"
    return f"{escape(str(run.path))}{rank}: step{plural} {range_text(steps)}{whole}"


def _wrapped(text: str, width: int, style: str = "") -> Iterator[list[Piece]]:
    for line in textwrap.wrap(text, width, break_on_hyphens=False) or [""]:
        yield [(line, style)]


@dataclass(frozen=True, slots=True)
class _Columns:
    """Widths of the columns of one function; 0 for one that has no room."""

    number: int
    runs: int
    time: int
    share: int
    code: int
    beside: bool
    note: int

    @property
    def gutter(self) -> int:
        """Columns left of the code."""
        return 2 + sum(n + 2 for n in (self.number, self.runs, self.time, self.share) if n)


def _function(listing: Listing, function: FunctionFlow, look: Look) -> Iterator[list[Piece]]:
    place = place_text(listing.run, Location(function.file, function.first_line, function.name))
    told = f"{escape(shorten(function.name, 200))}  {place}"
    if function.entered:
        told += f"  called {function.entered} time{'' if function.entered == 1 else 's'}"
        if function.followed < function.entered:
            told += f", {function.followed} of them recorded"
    yield from ([(line, "head")] for line in _chopped(told, look.width))
    rows = _rows(function)
    columns = _columns(listing, function, rows, look)
    yield [(_titles(listing, columns), "faint")]
    total = function.time_ns
    for number, text in rows:
        if number is None:
            yield [(" " * columns.gutter + text, "faint")]
            continue
        line = function.lines.get(number, LineFlow(number))
        wrong = list(margin(listing, function.file, line))
        yield from _line(line, text, columns, look, wrong=wrong, total=total)


def _rows(function: FunctionFlow) -> list[tuple[int | None, str]]:
    """The lines to show as number and code; None for a fold of several."""
    if function.source is None:
        return [(number, _code(function.code(number) or "", "").strip())
                for number in sorted(function.lines)]  # fmt: skip
    text = function.source.text.rstrip("\n").expandtabs(4).split("\n")
    lines = textwrap.dedent("\n".join(text)).split("\n")
    first = function.source.first_line
    known = {n - first for n in function.lines}
    near = {i + by for i in known for by in range(-BESIDE, BESIDE + 1)} | {0}
    rows: list[tuple[int | None, str]] = []
    at = 0
    while at < len(lines):
        end = at
        while end < len(lines) and end not in near:
            end += 1
        if end - at >= FOLDED_FROM:
            rows.append((None, f"... {end - at} lines"))
            at = end
            continue
        for i in range(at, min(max(end, at + 1), len(lines))):
            rows.append((first + i, _code(lines[i], "")))
        at = max(end, at + 1)
    outside = [n for n in sorted(function.lines) if not 0 <= n - first < len(lines)]
    rows += [(n, (function.lines[n].code or "").strip()) for n in outside]
    return rows


def _code(text: str, more: str) -> str:
    return shorten(escape(text), LONGEST_CODE) + more


def _columns(
    listing: Listing, function: FunctionFlow, rows: Sequence[tuple[int | None, str]], look: Look
) -> _Columns:
    number = max(4, *(len(str(n)) for n, _ in rows if n is not None), 0)
    runs = max(5, *(len(str(line.executions)) for line in function.lines.values()), 0)
    timed = any(line.host_ns for line in function.lines.values())
    time = 8 if timed and look.width >= TIME_FROM else 0
    share = 3 if timed and look.width >= SHARE_FROM else 0
    below = _Columns(number, runs, time, share, 0, False, 0)
    room = max(look.width - below.gutter, 16)
    told = [(cell_len(code), function.lines[n]) for n, code in rows if n in function.lines]
    lengths = sorted(length for length, _ in told)[-MOST_TRIED:]
    tried = {lengths[(len(lengths) - 1) * part // 4] for part in range(5)} if lengths else set()
    best = replace(below, code=room, note=room - 4)
    fewest = _rows_needed(told, best, look)
    for code in sorted(tried):
        columns = replace(below, code=code, beside=True, note=room - code - 4)
        if (
            code >= 16
            and columns.note >= ROOM
            and (n := _rows_needed(told, columns, look)) <= fewest
        ):
            best, fewest = columns, n
    return best


def _rows_needed(told: Sequence[tuple[int, LineFlow]], columns: _Columns, look: Look) -> int:
    """How many lines a function takes with these columns, but for its code."""
    notes = [(length, sum(1 for _ in _notes(line, look, columns.note))) for length, line in told]
    return sum(n - (columns.beside and n > 0 and length <= columns.code) for length, n in notes)


def _titles(listing: Listing, columns: _Columns) -> str:
    cells = [f"{'line':>{columns.number}}"]
    cells.append(f"{'runs' if listing.recorded else 'calls':>{columns.runs}}")
    cells += [f"{'time':>{columns.time}}"] if columns.time else []
    cells += [f"{'%':>{columns.share}}"] if columns.share else []
    return "  " + "  ".join(cells)


def _line(
    line: LineFlow, code: str, columns: _Columns, look: Look, *, wrong: Sequence[Piece], total: int
) -> Iterator[list[Piece]]:
    told = {of for _, of in wrong}
    bad = any(flow.bad for flow in line.flows) or "error" in told
    warned: Severity | None = "warning" if "warning" in told else "note" if "note" in told else None
    severity: Severity | None = "error" if bad else warned
    sign, style = (SEVERITY_SIGN[severity], severity) if severity else (" ", "")
    gutter = (f"{sign} {_numbers(line, total, columns)}  ", style or "faint")
    blank = (" " * columns.gutter, "")
    pieces = _hanging(code, look.width - columns.gutter)
    indent = 0 if columns.beside else min(len(code) - len(code.lstrip()), columns.note // 2)
    notes = list(_notes(line, look, columns.note - indent))
    here = not code or (columns.beside and cell_len(code) <= columns.code)
    for i, piece in enumerate(pieces):
        row: list[Piece] = [blank if i else gutter, (piece, style)]
        if here and notes:
            room = columns.code if columns.beside else 0
            row += [(" " * max(room - cell_len(piece), 0) + "  # ", "faint"), *notes.pop(0)]
        yield row
    left = columns.code if columns.beside else indent
    yield from ([blank, (" " * left + "  # ", "faint"), *note] for note in notes)
    for text, of in wrong:
        for i, part in enumerate(_chopped_words(text, look.width - columns.gutter - 4)):
            yield [blank, ("  " * (1 + (i > 0)) + part, of)]


def _numbers(line: LineFlow, total: int, columns: _Columns) -> str:
    cells = [f"{line.number:>{columns.number}}"]
    runs = str(line.executions) if line.executions else ""
    cells.append(f"{runs:>{columns.runs}}")
    if columns.time:
        about = "~" if line.recorded < line.executions else ""
        time = about + time_text(line.time_ns) if line.host_ns else ""
        cells.append(f"{time:>{columns.time}}")
    if columns.share:
        share = f"{100 * line.time_ns / total:.0f}" if line.host_ns and total else ""
        cells.append(f"{share:>{columns.share}}")
    return "  ".join(cells)


def time_text(host_ns: int) -> str:
    """Write a time on the host in ASCII: ``12 us``, ``3.1 ms``, ``1.2 s``."""
    return duration_text(host_ns).replace("µ", "u")


def _notes(line: LineFlow, look: Look, width: int) -> Iterator[list[Piece]]:
    """What flowed, one note for each group of names, as lines of a width."""
    groups = grouped([flow for flow in line.flows if flow.name not in UNTOLD], look.arrow)
    for flows, text in groups[:MOST_GROUPS]:
        names = ", ".join(escape(shorten(flow.name or "(root)", 60)) for flow in flows[:LISTED])
        if len(flows) > LISTED:
            names += f" +{len(flows) - LISTED}"
        bad = bad_text(flows[0])
        # A shape is not broken: the hard spaces in it are no places to wrap at.
        *before, last = _chopped_words(f"{names} {text.replace(' ', HARD)}".rstrip(), width)
        yield from ([(part.replace(HARD, " "), "flow")] for part in before)
        row: list[Piece] = [(last.replace(HARD, " "), "flow")]
        if not bad or cell_len(last) + 2 + len(bad) <= width:
            yield [*row, (f"  {bad}" if bad else "", "error")]
        else:
            yield row
            yield from ([("  " + part, "error")] for part in _chopped_words(bad, width - 2))
    more = line.unnamed + sum(len(flows) for flows, _ in groups[MOST_GROUPS:])
    if more:
        yield [(f"and {more} more", "faint")]


def _chopped(text: str, width: int) -> list[str]:
    return chop_cells(text, max(width, 8)) if cell_len(text) > width else [text]


def _hanging(code: str, width: int) -> list[str]:
    """Break a line of code that is too long; what follows hangs four columns deeper."""
    width = max(width, 8)
    if cell_len(code) <= width:
        return [code]
    indent = min(len(code) - len(code.lstrip()) + 4, width // 2)
    first = _chopped(code, width)[0]
    rest = _chopped(code[len(first) :], width - indent)
    return [first, *(" " * indent + piece for piece in rest)]


def _chopped_words(text: str, width: int) -> list[str]:
    """Break a text between words, and a word that is too long within it."""
    lines = textwrap.wrap(text, max(width, 8), break_long_words=False, break_on_hyphens=False)
    return [piece for line in lines or [""] for piece in _chopped(line, width)]
