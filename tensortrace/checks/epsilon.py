"""TT504: Adam's epsilon lost in float16, or larger than the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import Any

from tensortrace.checks import Draft, StepView, check, finite
from tensortrace.records import Action, Optimizer, from_scalar
from tensortrace.text import number_text

# What is below this becomes 0 in float16: half of the smallest number above 0.
_LOST = 2.0**-25
_ADAPTIVE = ("Adam", "NAdam", "RAdam", "RMSprop")


@check("TT504", "epsilon", of=("full", "holds"))
def epsilon(
    step: StepView,
    memory: dict[str, Any],
    *,
    sustain: int = 10,
    larger: float = 1.0,
    learnt: float = 0.1,
) -> Iterator[Draft]:
    """Adam's epsilon becomes 0 in float16, or is larger than the gradients it stands beside.

    Symptom:    NaN or huge weights after the first steps in float16; or a loss that falls slowly,
                at a speed that goes with the scale of the loss, which Adam should not feel
    Threshold:  eps of an Adam (or RMSprop) is below 2 ** -25, and weights that it moves are
                float16, so that eps and most squares of gradients become 0 there. Or: the median
                over the parameters of the rms of their gradients, those of 0 aside, is less than
                `larger` * eps in each of the first `sustain` full steps in which it steps, while
                the loss is above `learnt` * what it was at first
    Source:     torch.optim.Adam: a step is m / (sqrt(v) + eps), with m and v in the dtype of the
                weights; torch.finfo(float16).smallest_normal is 6.1e-5; Kingma and Ba 2015, section
                2.1: the size of a step does not depend on that of the gradients, as long as eps is
                small; `sustain` chosen here
    Fix:        weights in float32 and torch.autocast, or bfloat16; eps=1e-4 where float16 must be;
                for small gradients a loss that is not divided twice, or a larger max_norm where
                clipping made them so, or eps=1e-15
    Misses:     gradients that are small from the middle of a run on, as in one that has converged;
                epsilons of other optimizers; groups with different epsilons are judged by the
                smallest (float16) or the largest (gradients)
    Example:    model = Model().half()
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    Fixed:      model = Model()
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
                with torch.autocast("cuda", dtype=torch.float16):
                    loss = criterion(model(x), y)
    """
    summary = step.summary
    known: dict[int, list[float]] = memory.setdefault("known", {})
    for optimizer in step.optimizers:
        if optimizer.cls.startswith(_ADAPTIVE) and optimizer.eps:
            known[optimizer.index] = [eps for eps in optimizer.eps if eps is not None]
    if summary is None or not summary.full:
        return
    loss = from_scalar(summary.loss)
    first = memory.setdefault("first", loss) if loss is not None else None
    small: dict[int, int] = memory.setdefault("small", {})
    for optimizer in step.optimizers:
        epsilons = known.get(optimizer.index)
        if not epsilons or optimizer.skipped:
            continue
        mine = [p for p in step.params if p.optimizer == optimizer.index]
        half = [p.name for p in mine if p.value.dtype == "float16"]
        if half and min(epsilons) < _LOST:
            yield _lost(optimizer, min(epsilons), half, len(mine))
        sizes = [p.grad.norm / math.sqrt(p.grad.numel) for p in mine if p.grad and p.grad.norm]
        learns = loss is None or first is None or abs(loss) > learnt * abs(first)
        if not sizes or small.get(optimizer.index) == -1:
            continue
        if median(sizes) >= larger * max(epsilons) or not learns:
            small[optimizer.index] = -1  # it was not so from the beginning
            continue
        small[optimizer.index] = small.get(optimizer.index, 0) + 1
        if small[optimizer.index] >= sustain:
            size, eps = median(sizes), max(epsilons)
            clip = _clipped_to(step, size, eps)
            by = f"; clipping has made them {number_text(clip[1])} times smaller" if clip else ""
            yield Draft(
                message=f"eps {eps:g} of {optimizer.cls} is larger than the gradients, rms "
                f"{number_text(size)} as the median of {len(sizes)} parameters, in the first "
                f"{small[optimizer.index]} full steps (limit {sustain}): steps shrink by a factor "
                f"of {number_text(eps / size + 1)}{by}",
                cause=f"larger {optimizer.index}", phase="optimizer", value=size,
                limit=larger * eps, location=clip[0].location if clip else optimizer.location,
                fix=f"a larger max_norm than {clip[0].detail['max_norm']:g}; 1.0 is common"
                if clip else None,
                evidence={"placed": "direct", "parameters": len(sizes)},
            )  # fmt: skip


def _clipped_to(step: StepView, size: float, eps: float) -> tuple[Action, float] | None:
    """The clipping without which the gradients were larger than eps, and what it divided by."""
    for action in step.actions:
        most, total = action.detail.get("max_norm"), from_scalar(action.detail.get("total_norm"))
        if action.action != "clip" or not most or not total or not finite(total):
            continue
        if total > most and size * total / most > eps:
            return action, total / most
    return None


def _lost(optimizer: Optimizer, eps: float, half: list[str], held: int) -> Draft:
    return Draft(
        message=f"eps {eps:g} of {optimizer.cls} is 0 in float16 (limit {_LOST:.2g}), the dtype "
        f"of {len(half)} of the {held} parameters that it moves: a gradient whose square is 0 "
        "there is divided by 0, or nearly",
        cause=f"lost {optimizer.index}", phase="optimizer", param=half[0], value=eps, limit=_LOST,
        location=optimizer.location, evidence={"placed": "direct", "parameters": half[:20]},
    )  # fmt: skip
