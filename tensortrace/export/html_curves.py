"""The timeline of the page: loss and gradient norm over steps, findings as marks above them.

The drawing is stretched to the width that there is, so that words around it stay readable on a
phone; lines keep their width (`vector-effect`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tensortrace.export.contents import Shown
from tensortrace.export.markup import Html, draw, joined, tag
from tensortrace.export.overview import Columns, Curve, Overview
from tensortrace.text import number_text

HEIGHT = 150
# A curve that spans so many times its smallest value is drawn on a log scale.
WIDE = 20.0
# Room above and below a curve, as a share of its height; in it are the marks of what is no number.
MARGIN = 0.08
# With fewer values than this each has a dot.
DOTTED = 40
# Of more findings than this the rest is in the list only. Two marks that are nearer to each other
# than `NEAR` of the width, about a mark on a phone, go into different lanes.
MOST_MARKS, NEAR, LANES = 40, 0.09, 5


def show_timeline(overview: Overview, shown: Sequence[Shown]) -> Html:
    """Draw both curves over the same steps; `shown` are findings, in the order of their list."""
    columns = overview.loss.columns
    told = [(i + 1, one) for i, one in enumerate(shown) if _is_told(one, columns)]
    named = (("loss", overview.loss), ("gradient norm", overview.grad_norm))
    hover = _hover(named, columns)
    panels = [_panel(name, curve, told, hover) for name, curve in named]
    return joined([_marks(told, columns), panels, step_axis(columns)])


def step_axis(columns: Columns) -> Html:
    """Name the first step, the last one and some round ones between them."""
    span = columns.last - columns.first
    unit = max(1, int(_nice(span / 4)))
    between = range(math.ceil(columns.first / unit) * unit, columns.last, unit)
    inner = [n for n in between if 0.12 < columns.share(n) < 0.88]
    middle = [tag("span", f"{n}", style=f"left:{100 * columns.share(n):.2f}%") for n in inner]
    ends = [tag("span", f"step {columns.first}"), tag("span", str(columns.last) if span else "")]
    return tag("div", tag("div"), tag("div", ends[0], middle, ends[1], class_="steps"),
               class_="axes")  # fmt: skip


def _is_told(one: Shown, columns: Columns) -> bool:
    return (
        one.finding.severity != "note" and columns.first <= one.finding.step <= columns.last
    )  # fmt: skip


def _marks(told: Sequence[tuple[int, Shown]], columns: Columns) -> Html | None:
    """Lay out the numbers of the findings above the curves, side by side where they are near."""
    if not told:
        return None
    kept = sorted(told[:MOST_MARKS], key=lambda pair: pair[1].finding.step)
    lanes = [-1.0] * LANES
    marks: list[Html] = []
    used = 0
    for number, one in kept:
        at = columns.share(one.finding.step)
        lane = next((i for i, end in enumerate(lanes) if at - end >= NEAR), None)
        if lane is None:
            continue  # five findings at one place: the list below has them all
        lanes[lane], used = at, max(used, lane + 1)
        title = f"step {one.finding.step}: {one.finding.code} {one.finding.message}"
        place = f"left:{100 * min(max(at, 0.015), 0.985):.2f}%;top:{1.35 * lane:.2f}rem"
        marks.append(tag("a", str(number), class_=one.finding.severity, style=place,
                         href=f"#finding-{number}", title=title))  # fmt: skip
    left = f"findings{f' (of {len(told)})' if len(marks) < len(told) else ''}"
    height = f"height:{1.35 * used:.2f}rem"
    return tag("div", tag("div", left, class_="dim"),
               tag("div", marks, class_="marks", style=height), class_="axes")  # fmt: skip


def _panel(name: str, curve: Curve, told: Sequence[tuple[int, Shown]], hover: Html) -> Html:
    if curve.empty:
        return tag("figure", tag("figcaption", name, " ", tag("small", "not seen in these steps")))
    scale = _Scale(curve)
    said = ["log scale"] if scale.log else []
    if curve.columns.width > 1:
        said.append(f"each column {curve.columns.width} steps: smallest, largest and last value")
    if curve.first_broken is not None:
        count = int(curve.broken.sum())
        steps = f"{count} step{'' if count == 1 else 's'}"
        said.append(f"○ not finite in {steps}, first in step {curve.first_broken}")
    caption = tag("figcaption", name, " ", tag("small", "; ".join(said)))
    spans = [tag("span", label, style=f"top:{100 * scale.y(at) / HEIGHT:.1f}%")
             for at, label in scale.ticks()]  # fmt: skip
    drawing = tag(
        "svg", _grid(scale, curve.columns.count), _lines(told, curve.columns), _draw(curve, scale),
        hover, viewBox=f"0 0 {curve.columns.count} {HEIGHT}", preserveAspectRatio="none",
        role="img", aria_label=f"{name} over steps",
    )  # fmt: skip
    axes = tag("div", tag("div", spans, class_="ticks"), drawing, class_="axes")
    return tag("figure", caption, axes, class_="curve")


class _Scale:
    """Where a value lies, 0 at the top; logarithmic where the values span a wide range above 0."""

    def __init__(self, curve: Curve) -> None:
        seen = np.concatenate([curve.low, curve.high])
        seen = seen[np.isfinite(seen)]
        self.empty = not len(seen)
        low, high = (0.0, 1.0) if self.empty else (float(seen.min()), float(seen.max()))
        self.log = low > 0 and high / low >= WIDE
        # The difference of two large values may overflow, that of their shares may not.
        self._unit = 1.0 if self.log else min(max(abs(low), abs(high), 1e-300), 1e307)
        self.low, self.high = self._map(low), self._map(high)
        if self.high - self.low < 1e-9:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value / self._unit

    def y(self, value: float) -> float:
        """The height at which a value is drawn."""
        share = (self._map(value) - self.low) / (self.high - self.low)
        return HEIGHT * (1 - MARGIN - (1 - 2 * MARGIN) * share)

    def ticks(self) -> list[tuple[float, str]]:
        """Some round values within the range, with what to write there."""
        if self.empty:
            return []
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            stride = max(1, math.ceil((last - first + 1) / 4))
            powers = range(first, last + 1, stride)
            if len(powers) > 1:
                return [(10.0**n, _power_text(n)) for n in powers]
            values = [ten_to(self.low), ten_to(self.high)]
        else:
            values = self._round_values()
        labels = [number_text(value) for value in values]
        if len(set(labels)) < len(labels):  # a small change of a large number
            labels = [f"{value:.7g}" for value in values]
        return list(zip(values, labels, strict=True))

    def _round_values(self) -> list[float]:
        """Two to five values of few digits, evenly spaced."""
        found: list[float] = []
        for parts in (3, 5, 8):
            unit = _nice((self.high - self.low) / parts * self._unit)
            first = math.ceil(self.low * self._unit / unit - 1e-6)
            last = math.floor(self.high * self._unit / unit + 1e-6)
            found = [n * unit for n in range(first, last + 1)]
            if len(found) > 1:
                break
        return found


def ten_to(exponent: float) -> float:
    """A power of ten, the largest that a float holds at most."""
    return float(10 ** min(exponent, 308.25))


def _power_text(n: int) -> str:
    return f"1e{n}" if n < -2 or n > 3 else number_text(10.0**n)


def _nice(x: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(x)) if x > 0 else 1.0
    return next(power * n for n in (1, 2, 5, 10) if power * n >= x * 0.999)


def _grid(scale: _Scale, count: int) -> Html:
    lines = "".join(f"M0 {scale.y(value):.1f}H{count}" for value, _ in scale.ticks())
    return draw(lines, class_="grid")


def _lines(told: Sequence[tuple[int, Shown]], columns: Columns) -> list[Html]:
    lines = []
    for severity in ("error", "warning"):
        steps = {one.finding.step for _, one in told if one.finding.severity == severity}
        if steps:
            d = "".join(
                f"M{columns.share(s) * columns.count:.2f} 0V{HEIGHT}" for s in sorted(steps)
            )
            lines.append(draw(d, class_=f"at {severity}"))
    return lines


def _draw(curve: Curve, scale: _Scale) -> list[Html]:
    there = np.flatnonzero(~np.isnan(curve.last)).tolist()
    drawn = []
    if curve.columns.width > 1 and there:
        top = [f"{i + 0.5} {scale.y(float(curve.high[i])):.1f}" for i in there]
        bottom = [f"{i + 0.5} {scale.y(float(curve.low[i])):.1f}" for i in reversed(there)]
        drawn.append(draw("M" + "L".join(top + bottom) + "Z", class_="band"))
    points = [(i, f"{i + 0.5} {scale.y(float(curve.last[i])):.1f}") for i in there]
    line, before = "", None
    for i, point in points:
        # A value that is not finite interrupts the line; a step without one does not.
        gap = before is None or bool(curve.broken[before + 1 : i].any())
        line += ("M" if gap else "L") + point
        before = i
    drawn.append(draw(line, class_="line"))
    if len(points) <= DOTTED:
        drawn.append(draw("".join(f"M{point}h0" for _, point in points), class_="dots"))
    bad = "".join(f"M{i + 0.5} 7h0" for i in np.flatnonzero(curve.broken).tolist())
    rings = [draw(bad, class_=name) for name in ("bad", "hole")] if bad else []
    return [*drawn, *rings]


def _hover(named: Sequence[tuple[str, Curve]], columns: Columns) -> Html:
    """Say under the mouse what a column holds."""
    bars = []
    for i in range(columns.count):
        first, last = columns.span(i)
        said = [f"step {first}" if first == last else f"steps {first} to {last}"]
        said += [f"{name} {word}" for name, curve in named if (word := _value(curve, i))]
        bars.append(tag("rect", tag("title", ", ".join(said)), x=i, width=1, height=HEIGHT))
    return tag("g", bars, class_="over")


def _value(curve: Curve, i: int) -> str:
    parts: list[str] = []
    if not math.isnan(curve.last[i]):
        low, high = number_text(float(curve.low[i])), number_text(float(curve.high[i]))
        parts.append(low if low == high else f"{low} to {high}")
    if curve.broken[i]:
        parts.append("not finite" if curve.columns.width == 1 else f"{curve.broken[i]} not finite")
    return ", ".join(parts)
