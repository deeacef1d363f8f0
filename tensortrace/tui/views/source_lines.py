"""The source of a function around an executed line: signs, times run, code, values beside it.

Pure: it takes the executed lines and a width and gives styled lines; every string is escaped here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from tensortrace.export.flows import UNTOLD
from tensortrace.records import Finding, Line, Location, Source, Tensor
from tensortrace.text import (
    SEVERITY_SIGN,
    duration_text,
    escape,
    number_text,
    shape_text,
    short_dtype,
    shorten,
)
from tensortrace.tui.step.cells import health
from tensortrace.tui.step.findings import in_order
from tensortrace.tui.step.row import worst
from tensortrace.tui.terminal.styled import (
    UNICODE,
    Glyphs,
    Styled,
    clip,
    fit,
    wrapped,
)
from tensortrace.tui.views.executed import Executed

LONGEST_CODE, LONGEST_NAME = 1000, 60
# The code gets so much of the width, and what flowed so many columns if the code leaves them.
CODE_SHARE, NOTE_FROM = 0.6, 20
# Executions of one line that are looked through for one that changed something.
RECENT = 3
# Columns before the code.
GUTTER = 13


@dataclass(frozen=True, slots=True)
class Function:
    """The function that a line is in, as the pane shows it: `rows` are numbers with their code."""

    location: Location
    rows: list[tuple[int, str]]

    def row_of(self, number: int) -> int:
        """The row of a line of the file; the nearest before it if it has none."""
        return max((i for i, (n, _) in enumerate(self.rows) if n <= number), default=0)


def function_at(executed: Executed, at: int, source: Source | None) -> Function:
    """Take the text of the function that a line is in; without it, the lines that ran."""
    location = executed.lines[at].location
    if source is not None:
        text = source.text.rstrip("\n").expandtabs(4).split("\n")
        code = textwrap.dedent("\n".join(text)).split("\n")
        rows = [(source.first_line + i, line) for i, line in enumerate(code)]
        if rows[0][0] <= location.line <= rows[-1][0]:
            return Function(location, rows)
    known: dict[int, str] = {}
    for line in executed.lines:
        place = line.location
        if (place.file, place.function) == (location.file, location.function):
            known[place.line] = (place.code or known.get(place.line, "")).strip()
    return Function(location, sorted(known.items()))


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside a line of code: `ran` counts executions up to now, `line` is the last.

    `ahead` says that it runs only later in this frame, `stale` that it ran again before this place,
    passed over. `findings` are those here in this step.
    """

    line: Line | None
    ran: int
    ahead: bool
    findings: tuple[Finding, ...]
    stale: bool = False


def beside_lines(executed: Executed, at: int, findings: Sequence[Finding]) -> dict[int, Beside]:
    """Tell for each line of the frame, by number, what is known of it when a line has run.

    Args:
        findings: those of this step.
    """
    here = executed.lines[at].location
    done, ahead, passed = executed.done(at), executed.ahead(at), executed.passed(at)
    wrong: dict[int, list[Finding]] = {}
    for finding in findings:
        place = finding.location
        if place is not None and (place.file, place.function) == (here.file, here.function):
            wrong.setdefault(place.line, []).append(finding)
    found: dict[int, Beside] = {}
    for number in done.keys() | ahead.keys() | wrong.keys():
        ran = done.get(number, [])
        later = ahead.get(number)
        last = _telling([executed.lines[i] for i in ran[-RECENT:]])
        line = last if last is not None or later is None else executed.lines[later]
        times = 1 + max(
            (executed.lines[i].nth for i in ran if executed.lines[i].what == "line"), default=-1
        )
        here_too = tuple(in_order(wrong.get(number, [])))
        found[number] = Beside(line, times, not ran, here_too, bool(ran) and number in passed)
    return found


def _telling(ran: Sequence[Line]) -> Line | None:
    """The last of some executions of a line that changed or returned something; else the last."""
    for line in reversed(ran):
        if line.changed or (line.value is not None and line.value.text != "None"):
            return line
    return ran[-1] if ran else None


def source_line(
    row: tuple[int, str],
    told: Beside | None,
    executed: Executed,
    width: int,
    *,
    current: bool,
    here: bool = False,
    longest: int,
    glyphs: Glyphs = UNICODE,
) -> Styled:
    """Write one line of the source pane: signs, number, times it ran, code, what flowed.

    Args:
        row: number and code of the line.
        longest: columns of the longest code that has something beside it.
        current: whether it is the one that the walk is at; `here` whether the cursor is on it.
    """
    line = _gutter(row[0], told, executed, current=current, here=here, glyphs=glyphs)
    (text, style), (note, note_style), wide, room = _beside(
        row[1], told, executed, width, current=current, longest=longest, glyphs=glyphs
    )
    if not room:
        return [*line, (clip(text, wide, glyphs), style)]
    shown = clip(note, room, glyphs)
    return [*line, (fit(text, wide, glyphs), style), ("  ", ""), (shown, note_style)]


