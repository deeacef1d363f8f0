"""What is told about a finding, as words and numbers, before it is laid out for a screen or a page.

Every text here is one line or more of the log's own, made harmless by `escape`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensortrace.export.contents import Shown, shown_path
from tensortrace.records import ChainLink, Location, Module
from tensortrace.text import escape, location_text, number_text, shape_text, short_dtype, step_text

if TYPE_CHECKING:
    from tensortrace.run import Run

# How much of a list is worth reading.
MOST_ITEMS = 8
# A longer profile shows so many of its first and last rows.
ENDS = 20


@dataclass(frozen=True, slots=True)
class Profile:
    """Numbers over depth: rows of (name, number, length of the bar from 0 to 1 or None).

    The lengths are logarithmic, as depth acts on scale by factors. `left_out` rows are missing
    after row `ENDS`.
    """

    title: str
    rows: list[tuple[str, str, float | None]]
    left_out: int


def harmless_lines(text: str) -> str:
    """Make harmless text of what the log says, line by line."""
    return "\n".join(map(escape, text.split("\n")))


def place(one: Shown, *, ranks: bool) -> str:
    """Say where it was found; `ranks` says that the run has several, so that theirs is named."""
    finding = one.finding
    places = [step_text(finding)]
    if ranks:
        plural = "" if len(one.ranks) == 1 else "s"
        places.insert(0, f"rank{plural} {', '.join(map(str, one.ranks))}")
    if finding.phase:
        places.append(finding.phase)
    if finding.module is not None:
        places.append(shown_path(one.run.modules, finding.module))
    places += [f"op {finding.op}"] if finding.op else []
    places += [f"parameter {finding.param}"] if finding.param else []
    return harmless_lines(", ".join(places))


def explanation(one: Shown) -> str:
    """Say why, unless the message says it already, as some checks do."""
    finding = one.finding
    repeated = finding.explanation in finding.message
    return "" if repeated else harmless_lines(finding.explanation)


def again(one: Shown) -> str:
    """Count the later steps in which the cause was seen again; empty if there are none."""
    return f"and {one.later} later step{'' if one.later == 1 else 's'}" if one.later else ""


def place_text(run: Run, location: Location) -> str:
    """Write a place as `file:line`, the file as seen from the folder where the run began."""
    folder = run.header.cwd.rstrip("/\\")
    text = location_text(location)
    start = escape(folder)
    inside = folder and text.startswith((f"{start}/", f"{start}\\"))
    return text[len(start) + 1 :] if inside else text


def source_lines(run: Run, location: Location) -> list[tuple[int, str]]:
    """Take a line of the user's with its two neighbours from the log, as (number, code)."""
    source = run.source(location.file, location.line)
    if source is None:
        return [(location.line, escape(location.code.strip()))] if location.code else []
    all_lines = source.lines
    at = location.line - source.first_line
    near = range(max(at - 1, 0), min(at + 2, len(all_lines)))
    shown = textwrap.dedent("\n".join(all_lines[i] for i in near)).split("\n")
    lines = [(source.first_line + i, escape(code)) for i, code in zip(near, shown, strict=True)]
    while lines and not lines[-1][1].strip():
        lines.pop()
    return lines


def evidence(one: Shown) -> tuple[list[str], list[Profile]]:
    """Tell what the check measured: numbers and objects line by line, and profiles."""
    measured = dict(one.finding.evidence)
    lines = [line] if (line := _between(one, measured)) else []
    plain: list[str] = []
    profiles: list[Profile] = []
    for key, value in measured.items():
        name = escape(key.replace("_", " "))
        if pairs := _pairs(value):
            profiles.append(_profile(one.run.modules, name, pairs))
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            lines += [f"{name}: {_value(item)}" for item in value[:MOST_ITEMS]]
        elif value not in (None, [], {}):
            plain.append(f"{name}: {_value(value)}")
    if plain:
        lines.insert(0, "; ".join(plain))
    return lines, profiles


def _between(one: Shown, measured: dict[str, Any]) -> str:
    """Take `between`, two module paths, and their lines out of the evidence, as a phrase."""
    ends = measured.get("between")
    if not (isinstance(ends, (list, tuple)) and len(ends) == 2):
        return ""
    del measured["between"]
    places = measured.pop("between_lines", None)
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
    more = f", and {len(texts) - MOST_ITEMS} more" if len(texts) > MOST_ITEMS else ""
    return ", ".join(texts[:MOST_ITEMS]) + more


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
) -> Profile:
    logs = [math.log10(abs(n)) for _, n in pairs if n]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    left_out = max(len(pairs) - 2 * ENDS, 0)
    kept = [*pairs[:ENDS], *pairs[len(pairs) - ENDS :]] if left_out else pairs
    rows: list[tuple[str, str, float | None]] = []
    for name, number in kept:
        share = (math.log10(abs(number)) - low) / (high - low) if number and high > low else 1.0
        shown = harmless_lines(shown_path(modules, name))
        rows.append((shown, number_text(number), share if number else None))
    return Profile(title, rows, left_out)


def chain_links(run: Run, chain: Sequence[ChainLink]) -> list[tuple[str, str]]:
    """List what led to it as (words, code), cause first; code is told where it first comes."""
    links: list[tuple[str, str]] = []
    before = None
    for link in chain:
        what = [escape(link.op)] if link.op else []
        what += [f"call #{link.seq}"] if link.seq is not None else []
        code = ""
        if link.location:
            at = link.location.file, link.location.line
            what.append(place_text(run, link.location))
            code = _code(run, link.location) if at != before else ""
            before = at
        links.append(("  ".join(what), escape(code)))
    return links


def _code(run: Run, location: Location) -> str:
    """The text of a source line, from the location itself or the stored source."""
    if location.code:
        return location.code.strip()
    source = run.source(location.file, location.line)
    return (source.line(location.line) or "").strip() if source else ""
