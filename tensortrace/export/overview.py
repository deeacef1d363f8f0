"""A run of any length in a bounded picture: curves and maps over its steps, one pass over the log.

Steps are put into columns of equal width, so what is kept does not grow with the run. Only step
lines are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tensortrace.export.contents import matches, step_lines
from tensortrace.records import Scalar, Step, from_scalar
from tensortrace.run import held_over, nonfinite_letter

if TYPE_CHECKING:
    from tensortrace.run import Run

# At most so many columns; a screen has no more pixels to spare for one, and the page stays small.
CURVE_COLUMNS, MAP_COLUMNS = 400, 200
# Of more modules than this the rest is left out of the maps, and said so.
MOST_MODULES = 4000
STATISTICS = ("grad_rms", "output_rms", "update_ratio", "zero_frac")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Columns:
    """Steps `first` to `last` in `count` columns of `width` steps each."""

    first: int
    last: int
    width: int
    count: int

    @classmethod
    def over(cls, steps: range, most: int) -> Columns:
        """Divide some steps, at least one, into at most so many columns."""
        width = max(1, math.ceil(len(steps) / most))
        return cls(steps[0], steps[-1], width, math.ceil(len(steps) / width))

    def of(self, step: int) -> int:
        """The column of a step."""
        return (step - self.first) // self.width

    def span(self, column: int) -> tuple[int, int]:
        """The first and the last step of a column."""
        start = self.first + column * self.width
        return start, min(start + self.width - 1, self.last)

    def share(self, step: int) -> float:
        """Where the middle of a step lies between the left end, 0, and the right one, 1."""
        return (step - self.first + 0.5) / (self.count * self.width)


@dataclass(slots=True)
class Curve:
    """A number over steps, by column: its smallest, largest and last value, float64 ``(count,)``.

    NaN where a column has no finite value. `broken` counts values that were not finite, the first
    of them in step `first_broken`.
    """

    columns: Columns
    low: Floats = field(init=False)
    high: Floats = field(init=False)
    last: Floats = field(init=False)
    broken: npt.NDArray[np.int64] = field(init=False)
    first_broken: int | None = None

    def __post_init__(self) -> None:
        self.low, self.high, self.last = (np.full(self.columns.count, np.nan) for _ in range(3))
        self.broken = np.zeros(self.columns.count, np.int64)

    def add(self, step: int, value: Scalar | None) -> None:
        """Take the value of one step."""
        number = from_scalar(value)
        if number is None:
            return
        at = self.columns.of(step)
        if math.isfinite(number):
            self.low[at] = np.fmin(self.low[at], number)
            self.high[at] = np.fmax(self.high[at], number)
            self.last[at] = number
        else:
            self.broken[at] += 1
            self.first_broken = step if self.first_broken is None else self.first_broken

    @property
    def empty(self) -> bool:
        """Whether no step had a value."""
        return bool(np.isnan(self.last).all()) and not self.broken.any()


@dataclass(frozen=True, slots=True)
class Maps:
    """Statistics of modules over steps, by column: the largest of the steps in a column.

    Attributes:
        columns: the steps.
        paths: module paths, in order of first call; one row each.
        values: by name of `STATISTICS`, float64 ``(rows, columns)``, NaN where there is none.
        broken: as `values`, bool: an output, or a gradient if it is about those, was not finite.
        left_out: how many modules have no row.
        rested: whether a column has only steps at rest, which show the numbers before them.
    """

    columns: Columns
    paths: list[str]
    values: dict[str, Floats]
    broken: dict[str, npt.NDArray[np.bool_]]
    left_out: int
    rested: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """The whole run at a glance; `closed` counts the step lines that were read."""

    loss: Curve
    grad_norm: Curve
    maps: Maps
    closed: int


def look_over(
    run: Run,
    steps: range,
    modules: Sequence[str] = (),
    tick: Callable[[int], None] = lambda step: None,
) -> Overview:
    """Read the step lines of some steps, at least one, in one pass.

    Args:
        run: the log.
        steps: which of its steps.
        modules: globs over module paths; all by default.
        tick: called with each step that was read.
    """
    curve_columns = Columns.over(steps, CURVE_COLUMNS)
    loss, grad_norm = Curve(curve_columns), Curve(curve_columns)
    rows = _Rows(run, Columns.over(steps, MAP_COLUMNS), modules)
    closed = 0
    for line in step_lines(run, steps):
        if line.step in steps:  # a damaged log may say otherwise
            loss.add(line.step, line.loss)
            grad_norm.add(line.step, line.grad_norm)
            rows.add(line)
            closed += 1
            tick(line.step)
    return Overview(loss, grad_norm, rows.finish(), closed)


class _Rows:
    """Rows that come up as modules do; four thousand of them at most, so 26 MB."""

    def __init__(self, run: Run, columns: Columns, globs: Sequence[str]) -> None:
        self._modules, self._globs = run.modules, globs
        self._columns = columns
        self._row: dict[str, int] = {}  # -1: it has none
        self._shown: list[str] = []
        self._left_out = 0
        self._values = {name: self._blank(64) for name in STATISTICS}
        # By column: whether a step in it rested, and whether one did not.
        self._rested = np.zeros((2, columns.count), np.bool_)
        self._broken = {name: self._unbroken(64) for name in STATISTICS}
        self._paths: list[str] = []
        self._rows: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def _blank(self, rows: int) -> Floats:
        return np.full((rows, self._columns.count), np.nan)

    def _unbroken(self, rows: int) -> npt.NDArray[np.bool_]:
        return np.zeros((rows, self._columns.count), np.bool_)

    def add(self, line: Step) -> None:
        table, at = line.modules, self._columns.of(line.step)
        self._rested[int(not line.rested), at] = True
        if table.path != self._paths:  # as a rule the same modules run in every step
            self._paths = table.path
            self._rows = np.array([self._find(path) for path in table.path], np.int64)
        for name, values in self._values.items():
            # An array may be shorter than `path` in a log that another program wrote.
            found = np.array(getattr(table, name)[: len(self._rows)], np.float64)  # None is NaN
            rows = self._rows[: len(found)]
            found, rows = found[rows >= 0], rows[rows >= 0]
            values[rows, at] = np.fmax(values[rows, at], found)
        for row, flags in zip(self._rows.tolist(), table.flags):  # noqa: B905 - may be shorter
            for name, broken in self._broken.items() if row >= 0 and flags else ():
                broken[row, at] |= bool(nonfinite_letter(flags, name))

    def _find(self, path: str) -> int:
        if path in self._row or len(self._row) >= 8 * MOST_MODULES:
            return self._row.get(path, -1)
        row = -1
        if matches(self._modules, path, self._globs):
            if len(self._shown) < MOST_MODULES:
                row = len(self._shown)
                self._shown.append(path)
                self._make_room()
            else:
                self._left_out += 1
        self._row[path] = row
        return row

    def _make_room(self) -> None:
        have = len(self._values[STATISTICS[0]])
        if len(self._shown) > have:
            for name, values in self._values.items():
                self._values[name] = np.vstack([values, self._blank(have)])
                self._broken[name] = np.vstack([self._broken[name], self._unbroken(have)])

    def finish(self) -> Maps:
        n = len(self._shown)
        rested = self._rested[0] & ~self._rested[1]
        values = {name: held_over(array[:n], rested) for name, array in self._values.items()}
        broken = {name: array[:n] for name, array in self._broken.items()}
        return Maps(self._columns, self._shown, values, broken, self._left_out, bool(rested.any()))
