"""What the step lines say of every module, gathered into columns of steps: the heat map's numbers.

Memory is that of the picture, not of the run: for each module and column the largest value of a
quantity, the flags, and a step that shows what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tensortrace.records import Step
from tensortrace.run import Run, held_over, nonfinite_letter
from tensortrace.tui.span import Span

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

# The columns of `ModuleColumns` that are drawn, as people call them.
QUANTITIES = {
    "grad_rms": "gradient rms",
    "output_rms": "output rms",
    "update_ratio": "update ratio",
    "zero_frac": "zero fraction",
    "param_grad_rms": "parameter gradient rms",
}
# Bits of `Grid.flags`, by the letters of `ModuleColumns.flags`.
FLAGS = {"n": 1, "i": 2, "f": 4, "o": 8, "g": 16}
LETTERS = [(bit, letter) for letter, bit in FLAGS.items()]
MOST_MODULES = 5000
ROWS_AT_ONCE = 64


@cache
def bits_of(letters: str) -> int:
    """The flags of a module as bits."""
    return sum(FLAGS.get(letter, 0) for letter in set(letters))


@cache
def letters_of(bits: int) -> str:
    """The letters of some bits."""
    return "".join(letter for bit, letter in LETTERS if bits & bit)


class Grid:
    """Modules by columns of steps.

    Attributes:
        paths: of the modules, in the order in which they were read.
        values: by quantity, float64 ``(modules, columns)``; NaN where nothing was seen.
        flags: uint8 ``(modules, columns)``, bits of `FLAGS`.
        at: int64 ``(modules, columns)``: the first step with a flag there whose calls were kept,
            else -1.
        full: int64 ``(columns,)``: the first step of the column whose calls were kept, else -1.
        rested: bool ``(columns,)``: whether every step of the column that was read was at rest.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self.paths: list[str] = []
        self._rows: dict[str, int] = {}
        self._last: tuple[list[str], list[int]] = ([], [])
        self.values: dict[str, Floats] = {name: self._floats(0) for name in QUANTITIES}
        self.flags = np.zeros((0, span.columns), np.uint8)
        self.at = np.full((0, span.columns), -1, np.int64)
        self.full = np.full(span.columns, -1, np.int64)
        self.rested = np.zeros(span.columns, np.bool_)
        self._looked = np.zeros(span.columns, np.bool_)

    def _floats(self, rows: int) -> Floats:
        return np.full((rows, self.span.columns), np.nan, np.float64)

    def add(self, steps: list[Step]) -> None:
        """Take in step lines; one that came before changes nothing, so any order will do."""
        for step in steps:
            column = self.span.column(step.step)
            if 0 <= column < self.span.columns:
                self._add(step, column)

    def _add(self, step: Step, column: int) -> None:
        if step.full and not 0 <= self.full[column] <= step.step:
            self.full[column] = step.step
        self._looked[column] |= not step.rested
        self.rested[column] = not self._looked[column]
        held = step.modules
        rows = self._rows_of(held.path)
        for name, values in self.values.items():
            given = getattr(held, name)
            # A log that somebody wrote may have arrays of other lengths.
            if given and len(given) == len(rows):
                new = np.array(given, np.float64)
                values[rows, column] = np.fmax(values[rows, column], new)
        if any(held.flags):
            for row, letters in zip(rows, held.flags, strict=False):
                if letters:
                    self.flags[row, column] |= bits_of(letters)
                    if step.full and not 0 <= self.at[row, column] <= step.step:
                        self.at[row, column] = step.step

    def _rows_of(self, paths: list[str]) -> list[int]:
        """The rows of some modules; new ones get theirs."""
        known, rows = self._last
        if paths == known:
            return rows
        room = MOST_MODULES - len(self.paths)
        new = [path for path in dict.fromkeys(paths) if path not in self._rows][:room]
        missing = len(self.paths) + len(new) - len(self.flags)
        if missing > 0:
            more = -(-missing // ROWS_AT_ONCE) * ROWS_AT_ONCE
            self.values = {n: np.vstack([v, self._floats(more)]) for n, v in self.values.items()}
            columns = self.span.columns
            self.flags = np.vstack([self.flags, np.zeros((more, columns), np.uint8)])
            self.at = np.vstack([self.at, np.full((more, columns), -1, np.int64)])
        # Last: the screen draws meanwhile, and looks in all of these for what is in `paths`.
        for path in new:
            self._rows[path] = len(self.paths)
            self.paths.append(path)
        # Modules beyond the most that are kept share the last row; they are not drawn.
        rows = [self._rows.get(path, len(self.flags) - 1) for path in paths]
        self._last = (paths, rows)
        return rows

    def in_order(self, modules: Iterable[str]) -> list[int]:
        """The rows in the order of some modules: that of reading begins where the cursor is.

        A module that is not among them comes last, by name.
        """
        paths = list(self.paths)
        places = {path: at for at, path in enumerate(modules)}
        far = len(places)
        return sorted(range(len(paths)), key=lambda row: (places.get(paths[row], far), paths[row]))

    def numbers(self, name: str, row: int) -> Floats:
        """A quantity of a module by column; at rest it is what it was when it was looked at."""
        values: Floats = held_over(self.values[name][row : row + 1], self.rested)[0]
        return values

    @property
    def modules(self) -> bool:
        """It is all about them."""
        return True

    def read_on(self, run: Run, cancelled: Callable[[], bool]) -> Iterator[float]:
        """Step lines say all of it."""
        return iter(())

    def nonfinite(self, row: int, column: int, name: str) -> str:
        """What was not finite behind a number: "n", "i" or ""."""
        bits = int(self.flags[row, column])
        return nonfinite_letter(letters_of(bits), name) if bits else ""

    def row(self, path: str) -> int | None:
        """The row of a module, None if it was not seen."""
        return self._rows.get(path)

    def range_of(self, name: str) -> tuple[float, float] | None:
        """The smallest and the largest value above 0 of a quantity; None if there is none."""
        values = self.values[name][: len(self.paths)]
        above = values[np.isfinite(values) & (values > 0)]
        return (float(above.min()), float(above.max())) if above.size else None
