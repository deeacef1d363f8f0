"""One finding as a terminal shows it: message, place, source line, reason, evidence, chain, fix."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensortrace.export.contents import Shown, shown_path
from tensortrace.records import ChainLink, Location, Module, Severity
from tensortrace.text import escape, location_text, number_text, shape_text, short_dtype

if TYPE_CHECKING:
    from tensortrace.run import Run

STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# Columns of the longest bar, and how much of a list is worth reading.
BAR = 24
LISTED = 8
# A longer profile shows so many of its first and last rows.
ENDS = 20


def labelled(rows: Iterable[tuple[str, RenderableType]], indent: int = 2) -> Table:
    """Lay out (label, text) pairs: labels in a column, texts wrapped beside them."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=8 + indent, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, content in rows:
        grid.add_row(Text(" " * indent + label, "dim"), content)
    return grid


def harmless(text: str, style: str = "") -> Text:
    """Make harmless text of what the log says, line by line."""
    return Text("\n".join(map(escape, text.split("\n"))), style)


def show_finding(one: Shown, *, ranks: bool) -> RenderableType:
    """Lay out a finding; `ranks` says that the run has several, so that theirs is named."""
    finding = one.finding
    title = Text(f"{finding.severity} {escape(finding.code)}", STYLES[finding.severity])
    title.append(f" {escape(finding.check)}: ", "bold").append(escape(finding.message))
    rows: list[tuple[str, RenderableType]] = [("at", harmless(_place(one, ranks)))]
    if finding.location is not None:
        rows.append(("source", _source(one.run, finding.location)))
    # Some checks say why in the message already.
    if finding.explanation and finding.explanation not in finding.message:
        rows.append(("why", harmless(finding.explanation)))
    evidence = _evidence(one)
    if evidence is not None:
        rows.append(("evidence", evidence))
    if finding.chain:
        rows.append(("chain", _chain(one.run, finding.chain)))
    if finding.fix:
        rows.append(("fix", harmless(finding.fix)))
    if one.later:
        plural = "" if one.later == 1 else "s"
        rows.append(("again", Text(f"and {one.later} later step{plural}")))
    return Group(title, labelled(rows))


def _place(one: Shown, ranks: bool) -> str:
    finding = one.finding
    places = [f"step {finding.step}"]
    if ranks:
        plural = "" if len(one.ranks) == 1 else "s"
        places.insert(0, f"rank{plural} {', '.join(map(str, one.ranks))}")
    if finding.phase:
        places.append(finding.phase)
    if finding.module is not None:
        places.append(shown_path(one.run.modules, finding.module))
    places += [f"op {finding.op}"] if finding.op else []
    places += [f"parameter {finding.param}"] if finding.param else []
    return ", ".join(places)


def _source(run: Run, location: Location) -> Text:
    """Show a line of the user's with its two neighbours, from the log."""
    text = Text(f"{place_text(run, location)} in {escape(location.function)}")
    source = run.source(location.file, location.line)
    if source is None:
        lines = [(location.line, location.code.strip())] if location.code else []
    else:
        # Only "\n" ends a line of Python source; str.splitlines knows eight more.
        all_lines = source.text.split("\n")
        at = location.line - source.first_line
        near = range(max(at - 1, 0), min(at + 2, len(all_lines)))
        shown = textwrap.dedent("\n".join(all_lines[i] for i in near)).split("\n")
        lines = [(source.first_line + i, code) for i, code in zip(near, shown, strict=True)]
        while lines and not lines[-1][1].strip():
            lines.pop()
    digits = len(str(location.line + 1))
    for number, code in lines:
        mark, style = (">", "bold") if number == location.line else (" ", "dim")
        text.append(f"\n{mark} {number:>{digits}} | {escape(code)}", style)
    return text


def _evidence(one: Shown) -> RenderableType | None:
    """Show what the check measured: numbers as a list, objects line by line, a profile as bars."""
    evidence = dict(one.finding.evidence)
    lines = [line] if (line := _between(one, evidence)) else []
    plain: list[str] = []
    profiles: list[RenderableType] = []
    for key, value in evidence.items():
        name = escape(key.replace("_", " "))
        if pairs := _pairs(value):
            profiles.append(_profile(one.run.modules, name, pairs))
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            lines += [f"{name}: {_value(item)}" for item in value[:LISTED]]
        elif value not in (None, [], {}):
            plain.append(f"{name}: {_value(value)}")
    if plain:
        lines.insert(0, "; ".join(plain))
    texts = [Text("\n".join(lines))] if lines else []
    return Group(*texts, *profiles) if texts or profiles else None


