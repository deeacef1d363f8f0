"""The heat maps of the page: modules by steps, where vanishing, exploding and death are a picture.

A map is one path for each colour, made of horizontal runs, so that 120 rows of 200 columns take
some 100 KB at most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensortrace.export.contents import Shown, shown_path, tree_labels
from tensortrace.export.html_curves import step_axis, ten_to
from tensortrace.export.html_style import SCALE
from tensortrace.export.markup import Html, draw, joined, tag
from tensortrace.export.overview import Columns, Floats, Maps
from tensortrace.records import Module
from tensortrace.text import escape, number_text

# More modules than this share rows with their neighbours.
MOST_ROWS = 120
LEVELS = len(SCALE)
# Characters that fit beside a map on a phone.
LONGEST_LABEL = 14
# A title that lists what a row holds stays short.
MOST_NAMED = 12
# So many findings are marked on a map.
MOST_SPOTS = 60
# Of a module: how it is called here, and what it is.
TITLES: Mapping[str, tuple[str, str]] = {
    "grad_rms": ("gradient rms", "root mean square of the gradient of the module's outputs"),
    "output_rms": ("output rms", "root mean square of the module's outputs"),
    "update_ratio": ("update ratio", "change of a parameter over its size, the largest"),
    "zero_frac": ("zero fraction", "how many of the outputs are 0; 1 is all"),
}


@dataclass(frozen=True, slots=True)
class _Map:
    """One statistic as it is drawn: values and broken cells ``(rows, columns)``, labels."""

    name: str
    columns: Columns
    values: Floats
    broken: npt.NDArray[np.bool_]
    labels: list[tuple[str, str]]
    places: list[list[str]]


def show_maps(maps: Maps, modules: Mapping[str, Module], shown: Sequence[Shown]) -> Html:
    """Draw every statistic that any module has; the first one is open."""
    drawn: list[Html] = []
    for name in TITLES:
        one = _grouped(name, maps, modules)
        if one is not None:
            drawn.append(_show(one, shown, first=not drawn))
    if not drawn:
        return tag("p", "No step line of these steps has a number about a module.", class_="dim")
    notes = [tag("p", f"{maps.left_out} more modules have no row here.", class_="dim")
             ] if maps.left_out else []  # fmt: skip
    if maps.rested:
        told = "Steps at rest look at outermost modules only: others show the numbers before them."
        notes.append(tag("p", told, class_="dim"))
    return joined([*drawn, *notes])


def _grouped(name: str, maps: Maps, modules: Mapping[str, Module]) -> _Map | None:
    """Choose the rows of a statistic; neighbours share one where there are too many."""
    values = maps.values[name]
    rows = np.flatnonzero(~np.isnan(values).all(axis=1))
    if not len(rows):
        return None
    paths = [maps.paths[i] for i in rows.tolist()]
    size = math.ceil(len(rows) / MOST_ROWS)
    starts = np.arange(0, len(rows), size)
    grouped = np.stack([_median(values[rows[i : i + size]]) for i in starts.tolist()])
    broken = np.logical_or.reduceat(maps.broken[name][rows], starts, axis=0)
    places = [paths[i : i + size] for i in starts.tolist()]
    tree = tree_labels(modules, [members[0] for members in places])
    labels = []
    for (depth, label), members in zip(tree, places, strict=True):
        names = [escape(shown_path(modules, path)) for path in members[:MOST_NAMED]]
        more = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
        text = _tail(label) + (f" … ({len(members)})" if len(members) > 1 else "")
        labels.append(("  " * min(depth, 6) + text, ", ".join(names) + more))
    return _Map(name, maps.columns, grouped, broken, labels, places)


def _tail(label: str) -> str:
    """Cut a long path in front, where it says least; as many parts of its end stay as fit."""
    if len(label) <= LONGEST_LABEL:
        return label
    cut = label[-LONGEST_LABEL:]
    return "…" + (cut.partition(".")[2] or cut)


def _median(values: Floats) -> Floats:
    """The lower median of each column, of what is not NaN; NaN where all is."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    middle = np.maximum((~np.isnan(ordered)).sum(axis=0) - 1, 0) // 2
    found: Floats = np.take_along_axis(ordered, middle[None], axis=0)[0]
    return found


def _show(one: _Map, shown: Sequence[Shown], *, first: bool) -> Html:
    title, meaning = TITLES[one.name]
    said = [meaning]
    if one.columns.width > 1:
        said.append(f"each column {one.columns.width} steps, the largest of them")
    if len(one.places[0]) > 1:
        said.append(f"each row {len(one.places[0])} modules, their median")
    scale = _Scale(one.name, one.values)
    rows = [_row_title(one, i) for i in range(len(one.places))]
    overlay = [tag("rect", tag("title", text), y=i, width=one.columns.count, height=1)
               for i, text in enumerate(rows)]  # fmt: skip
    count = len(one.places)
    drawing = tag(
        "svg", tag("g", _cells(one, scale), transform="translate(0 .5)"),
        tag("g", overlay, class_="over"), _spots(one, shown),
        viewBox=f"0 0 {one.columns.count} {count}", preserveAspectRatio="none",
        role="img", aria_label=f"{title} by module and step",
    )  # fmt: skip
    labels = [
        tag("span", label, title=text, class_="broken" if one.broken[i].any() else None)
        for i, ((label, _), text) in enumerate(zip(one.labels, rows, strict=True))
    ]
    size = f"--rows:{count};--row:{20 if count <= 16 else 15 if count <= 60 else 12}px"
    return tag(
        "details", tag("summary", title, " ", tag("small", "; ".join(said))),
        scale.legend(one), tag("div", tag("div", labels, class_="labels"), drawing, class_="axes",
                               style=size),
        step_axis(one.columns), class_="map", open=first,
    )  # fmt: skip


