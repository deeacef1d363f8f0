"""One finding as a terminal shows it: message, place, source line, reason, evidence, chain, fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensortrace.export import finding_words as words
from tensortrace.export.contents import Shown
from tensortrace.records import ChainLink, Location, Severity
from tensortrace.text import escape

if TYPE_CHECKING:
    from tensortrace.run import Run

STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# Columns of the longest bar.
BAR = 24


def labelled(rows: Iterable[tuple[str, RenderableType]], indent: int = 2) -> Table:
    """Lay out (label, text) pairs: labels in a column, texts wrapped beside them."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=8 + indent, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, content in rows:
        grid.add_row(Text(" " * indent + label, "dim"), content)
    return grid


def harmless(text: str) -> Text:
    """Make harmless text of what the log says, line by line."""
    return Text(words.harmless_lines(text))


def show_finding(one: Shown, *, ranks: bool) -> RenderableType:
    """Lay out a finding; `ranks` says that the run has several, so that theirs is named."""
    finding = one.finding
    title = Text(f"{finding.severity} {escape(finding.code)}", STYLES[finding.severity])
    title.append(f" {escape(finding.check)}: ", "bold").append(escape(finding.message))
    rows: list[tuple[str, RenderableType]] = [("at", Text(words.place(one, ranks=ranks)))]
    if finding.location is not None:
        rows.append(("source", _source(one.run, finding.location)))
        if finding.location.caller is not None:
            rows.append(("called at", _source(one.run, finding.location.caller)))
    if why := words.explanation(one):
        rows.append(("why", Text(why)))
    if evidence := _evidence(one):
        rows.append(("evidence", evidence))
    if finding.chain:
        rows.append(("chain", _chain(one.run, finding.chain)))
    if finding.fix:
        rows.append(("fix", harmless(finding.fix)))
    if again := words.again(one):
        rows.append(("again", Text(again)))
    return Group(title, labelled(rows))


def _source(run: Run, location: Location) -> Text:
    text = Text(f"{words.place_text(run, location)} in {escape(location.function)}")
    digits = len(str(location.line + 1))
    for number, code in words.source_lines(run, location):
        mark, style = (">", "bold") if number == location.line else (" ", "dim")
        text.append(f"\n{mark} {number:>{digits}} | {code}", style)
    return text


def _evidence(one: Shown) -> RenderableType | None:
    lines, profiles = words.evidence(one)
    texts = [Text("\n".join(lines))] if lines else []
    return Group(*texts, *map(_profile, profiles)) if texts or profiles else None


def _profile(profile: words.Profile) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    for i, (name, number, share) in enumerate(profile.rows):
        if profile.left_out and i == words.ENDS:
            grid.add_row(Text(f"({profile.left_out} more)", "dim"))
        bar = "" if share is None else "#" * (1 + round(share * (BAR - 1)))
        grid.add_row(Text(name), number, Text(bar, "dim"))
    return Group(Text(f"{profile.title} (bars: log scale)"), grid)


def _chain(run: Run, chain: Sequence[ChainLink]) -> Text:
    text = Text()
    for i, (what, code) in enumerate(words.chain_links(run, chain)):
        text.append(("\n" if i else "") + f"{i + 1}. {what}")
        if code:
            text.append(f"\n   {code}", "dim")
    return text