def _between(one: Shown, evidence: dict[str, Any]) -> str:
    """Take `between`, two module paths, and their lines out of the evidence, as a phrase."""
    ends = evidence.get("between")
    if not (isinstance(ends, (list, tuple)) and len(ends) == 2):
        return ""
    del evidence["between"]
    places = evidence.pop("between_lines", None)
    lines = list(places) if isinstance(places, (list, tuple)) and len(places) == 2 else ["", ""]
    names = [
        default if end is None else escape(shown_path(one.run.modules, str(end)))
        for end, default in zip(ends, ("the start", "the end"), strict=True)
    ]
    told = [f"{name} ({escape(str(at))})" if at else name
            for name, at in zip(names, lines, strict=True)]  # fmt: skip
    return f"between {' and '.join(told)}"


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, Mapping):
        return _listed([_item(str(k), v) for k, v in value.items() if v is not None])
    if isinstance(value, (list, tuple)):
        return _listed([_value(v) for v in value])
    return escape(str(value))


def _item(key: str, value: Any) -> str:
    """Write one key of an object; of a tensor, as everywhere: ``x, [8, 128], f32, max 3.1``."""
    if key == "name":
        return escape(str(value))
    if key == "shape" and isinstance(value, (list, tuple)):
        return shape_text(tuple(value)) if all(isinstance(dim, int) for dim in value) else "[?]"
    return short_dtype(str(value)) if key == "dtype" else f"{escape(key)} {_value(value)}"


def _listed(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return ", ".join(texts[:LISTED]) + more


def _pairs(value: Any) -> list[tuple[str, float | None]]:
    """Read a profile, ``[[name, number], ...]`` in order of depth; empty if it is none."""
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        return []
    pairs: list[tuple[str, float | None]] = []
    for item in value:
        if not (isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str)):
            return []
        number = item[1]
        if isinstance(number, bool) or not isinstance(number, (int, float, type(None))):
            return []
        pairs.append((item[0], number))
    return pairs


def _profile(
    modules: Mapping[str, Module], title: str, pairs: Sequence[tuple[str, float | None]]
) -> RenderableType:
    """Draw numbers over depth; the bars are logarithmic, as depth acts on scale by factors."""
    logs = [math.log10(abs(n)) for _, n in pairs if n]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    left_out = len(pairs) - 2 * ENDS
    for i, (name, number) in enumerate(pairs):
        if left_out > 0 and ENDS <= i < len(pairs) - ENDS:
            if i == ENDS:
                grid.add_row(Text(f"({left_out} more)", "dim"))
            continue
        share = (math.log10(abs(number)) - low) / (high - low) if number and high > low else 1.0
        bar = "#" * (1 + round(share * (BAR - 1))) if number else ""
        grid.add_row(harmless(shown_path(modules, name)), number_text(number), Text(bar, "dim"))
    return Group(Text(f"{title} (bars: log scale)"), grid)


def _chain(run: Run, chain: Sequence[ChainLink]) -> Text:
    """List what led to it, cause first; a source line is shown where it first comes."""
    text = Text()
    before = None
    for i, link in enumerate(chain):
        what = [escape(link.op)] if link.op else []
        what += [f"call #{link.seq}"] if link.seq is not None else []
        code = ""
        if link.location:
            place = link.location.file, link.location.line
            what.append(place_text(run, link.location))
            code = _code(run, link.location) if place != before else ""
            before = place
        text.append(("\n" if i else "") + f"{i + 1}. " + "  ".join(what))
        if code:
            text.append(f"\n   {escape(code)}", "dim")
    return text


def _code(run: Run, location: Location) -> str:
    """The text of a source line, from the location itself or the stored source."""
    if location.code:
        return location.code.strip()
    source = run.source(location.file, location.line)
    lines = source.text.split("\n") if source else []
    at = location.line - source.first_line if source else 0
    return lines[at].strip() if at < len(lines) else ""


def place_text(run: Run, location: Location) -> str:
    """Write a place as `file:line`, the file as seen from the folder where the run began."""
    folder = run.header.cwd.rstrip("/\\")
    text = location_text(location)
    start = escape(folder)
    inside = folder and text.startswith((f"{start}/", f"{start}\\"))
    return text[len(start) + 1 :] if inside else text
