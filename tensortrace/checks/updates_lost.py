"""TT503: updates that rounding loses, since the weights are kept in half precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, rates_rise
from tensortrace.magnitudes import counts_of, share_from
from tensortrace.records import Optimizer, Param, Tensor, from_scalar
from tensortrace.text import number_text, short_dtype

# Half the distance to the next number, as a share of the number, at least: 2 ** -(digits + 1).
_HALF_ULP = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
# Optimizers whose step is about the learning rate for each element, whatever the gradient.
_ADAPTIVE = ("Adam", "NAdam", "RAdam", "Lion")


@check("TT503", "updates-lost")
def updates_lost(
    step: StepView,
    memory: dict[str, Any],
    *,
    share: float = 0.5,
    sustain: int = 5,
    momentum: float = 10.0,
) -> Iterator[Draft]:
    """Weights in half precision are moved by so little that most of them round back.

    Symptom:    a loss that stands still or falls more slowly than in float32, although gradients
                and learning rate are as they should be; a lower learning rate stops it altogether
    Threshold:  the learning rate (Adam and its kin; for SGD, `momentum` * learning rate * rms of
                the gradient) is below half of the distance to the next number (2 ** -9 of it in
                bfloat16, 2 ** -12 in float16) for more than `share` of the weights: those that are
                not 0 are taken as normally distributed around 0 with the rms that they have, within
                the bounds that their exponents set (weights in ranges of magnitude that lie beyond
                the limit as a whole are lost, those in ranges below it are not); and the weights
                moved by no more than that; in `sustain` full steps running in which no learning
                rate rises
    Source:     Zamirai et al. 2020, "Revisiting BFloat16 Training", section 3: nearest rounding of
                the update is what hurts; `share` and `sustain` chosen here, `momentum` that of 0.9
                (compared with torch.equal element by element in tests/checks)
    Fix:        keep the weights in float32 and compute under torch.autocast(device,
                dtype=torch.bfloat16); or an optimizer with stochastic rounding or compensated sums;
                or a learning rate far higher
    Misses:     weights of one dim; other optimizers; groups with different learning rates are
                judged by the highest; which of them are lost, since only their distribution is
                known; one that is far from normal, in a log without exponents
    Example:    model = Model().to(torch.bfloat16)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    Fixed:      model = Model()
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = criterion(model(x), y)
    """
    if step.summary is None:
        return
    rising = rates_rise(step, memory)
    if rising:
        memory["running"] = 0
    if not step.summary.full:
        return
    taken = {o.index: o for o in step.taken}
    lost = total = still = 0.0
    expected = moved = 0.0
    worst: tuple[float, Param] | None = None
    for param in step.params:
        size = _size(param, taken.get(param.optimizer), momentum)
        update = from_scalar(param.update_norm)
        if size is None or update is None or param.value.norm is None:
            continue
        count, out = param.value.numel, _lost(param.value, size)
        lost, total, still = lost + out * count, total + count, still + (update == 0)
        expected, moved = expected + size**2 * count, moved + update**2
        if worst is None or out > worst[0]:
            worst = out, param
    if worst is None or total == 0:
        return
    # What is rounded at random, or carried along, moves further than its own length.
    out = lost > share * total and moved <= expected
    memory["running"] = memory.get("running", 0) + 1 if out and not rising else 0
    if memory["running"] >= sustain:
        param = worst[1]
        yield Draft(
            message=f"the step of {number_text(_size(param, taken[param.optimizer], momentum))} is "
            f"below half the distance to the next {short_dtype(param.value.dtype)} number for "
            f"{lost / total:.0%} of {total:g} weights (limit {share:.0%}), in {memory['running']} "
            f"full steps running; {still:g} parameters did not move at all",
            cause="lost", phase="optimizer", module=param.module, param=param.name,
            value=lost / total, limit=share, location=taken[param.optimizer].location,
            evidence={"placed": "direct", "moved": math.sqrt(moved), "of": math.sqrt(expected)},
        )  # fmt: skip


def _lost(value: Tensor, size: float) -> float:
    """Estimate the share of weights that a step of a size does not move."""
    some = value.numel - value.zeros
    if not 0 < some <= value.numel or not value.norm:
        return 0.0
    reach = size / _HALF_ULP[value.dtype]
    out = 1 - math.erf(reach / (value.norm / math.sqrt(some)) / math.sqrt(2))
    counts = counts_of(value)
    if counts is not None:
        least, most = share_from(counts, reach)
        out = min(max(out, least), most)
    # What is added to a 0 is never lost.
    return out * some / value.numel


def _size(param: Param, optimizer: Optimizer | None, momentum: float) -> float | None:
    """How far a step moves each weight, at most; None where it is not known, or nothing is lost."""
    value, grad = param.value, param.grad
    if optimizer is None or value.dtype not in _HALF_ULP or len(value.shape or ()) < 2:
        return None
    rate = optimizer.highest_lr
    if grad is None or not grad.norm or not value.norm or not (rate > 0):
        return None
    if optimizer.cls.startswith(_ADAPTIVE):
        return rate
    if optimizer.cls == "SGD":
        return momentum * rate * grad.norm / math.sqrt(grad.numel)
    return None
