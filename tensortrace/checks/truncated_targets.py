"""TT508: fractional targets that a cast to integers cuts off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import BINARY_LOSSES, CLASS_LOSSES, DISTANCE_MODULES, DISTANCE_OPS
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text, number_text, short_dtype

_CASTS = frozenset(("to", "type", "long", "int", "short", "char", "byte"))
# A target may go through these, a cast back included, on its way to the loss.
_THROUGH = _CASTS | {"float", "half", "double", "bfloat16", "view", "reshape", "flatten", "squeeze",
                     "unsqueeze", "contiguous", "cuda", "cpu", "getitem"}  # fmt: skip
_REGRESSION = DISTANCE_OPS | DISTANCE_MODULES | BINARY_LOSSES


@check("TT508", "truncated-targets", of=("calls",))
def truncated_targets(
    step: StepView, memory: dict[str, Any], *, lost: float = 1e-4
) -> Iterator[Draft]:
    """Targets with a fraction are cast to integers before the loss sees them.

    Symptom:    regression is off by half a unit on average and no more precise; soft labels have
                all become class 0
    Threshold:  outside modules a floating-point tensor is cast to integers, its mean or rms changes
                by more than `lost` of its largest value, and the result is the target of a
                regression or binary loss (a cast back and views in between do not count); or of
                cross entropy, if all that was cast lay between 0 and 1
    Source:     torch.Tensor.long truncates toward 0; `lost` above what rounding errors of the
                statistics can be
    Fix:        y = y.float() for regression and for soft labels; y.round().long() where integers
                are wanted
    Misses:     casts inside the dataset, in torch.tensor(..., dtype=torch.long) and in assignments
                to an integer tensor; numbers that are put into classes on purpose are silent with
                cross entropy
    Example:    target = batch["price"].long().unsqueeze(1)
                loss = F.mse_loss(model(x), target.float())
    Fixed:      target = batch["price"].unsqueeze(1)
                loss = F.mse_loss(model(x), target)
    """
    if step.summary is None:
        return
    # The cast that each tensor has been through, by id, with what it was given.
    cut: dict[int, tuple[Call, Tensor, Tensor]] = {}
    for call in step.forward():
        kind = step.kind_of(call)
        if kind in _THROUGH and call.inputs and call.outputs:
            given, made = call.inputs[0][1], call.outputs[0][1]
            if given in cut:
                cut[made] = cut[given]
            elif kind in _CASTS and (pair := _truncated(step, given, made, lost)):
                cut[made] = (call, *pair)
        elif kind in _REGRESSION or kind in CLASS_LOSSES:
            found = next((cut[id] for _, id in call.inputs[1:2] if id in cut), None)
            if found is None:
                continue
            cast, before, after = found
            inside = (before.min or 0.0) >= 0 and (before.max or 0.0) <= 1
            if kind in CLASS_LOSSES and not inside:
                continue
            yield Draft(
                message=f"{cast.op} makes {short_dtype(after.dtype)} of targets with a fraction: "
                f"their mean goes from {number_text(before.mean)} to {number_text(after.mean)}, "
                f"and {after.zeros} of {after.numel} are 0, before {call.op or call.module}",
                cause=location_text(cast.location), phase="forward", op=cast.op, seq=cast.seq,
                tensor=after.id, value=after.mean, limit=before.mean, location=cast.location,
                evidence={"placed": "direct", "loss": location_text(call.location)},
            )  # fmt: skip


def _truncated(step: StepView, given: int, made: int, lost: float) -> tuple[Tensor, Tensor] | None:
    """Tell of a cast what it was given and what it made, if it cut fractions off."""
    before, after = step.tensors.get(given), step.tensors.get(made)
    if before is None or after is None or before.numel < 1:
        return None
    if not before.dtype.startswith(("float", "bfloat")) or before.nonfinite:
        return None
    if not after.dtype.startswith(("int", "uint")):
        return None
    if before.mean is None or after.mean is None or before.norm is None or after.norm is None:
        return None
    scale = max(abs(before.min or 0.0), abs(before.max or 0.0))
    by = abs(before.mean - after.mean)
    by = max(by, abs(before.norm - after.norm) / before.numel**0.5)
    return (before, after) if by > lost * scale else None