class _Scale:
    """Which colour a value has: by its logarithm, or a fraction by itself."""

    def __init__(self, name: str, values: Floats) -> None:
        self.log = name != "zero_frac"
        self.low, self.high = 0.0, 1.0
        positive = values[np.isfinite(values) & (values > 0)]
        self.empty = not len(positive) if self.log else not np.isfinite(values).any()
        if self.log and len(positive):
            self.low, self.high = (math.log10(float(f(positive))) for f in (np.min, np.max))
            if self.high - self.low < 1:  # small differences are no picture
                middle = (self.low + self.high) / 2
                self.low, self.high = middle - 0.5, middle + 0.5
        self.has_zero = self.log and bool((values <= 0).any())

    def level(self, values: Floats) -> npt.NDArray[np.int64]:
        """Colour of each value, int64: -1 none, 0 to `LEVELS` - 1, `LEVELS` for zero."""
        there = np.isfinite(values)
        zero = there & (values <= 0) if self.log else np.zeros_like(there)
        safe = np.where(there & ~zero, values, 1.0)
        mapped = np.log10(safe) if self.log else safe
        share = (mapped - self.low) / (self.high - self.low)
        levels = np.minimum((np.clip(share, 0, 1) * LEVELS).astype(np.int64), LEVELS - 1)
        return np.where(zero, LEVELS, np.where(there, levels, -1))

    def legend(self, one: _Map) -> Html:
        """Name the colours."""
        low, middle, high = (
            number_text(ten_to(at) if self.log else at)
            for at in (self.low, (self.low + self.high) / 2, self.high)
        )
        swatches = [tag("i", style=f"background:{colour}") for colour in SCALE]
        half = LEVELS // 2
        keys = (
            []
            if self.empty
            else [
                tag("span", low, " ", swatches[:half], " ", middle, " ", swatches[half:], " ", high)
            ]
        )
        missing = bool(np.isnan(one.values).any())
        marks = (("zero", "0", self.has_zero), ("bad", "not finite", bool(one.broken.any())),
                 ("blank", "not seen", missing))  # fmt: skip
        keys += [tag("span", tag("i", class_=f"key {name}"), word)
                 for name, word, there in marks if there]  # fmt: skip
        keys.append(tag("span", "log scale" if self.log else "linear scale"))
        return tag("div", keys, class_="legend")


def _cells(one: _Map, scale: _Scale) -> list[Html]:
    """Draw the cells, one path for each colour; what is not finite also has a white line in it."""
    levels = np.where(one.broken, LEVELS + 1, scale.level(one.values))
    runs: dict[int, list[str]] = {}
    for row, line in enumerate(levels):
        cuts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        for start, stop in itertools.pairwise(cuts):
            runs.setdefault(int(line[start]), []).append(f"M{start} {row}h{stop - start}")
    drawn = []
    for level in sorted(level for level in runs if level >= 0):
        d = "".join(runs[level])
        if level < LEVELS:
            drawn.append(draw(d, stroke=SCALE[level]))
        elif level == LEVELS:
            drawn.append(draw(d, class_="zero"))
        else:
            drawn += [draw(d, class_=name) for name in ("bad", "thin")]
    return drawn


def _spots(one: _Map, shown: Sequence[Shown]) -> list[Html]:
    """Put a dot where a finding is."""
    row_of = {path: i for i, members in enumerate(one.places) for path in members}
    spots: list[Html] = []
    for number, each in enumerate(shown, 1):
        finding = each.finding
        row = None if finding.module is None else row_of.get(finding.module)
        here = one.columns.first <= finding.step <= one.columns.last
        if row is None or not here or finding.severity == "note" or len(spots) >= MOST_SPOTS:
            continue
        x = one.columns.of(finding.step) + 0.5
        title = tag("title", f"finding {number}, step {finding.step}: {finding.code}")
        d = f"M{x} {row + 0.5}h0"
        spots.append(tag("g", title, draw(d, class_="spot"),
                         draw(d, class_="spot in")))  # fmt: skip
    return spots


def _row_title(one: _Map, row: int) -> str:
    """Tell of a row what the eye cannot read from colours."""
    values, names = one.values[row], one.labels[row][1]
    there = np.flatnonzero(np.isfinite(values))
    said: list[str] = []
    if len(there):
        first, last = one.columns.span(int(there[0]))[0], one.columns.span(int(there[-1]))[1]
        low, high = number_text(float(values[there].min())), number_text(float(values[there].max()))
        span = low if low == high else f"{low} to {high}"
        said.append(
            f"{span} in steps {first} to {last}" if first != last else f"{span} in step {first}"
        )
    if one.broken[row].any():
        at = one.columns.span(int(np.flatnonzero(one.broken[row])[0]))
        said.append(f"not finite from step {at[0]}" if at[0] == at[1] else
                    f"not finite from steps {at[0]} to {at[1]} on")  # fmt: skip
    return f"{names}: {', '.join(said)}"
