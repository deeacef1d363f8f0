"""TT410: a schedule that ends long before the training does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Module, Optimizer, Step
from tensortrace.text import number_text


@dataclass(slots=True)
class _Rate:
    """The learning rate of one optimizer so far: its steps, its height, how long it has been low.

    `same` counts the steps that it has not changed in, `falls` those at which it was lower than at
    the one before, `held` are the modules whose parameters the optimizer holds.
    """

    steps: int = 0
    top: float = 0.0
    top_at: int = 0
    low: int = 0
    same: int = 0
    last: float = math.inf
    falls: int = 0
    held: set[str] = field(default_factory=set)


@check("TT410", "learning-rate-vanished")
def learning_rate_vanished(
    step: StepView,
    memory: dict[str, Any],
    *,
    fraction: float = 1e-6,
    sustain: int = 100,
    share: float = 0.25,
    halted: float = 2e-5,
    most: float = 0.5,
    still: float = 2.0**-24,
    creep: float = 5e-7,
) -> Iterator[Draft]:
    """The learning rate has come down to nothing, and the training goes on for long after that.

    Symptom:    the loss falls at first and is stuck from then on, far from where it could be
    Threshold:  the highest learning rate of an optimizer is above 0 and <= fraction * the highest
                that it had, in `sustain` of its steps running and in more than `share` of all, and
                no weight that it holds moves by more than `still` of its norm in this one, of
                float64 by more than a 2**29th of that. Or: it is <= halted * the highest and has
                been the same in `sustain` of its steps running and in `most` of all, and no weight
                moves by more than `creep` of its norm
    Source:     `still` is the rounding of float32: a relative change below it is lost. A usual
                update is 1e-3 of the weights (A. Karpathy, "Makemore 3"), so 1e-6 of that is far
                below, and `creep` takes 2,000 steps for one. `sustain` and `share` chosen here, so
                that the last steps of a cosine, a linear or an exponential schedule are silent.
                `halted`: ReduceLROnPlateau leaves the rate as it is where a change would be below
                its eps, 1e-8, so it ends at 1e-5 of a rate of 1e-3; `most` chosen here, as one that
                has followed the loss down may go on for a while
    Fix:        call the step() of a scheduler that counts epochs once an epoch, after the loop over
                batches; give one that counts batches the number of all optimizer steps; give
                ReduceLROnPlateau a min_lr, and mode="max" for what is to rise
    Misses:     a rate that falls less far, as to 1e-8 from 1e-4, or in some groups of parameters
                only; one of exactly 0 (TT401). A run that is done and goes on for as long again at
                such a rate is reported
    Example:    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)  # epochs
                for epoch in range(90):
                    for x, y in loader:
                        train(x, y)
                        scheduler.step()
    Fixed:      scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)  # epochs
                for epoch in range(90):
                    for x, y in loader:
                        train(x, y)
                    scheduler.step()
    """
    summary = step.summary
    if summary is None:
        return
    rates: dict[int, _Rate] = memory.setdefault("rates", {})
    for optimizer in step.optimizers:
        if optimizer.anew:
            rates.pop(optimizer.index, None)
        if optimizer.skipped:
            continue
        rate = rates.get(optimizer.index)
        if rate is None:
            rate = rates[optimizer.index] = _Rate()
        _take_in(rate, optimizer, fraction)
        lost = rate.low and rate.low >= max(sustain, share * rate.steps)
        ended = 0 < rate.last <= halted * rate.top and rate.same >= max(sustain, most * rate.steps)
        moved = _most_moved(summary, rate.held) if lost or ended else None
        if moved is None:
            continue
        if lost and moved <= still * _finer(step.modules, rate.held):
            left = "is lost in the rounding of the weights"
            yield _draft(optimizer, rate, moved, low=rate.low, fraction=fraction, left=left)
        elif ended and moved <= creep:
            left = "moves a weight less far in 2,000 steps than a usual one does, 1e-3 of its norm"
            yield _draft(optimizer, rate, moved, low=rate.same, fraction=halted, left=left)


def _take_in(rate: _Rate, optimizer: Optimizer, fraction: float) -> None:
    """Take in a step of an optimizer. Hot."""
    now = optimizer.highest_lr
    rate.steps += 1
    if optimizer.parameters is not None:
        rate.held = {name.rpartition(".")[0] for name in optimizer.parameters}
    rate.falls += now < rate.last < math.inf
    rate.same = rate.same + 1 if now == rate.last else 1
    rate.last = now
    if rate.top <= now < math.inf:
        rate.top, rate.top_at = now, optimizer.step
    rate.low = rate.low + 1 if 0 < now <= fraction * rate.top else 0


def _most_moved(summary: Step, held: set[str]) -> float | None:
    """The largest update over the norm of a weight; None where none was measured."""
    columns = summary.modules
    rows = zip(columns.path, columns.update_ratio, strict=False)
    return max((ratio for path, ratio in rows if path in held and ratio is not None), default=None)


def _finer(modules: Mapping[str, Module], held: set[str]) -> float:
    """The rounding of the finest parameter of some modules over that of float32."""
    dtypes = (p.dtype for path in held if path in modules for p in modules[path].parameters)
    return 2.0**-29 if "float64" in dtypes else 1.0


def _draft(
    optimizer: Optimizer, rate: _Rate, moved: float, *, low: int, fraction: float, left: str
) -> Draft:
    now = optimizer.highest_lr
    by = f" by more than {number_text(moved)} of its norm" if moved else ""
    return Draft(
        message=f"the learning rate of optimizer {optimizer.index}, {optimizer.cls}, has come down "
        f"from {number_text(rate.top)} in step {rate.top_at} to {number_text(now)}: in {low} "
        f"of its {rate.steps} steps it is {fraction:g} times that or less (limit), and no weight "
        f"moves{by}",
        cause=f"optimizer {optimizer.index}", phase="optimizer", value=now,
        limit=fraction * rate.top, location=optimizer.location,
        explanation=f"a schedule has lowered the rate {rate.falls} times in {rate.steps} steps; "
        f"what is left of it {left}",
        evidence={"optimizer": optimizer.index, "highest": rate.top, "highest_step": rate.top_at,
                  "steps": low, "falls": rate.falls, "moved": moved},
    )  # fmt: skip
