"""Steps that were asked for: how they are written, and what is said if a log has none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tensortrace.errors import UsageError

if TYPE_CHECKING:
    from tensortrace.run import Run


def range_text(steps: range) -> str:
    """Write a range of steps for a person: ``12``, ``10 to 20``."""
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def overlap(one: range, other: range) -> range:
    """The steps that are in both."""
    return range(max(one.start, other.start), min(one.stop, other.stop))


def require_steps(runs: Sequence[Run], steps: range) -> None:
    """Make sure that at least one of the runs has at least one of the steps.

    Raises:
        UsageError: none has any.
    """
    if any(overlap(run.steps, steps) for run in runs):
        return
    has = runs[0].steps
    held = f"step{'s' * (len(has) > 1)} {range_text(has)}" if has else "no steps"
    raise UsageError(f"no step {range_text(steps)} in {runs[0].path}: it has {held}.")
