"""A statistic of one tensor over the run: read from the calls of every step that was kept whole.

Step lines have numbers of modules alone. What was read of a step is kept, so that zooming and
panning read nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tensortrace.records import Step, Tensor
from tensortrace.run import Run
from tensortrace.text import escape
from tensortrace.tui.views.site import Held, tensor_in

# Steps whose number is kept.
MOST_KEPT = 200_000


def _largest(tensor: Tensor) -> float | None:
    ends = [abs(end) for end in (tensor.min, tensor.max) if end is not None]
    return max(ends, default=None)


# What is over the finite elements is not finite itself where others are there.
OF_FINITE: dict[str, Callable[[Tensor], float | None]] = {
    "mean": lambda tensor: tensor.mean,
    "std": lambda tensor: tensor.std,
    "min": lambda tensor: tensor.min,
    "max": lambda tensor: tensor.max,
    "largest magnitude": _largest,
    "rms": lambda tensor: tensor.rms,
    "norm": lambda tensor: tensor.norm,
}
OF_ALL: dict[str, Callable[[Tensor], float | None]] = {
    "zero fraction": lambda t: t.zeros / t.numel if t.numel and t.unmeasured is None else None,
    "NaN elements": lambda tensor: float(tensor.nan),
    "infinite elements": lambda tensor: float(tensor.posinf + tensor.neginf),
    "elements": lambda tensor: float(tensor.numel),
}
OF_TENSOR = OF_FINITE | OF_ALL


@dataclass(frozen=True, eq=False)
class SiteStatistic:
    """A number of the tensor of that name at that call in every full step.

    Attributes:
        title: what a person calls it.
        known: what was read so far, by step; None where the step has no such tensor.
    """

    site: Held
    name: str
    title: str
    known: dict[int, float | None] = field(default_factory=dict)

    def of(self, step: Step) -> float | None:
        """The number in a step, None if it is not there or not read yet."""
        return self.known.get(step.step)

    def read(self, run: Run, number: int) -> float | None:
        """Read it from the calls of a step; it may be NaN."""
        if number not in self.known:
            tensor = tensor_in(run.step(number), self.site)
            if len(self.known) < MOST_KEPT:
                self.known[number] = self.of_tensor(tensor)
            else:
                return self.of_tensor(tensor)
        return self.known[number]

    def of_tensor(self, tensor: Tensor | None) -> float | None:
        """The number of a tensor."""
        if tensor is None:
            return None
        if tensor.nonfinite and self.name in OF_FINITE:
            return math.nan
        return OF_TENSOR[self.name](tensor)


def of_site(site: Held, name: str) -> list[SiteStatistic]:
    """Every statistic of a tensor of the row of that name."""
    title = f"{name} {escape(site.label)}"
    return [SiteStatistic(site, statistic, title) for statistic in OF_TENSOR]


def in_turn(steps: list[int], columns: Callable[[int], int]) -> Iterator[int]:
    """Steps in the order to read them in: one of every column, then two, four, ... all."""
    share, seen = 1, set[int]()
    by_column: dict[int, list[int]] = {}
    for step in steps:
        by_column.setdefault(columns(step), []).append(step)
    while len(seen) < len(steps):
        for held in by_column.values():
            for at in range(share):
                step = held[at * len(held) // share] if share < len(held) else held[at % len(held)]
                if step not in seen:
                    seen.add(step)
                    yield step
        share *= 2
