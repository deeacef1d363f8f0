"""TT505: gradients clipped while they still carry the scale of a GradScaler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Optimizer, from_scalar
from tensortrace.text import number_text


@check("TT505", "clip-before-unscale", severity="error", since=("scale", "unscale"))
def clip_before_unscale(
    step: StepView, memory: dict[str, Any], *, least: float = 0.01, sustain: int = 2
) -> Iterator[Draft]:
    """Gradients are clipped before the GradScaler has unscaled them.

    Symptom:    training hardly moves, as the clip value is divided by a scale of thousands
    Threshold:  in `sustain` steps running of an optimizer that a scaler steps, its gradients were
                clipped after scale() and before unscale_(), and the clip value over the scale is
                below `least`. An error: the scale is known, so what was clipped is certain
    Source:     docs.pytorch.org, "Automatic Mixed Precision examples", gradient clipping: "If you
                attempted to clip without unscaling, the gradients' norm/maximum magnitude would
                also be scaled"; `least` chosen here, so that a clip value multiplied by
                scaler.get_scale(), which is right, says nothing
    Fix:        scaler.unscale_(optimizer) before torch.nn.utils.clip_grad_norm_, and
                scaler.step(optimizer) after it
    Misses:     a scale below about 100, where the clip value over it is still above `least`
    Example:    scaler.scale(loss).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
    Fixed:      scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
    """
    scale: float | None = memory.get("scale")
    unscaled: set[int] = memory.setdefault("unscaled", set())
    early: dict[int, tuple[Any, ...]] = memory.setdefault("early", {})
    running: dict[int, int] = memory.setdefault("running", {})
    for record in step.happened():
        if isinstance(record, Optimizer):
            at, limit, location = early.pop(record.index, (None, None, None))
            running[record.index] = running.get(record.index, 0) + 1 if at else 0
            if at and running[record.index] >= sustain:
                yield Draft(
                    message=f"gradients of optimizer {record.index}, {record.cls}, are clipped to "
                    f"{number_text(limit)} while they are scaled by {number_text(at)}, "
                    f"{running[record.index]} steps running: in effect to "
                    f"{number_text(limit / at)} (limit {least:g})",
                    cause=f"optimizer {record.index}", phase="backward", value=limit / at,
                    limit=least, location=location,
                    evidence={"optimizer": record.index, "scale": at, "clip": limit},
                )  # fmt: skip
            unscaled.discard(record.index)
            scale = None
        elif record.action == "scale":
            scale = from_scalar(record.detail.get("scale"))
        elif record.action == "unscale" and record.optimizer is not None:
            unscaled.add(record.optimizer)
        elif record.action == "clip" and scale and math.isfinite(scale):
            index = record.optimizer
            limit = from_scalar(record.detail.get("max_norm", record.detail.get("value")))
            if index is None or index in unscaled or limit is None:
                continue
            if limit / scale < least:
                early[index] = (scale, limit, record.location)
    memory["scale"] = scale
