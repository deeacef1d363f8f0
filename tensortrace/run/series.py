"""Numbers of modules over the steps: where they are, what of them was not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

# In a long run inner modules have outputs in steps whose number one of these divides: at first the
# first of them, from some step on the second (`engine.SELDOM`, `RARELY`, `LATE`).
LOOKED_AT = (10, 50)
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