def whole_lines(
    row: tuple[int, str],
    told: Beside | None,
    executed: Executed,
    width: int,
    *,
    current: bool,
    longest: int,
    glyphs: Glyphs = UNICODE,
) -> list[Styled]:
    """Write a line of the source pane as `source_line` does, on as many lines as all of it takes.

    The signs are left to the first of them, which is drawn with or without the cursor.
    """
    code, note, wide, room = _beside(
        row[1], told, executed, width, current=current, longest=longest, glyphs=glyphs
    )
    indent = cell_len(code[0]) - cell_len(code[0].lstrip(" ")) + 4
    left = wrapped([code], wide - (not room), indent)  # a scrollbar may lie over the last cell
    right = wrapped([note], room - 1) if room else []
    lines: list[Styled] = []
    for at in range(max(len(left), len(right))):
        beside = left[at] if at < len(left) else []
        noted = right[at] if at < len(right) else []
        gap = " " * (wide - cell_len("".join(text for text, _ in beside)) + 2) if noted else ""
        lines.append([(" " * GUTTER, ""), *beside, (gap, ""), *noted])
    return lines


def _gutter(
    number: int,
    told: Beside | None,
    executed: Executed,
    *,
    current: bool,
    here: bool,
    glyphs: Glyphs,
) -> Styled:
    """What stands before the code: signs, number, times it ran."""
    severity = worst(told.findings) if told else None
    bad = told is not None and told.line is not None and _bad(told.line, executed)
    sign = SEVERITY_SIGN[severity] if severity else "x" if bad else " "
    sign_style = severity or ("error" if bad else "")
    pointer = glyphs.cursor if current else "-" if here else " "
    ran = f"{told.ran}x" if told is not None and told.ran > 1 else ""
    return [
        (pointer, "error" if current else ""), (sign, sign_style), (f"{number:>5} ", "faint"),
        (f"{ran:>4} ", "faint"),
    ]  # fmt: skip


def _beside(
    code: str,
    told: Beside | None,
    executed: Executed,
    width: int,
    *,
    current: bool,
    longest: int,
    glyphs: Glyphs,
) -> tuple[tuple[str, str], tuple[str, str], int, int]:
    """The code and what flowed, each with its style, and the cells of both; 0 for no note."""
    room = max(0, width - GUTTER)
    text = escape(shorten(code, LONGEST_CODE))
    style = "mark" if current else ""
    note = "" if told is None or told.line is None else note_text(told.line, executed, glyphs)
    if note and told is not None and told.stale:
        note = f"~ {note}"
    if not note or room < 2 * NOTE_FROM:
        return (text, style), ("", ""), room, 0
    # A line of code that is longer than most takes the room that its own note leaves.
    wide = max(min(longest, int(room * CODE_SHARE)), min(cell_len(text), room - cell_len(note) - 2))
    bad = told is not None and told.line is not None and _bad(told.line, executed)
    note_style = (
        "faint" if told is not None and (told.ahead or told.stale) else "error" if bad else "ok"
    )
    return (text, style), (note, note_style), wide, room - wide - 2


def note_text(line: Line, executed: Executed, glyphs: Glyphs = UNICODE) -> str:
    """Say in a few words what a line changed or returned."""
    values = [*line.changed, *([line.value] if line.value is not None else [])]
    told = []
    for variable in values:
        carried = line.what == "call" and variable.was == variable.text
        if carried or variable.name in UNTOLD:
            continue
        names: list[tuple[str, int | None]] = [
            (f"{variable.name}{place}", id) for place, id in variable.tensors
        ]
        for name, id in names or [(variable.name, None)]:
            tensor = executed.tensors.get(id) if id is not None else None
            short = escape(shorten(name, LONGEST_NAME))
            if tensor is None:
                text = escape(shorten(variable.text, LONGEST_NAME))
                told.append(f"{short} = {text}" if text else short)
            else:
                told.append(f"{short} {_tensor(tensor)}")
        for place, text in variable.others:
            short = escape(shorten(f"{variable.name}{place}", LONGEST_NAME))
            told.append(f"{short} = {escape(shorten(text, LONGEST_NAME))}")
    # Of calls that stand for a line the last one is what it came to.
    return ", ".join(told if executed.recorded else reversed(told))


def _tensor(tensor: Tensor) -> str:
    value = (
        f" = {number_text(tensor.mean)}" if tensor.numel == 1 and tensor.mean is not None else ""
    )
    word = health(tensor)[0]
    bad = f" {word}" if word[:1] in ("x", "!") else ""
    return f"{shape_text(tensor.shape)} {short_dtype(tensor.dtype)}{value}{bad}"


def _bad(line: Line, executed: Executed) -> bool:
    """Whether a line made or returned what is not finite, or raised."""
    values = [*line.changed, *([line.value] if line.value is not None else [])]
    ids = [id for variable in values for _, id in variable.tensors]
    held = (executed.tensors.get(id) for id in ids)
    return line.what == "exception" or any(t is not None and t.nonfinite for t in held)


def title_of(executed: Executed, at: int, width: int, glyphs: Glyphs = UNICODE) -> str:
    """Say where the walk is: the calling functions, the line, how many there are.

    Args:
        width: so many cells; the outermost functions give way first.
    """
    line = executed.lines[at]
    names = [executed.lines[i].location.function.rpartition(".<locals>.")[2] for i in
             executed.stack(at)]  # fmt: skip
    names = [shorten(name, LONGEST_NAME) for name in names]
    what = {"call": ", entered", "return": ", returns", "exception": ", raised"}.get(line.what, "")
    time = f", {duration_text(line.host_ns)}" if line.host_ns else ""
    kind = "" if executed.recorded else " of those that made calls"
    place = f", line {line.location.line}{what}{time} ({at + 1} of {len(executed)}"
    for kept in range(len(names), 0, -1):
        path = " > ".join([glyphs.more] * (kept < len(names)) + names[-kept:])
        for told in (f"{path}{place}{kind})", f"{path}{place})"):
            if cell_len(escape(told)) <= width:
                return told
    return f"{path}{place})"
