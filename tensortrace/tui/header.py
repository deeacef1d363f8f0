"""The first line of the screen: run, rank, step, loss, findings, and how the run stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from rich.cells import cell_len
from rich.segment import Segment
from textual.strip import Strip

from tensortrace.records import Severity
from tensortrace.run import Run
from tensortrace.text import SEVERITY_SIGN, escape
from tensortrace.tui.terminal.looks import look_of
from tensortrace.tui.terminal.strips import Drawn, filled
from tensortrace.tui.terminal.styled import Styled, clip


class Headline(Drawn):
    """One line, drawn from pieces."""

    def __init__(self) -> None:
        super().__init__(id="headline")
        self._line: Styled = []

    def show(self, line: Styled) -> None:
        """Draw another line."""
        if line != self._line:
            self._line = line
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the line."""
        base, styles = self.rich_style, look_of(self.app.theme).styles
        pieces = [Segment(text, base + styles[style]) for text, style in self._line]
        return filled(pieces, self.size.width, base)


def program_of(run: Run) -> str:
    """Name the run: the script that ran, else the file."""
    script = run.header.argv[0] if run.header.argv else ""
    return escape(PurePath(script).name or run.path.name)


def state_of(run: Run, *, following: bool) -> tuple[str, str]:
    """Say how the run stands, in words and the style to show them in."""
    if run.end is not None:
        lost = "" if run.lost_from is None else f", step lines end at {run.lost_from - 1}"
        if run.end.why == "exit":
            return f"ended{lost}", "bar-faint"
        failure = run.end.failure
        what = escape(failure.type) if failure is not None else run.end.why
        return f"ended: {what[:30]}{lost}", "bar-error"
    if run.live:
        return "LIVE, following" if following else "LIVE", "bar-live"
    lost = f", {run.lost_bytes} bytes lost" if run.lost_bytes else ", no end"
    return f"{'killed' if run.killed else 'cut'}{lost}", "bar-error"


def headline(
    *,
    program: str,
    rank: tuple[int, int],
    step: tuple[int, int],
    loss: str,
    findings: Mapping[Severity, int],
    state: tuple[str, str],
    width: int,
    elsewhere: int = 0,
) -> Styled:
    """Write the first line of the screen: run, rank, step, loss, findings, how the run stands.

    Args:
        findings: those of the rank that is shown.
        elsewhere: how many findings other ranks have.
        state: the words ("LIVE", "ended", "cut") and the style they are shown in.
    """
    for short in (False, True):
        pieces = _pieces(
            program, rank, step, loss, findings=findings, elsewhere=elsewhere, short=short
        )
        room = width - sum(cell_len(text) for text, _ in pieces) - len(state[0]) - 3
        if room < 0:
            # The name of the program gives way first, down to nothing.
            named = clip(program, max(0, cell_len(program) + room))
            room += cell_len(program) - cell_len(named)
            pieces[0] = (f" {named}", "bar-strong")
        if room >= 0:
            break
    return [*pieces, (" " * max(0, room), "bar"), (f" {state[0]} ", state[1]), (" ", "bar")]


def _pieces(
    program: str,
    rank: tuple[int, int],
    step: tuple[int, int],
    loss: str,
    *,
    findings: Mapping[Severity, int],
    elsewhere: int,
    short: bool,
) -> Styled:
    pieces: Styled = [(f" {program}", "bar-strong")]
    if rank[1] > 1:
        pieces.append((f"  r{rank[0]}" if short else f"  rank {rank[0]}/{rank[1]}", "bar"))
    told = "no findings"
    if short:
        told = " ".join(f"{count}{SEVERITY_SIGN[name]}" for name, count in findings.items())
    elif findings:
        told = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in findings.items())
    if elsewhere:
        told += f" +{elsewhere}" if short else f", {elsewhere} on other ranks"
    return [
        *pieces,
        (" " if short else "  step ", "bar-faint"),
        (f"{step[0]}/{step[1]}", "bar"),
        (" " if short else "  loss ", "bar-faint"),
        (loss, "bar-error" if loss in ("NaN", "inf", "-inf") else "bar"),
        (" " if short else "  ", "bar"),
        (told, "bar-error" if findings.get("error") else "bar"),
    ]
