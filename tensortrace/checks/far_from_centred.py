"""TT305: what a layer gets lies far to one side of zero."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import module_text, number_text


@check("TT305", "far-from-centred", when="full", severity="note")
def far_from_centred(
    step: StepView,
    memory: dict[str, Any],
    *,
    ratio: float = 5.0,
    features: int = 8,
    sustain: int = 4,
    window: int = 6,
) -> Iterator[Draft]:
    """Hidden layers get inputs that are nearly constant, far from centred: a norm would help.

    Symptom:    training is slow, in particular at the start, and needs a low learning rate; the
                weights of a layer all move in one direction
    Threshold:  |mean| > ratio * std of what a layer with weights is given by layers before it, of
                at least `features` features, in all its calls of a step, in `sustain` of the last
                `window` full steps that train
    Source:     LeCun et al. 1998, "Efficient BackProp", sections 4.3 and 4.4: a mean that is large
                against the spread makes the loss narrow in one direction and flat in the others,
                which is why sigmoids are worse than tanhs; Ioffe and Szegedy 2015. `ratio` chosen
                here (measured on tests/healthy: at most 2.4)
    Fix:        a norm layer in front (LayerNorm, or BatchNorm for images), tanh, GELU or SiLU in
                place of sigmoid; without a constant that is added to all features
    Misses:     what the model itself is given (TT601); features that are far from centred on both
                sides of zero; a layer that takes its scale from the mean on purpose

    Example:
        nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.Sigmoid(), ...)

    Fixed:
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), ...)
    """
    if not any(not optimizer.skipped for optimizer in step.optimizers):
        return
    seen: dict[str, tuple[float, Call, Tensor]] = {}
    for call in step.forward():
        given = _given(step, call, features)
        if given is None or call.module is None or not given.std:
            continue
        far = abs(given.mean or 0.0) / given.std
        if call.module not in seen or far < seen[call.module][0]:
            seen[call.module] = (far, call, given)
    series: dict[str, deque[bool]] = memory.setdefault("series", {})
    found: list[str] = []
    for path, (far, _, _) in seen.items():
        recent = series.setdefault(path, deque(maxlen=window))
        recent.append(far > ratio)
        if far > ratio and sum(recent) >= sustain:
            found.append(path)
    if found:
        worst = max(found, key=lambda path: seen[path][0])
        far, call, given = seen[worst]
        yield Draft(
            message=f"what {module_text(worst)} is given has mean {number_text(given.mean)} and std"
            f" {number_text(given.std)}: {number_text(far)} times (limit {ratio:g}), as in "
            f"{len(found)} of {len(seen)} layers, {sum(series[worst])} of {len(series[worst])} full"
            " steps",
            cause="centre", phase="forward", module=worst, seq=call.seq, tensor=given.id,
            value=far, limit=ratio, location=call.location,
            evidence={"modules": {path: seen[path][0] for path in found[:20]}},
        )  # fmt: skip


def _given(step: StepView, call: Call, features: int) -> Tensor | None:
    """What earlier layers give to a layer with weights in training; None for all other calls."""
    if call.op is not None or not call.training or not call.inputs:
        return None
    module = step.modules.get(call.module) if call.module is not None else None
    widths = [p.shape[1] for p in module.parameters if len(p.shape) > 1] if module else []
    given = step.tensors.get(call.inputs[0][1])
    if given is None or not widths or min(widths) < features or given.nonfinite:
        return None
    return given if given.requires_grad and given.numel >= features * features else None
