"""One number of every step over the run: which there are, and what a column of steps has of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tensortrace.records import Step, from_scalar
from tensortrace.run import Run, nonfinite_letter
from tensortrace.tui.grid import QUANTITIES
from tensortrace.tui.span import Span
from tensortrace.tui.views.site_track import SiteStatistic, in_turn


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number that a step line has: of the step itself, or of a module (`path` is not None)."""

    name: str
    path: str | None = None

    def of(self, step: Step) -> float | None:
        """The number in a step, None if it is not there; it may be NaN or infinite."""
        if self.path is None:
            return OF_STEP[self.name](step)
        held = step.modules
        values = getattr(held, self.name)
        if self.path not in held.path or len(values) != len(held.path):
            return None
        at = held.path.index(self.path)
        flags = held.flags[at] if at < len(held.flags) else ""
        # The numbers are over finite elements; that there were others is a flag.
        return math.nan if nonfinite_letter(flags, self.name) else values[at]


OF_STEP: dict[str, Callable[[Step], float | None]] = {
    "loss": lambda step: from_scalar(step.loss),
    "grad norm": lambda step: from_scalar(step.grad_norm),
    "learning rate": lambda step: from_scalar(step.lr[0]) if step.lr else None,
    "time (ms)": lambda step: step.host_ns / 1e6 if step.host_ns else None,
    "findings that came again": lambda step: float(sum(step.repeats.values())),
}
LOSS, GRAD_NORM, RATE = (Statistic(name) for name in ("loss", "grad norm", "learning rate"))


def statistics(paths: Iterable[str]) -> list[Statistic]:
    """Every number that step lines have, those of the steps first."""
    held = [Statistic(name) for name in OF_STEP]
    return held + [Statistic(name, path) for path in paths for name in QUANTITIES]


class Tracks:
    """Some statistics by column: the smallest, the largest, and how many were not finite.

    Attributes:
        low, high: float64 ``(statistics, columns)``; NaN where nothing finite was seen.
        bad: int64 ``(statistics, columns)``: the first step whose number is not finite, else -1.
    """

    def __init__(self, span: Span, held: Iterable[Statistic | SiteStatistic]) -> None:
        self.span, self.held = span, tuple(held)
        shape = (len(self.held), span.columns)
        self.low, self.high = np.full(shape, np.nan), np.full(shape, np.nan)
        self.bad = np.full(shape, -1, np.int64)
        # Steps whose calls are in the log, for what only these say.
        self.full: set[int] = set()

    def add(self, steps: list[Step]) -> None:
        """Take in step lines; one that came before changes nothing, so any order will do."""
        for step in steps:
            at = self.span.column(step.step)
            if not 0 <= at < self.span.columns:
                continue
            if step.full and self.sites:
                self.full.add(step.step)
            for row, statistic in enumerate(self.held):
                self._put(row, at, step.step, statistic.of(step))

    def _put(self, row: int, at: int, step: int, value: float | None) -> None:
        if value is None:
            return
        if math.isfinite(value):
            self.low[row, at] = np.fmin(self.low[row, at], value)
            self.high[row, at] = np.fmax(self.high[row, at], value)
        elif not 0 <= self.bad[row, at] <= step:
            self.bad[row, at] = step

    @property
    def modules(self) -> bool:
        """Whether any statistic is one of a module."""
        return any(isinstance(one, Statistic) and one.path is not None for one in self.held)

    @property
    def sites(self) -> list[tuple[int, SiteStatistic]]:
        """The statistics that only the calls of full steps have, by row."""
        return [(row, one) for row, one in enumerate(self.held) if isinstance(one, SiteStatistic)]

    def read_on(self, run: Run, cancelled: Callable[[], bool]) -> Iterator[float]:
        """Read what step lines do not say from the full steps that came; yields the share done."""
        # The calls of the step before a finding are in the log, too.
        before = {finding.step - 1 for finding in run.findings} if self.sites else set()
        before = {n for n in before if 0 <= self.span.column(n) < self.span.columns}
        for row, statistic in self.sites:
            steps = sorted((self.full | before) - statistic.known.keys())
            for done, number in enumerate(in_turn(steps, self.span.column)):
                if cancelled():
                    return
                self._put(row, self.span.column(number), number, statistic.read(run, number))
                yield done / len(steps)
