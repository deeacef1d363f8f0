"""One module over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensortrace.records import COLUMNS
from tensortrace.run.run import Run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

# In a long run inner modules have outputs in steps whose number one of these divides: the first up
# to `LATE`, the second all the way (`engine.SELDOM`, `RARELY`).
LOOKED_AT = (10, 50)
LATE = 1000
# Whether a column of `ModuleColumns` is about outputs or gradients, as a letter of its `flags`; an
# update is about either.
SIDES = {"output_rms": "o", "zero_frac": "o", "grad_rms": "g", "param_grad_rms": "g"}


def nonfinite_letter(flags: str, column: str) -> str:
    """Tell what was not finite among the elements that a number of a step line is made of.

    Args:
        flags: those of the module.
        column: which number, by its name in `ModuleColumns`.
    Returns:
        "n" NaN, "i" infinite, or "". Logs that do not tell outputs from gradients say it of both.
    """
    side, told = SIDES.get(column), "o" in flags or "g" in flags
    if side is not None and told and side not in flags:
        return ""
    return next((letter for letter in "ni" if letter in flags), "")


def looked_at(steps: range) -> int:
    """The first of some steps in which inner modules are looked at for certain, else the first."""
    for stride in reversed(LOOKED_AT):
        step = steps.start + -steps.start % stride
        if step in steps:
            return step
    return steps.start


def held_over(values: Floats, rested: npt.NDArray[np.bool_]) -> Floats:
    """Give columns of steps at rest, where they have none, the last numbers before them.

    Args:
        values: float64 ``(modules, columns)``, NaN where there is none; not modified.
        rested: bool ``(columns,)``: whether all steps of a column were at rest.
    Returns:
        As `values`. What comes before the first number stays NaN, and so does what follows a step
        that was looked at and has none.
    """
    import numpy as np

    if not rested.any():
        return values
    at = np.where(np.isnan(values) & rested, 0, np.arange(len(rested)))
    found: Floats = np.take_along_axis(values, np.maximum.accumulate(at, axis=1), axis=1)
    return found


def series(
    run: Run, path: str, start: int | None = None, stop: int | None = None, *, limit: int = 512
) -> dict[str, list[tuple[int, float | str | None]]]:
    """Follow one module over the steps, from the step lines: what a sparkline shows.

    Args:
        run: whose log.
        path: module path.
        start: first step, the first of the run by default.
        stop: end of the steps (exclusive), the end of the run by default.
        limit: at most so many steps, evenly spread.
    Returns:
        For each column of `ModuleColumns` (``output_rms``, ``zero_frac``, ``grad_rms``,
        ``param_grad_rms``, ``update_ratio``, ``flags``) the (step, value) pairs; steps in which the
        module did not run are left out.
    """
    first = run.first_step() if start is None else start
    last = run.last_step() + 1 if stop is None else stop
    stride = max(1, -(-(last - first) // limit))
    if stride > LOOKED_AT[0]:
        stride += -stride % LOOKED_AT[last > LATE]
    found: dict[str, list[tuple[int, float | str | None]]] = {name: [] for name in COLUMNS}
    for number in range(first, last, stride):
        for summary in run.summaries(number, number + 1):
            if path in summary.modules.path:
                row = summary.modules.path.index(path)
                for name in COLUMNS:
                    values = getattr(summary.modules, name)
                    found[name].append((number, values[row] if row < len(values) else None))
    return found
