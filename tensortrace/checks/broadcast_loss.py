"""TT604: a loss that compares every prediction with every target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import DISTANCE_MODULES, DISTANCE_OPS
from tensortrace.records import Call, Severity, Tensor
from tensortrace.text import location_text, shape_text


@check("TT604", "broadcast-in-loss", severity="error", of=("calls",))
def broadcast_in_loss(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A loss broadcasts [N, 1] against [N] to [N, N]: each prediction meets each target.

    Symptom:    regression settles at the mean of the targets; the loss stays near their variance
    Threshold:  mse, l1, smooth_l1 or huber loss (module or function) gets two tensors of the same
                N > 1 elements, one of shape (..., 1) and the other the same without the last dim,
                and the result has more than N. An error: torch itself warns that this is not meant,
                and a loss over pairs written on purpose has tensors of equally many dims. A
                warning for `a - b` outside modules, where one of them has a gradient, the other is
                data, and no operation of this step has given (..., 1) its last dim, or that of
                what it was made of element by element
    Source:     torch/nn/functional.py, mse_loss ("Using a target size that is different to the
                input size")
    Fix:        loss = F.mse_loss(prediction.squeeze(-1), target), or target.unsqueeze(-1)
    Misses:     losses written by hand inside a module, but for `level="op"`; other operators than
                minus; where N differs, broadcasting may be meant
    Example:    prediction = model(x)  # [64, 1], of a Linear(128, 1)
                loss = F.mse_loss(prediction, y)  # y is [64]
    Fixed:      prediction = model(x).squeeze(-1)
                loss = F.mse_loss(prediction, y)
    """
    if step.summary is None:
        return
    shaped: set[int] | None = None
    losses = {c.seq for c in step.forward() if c.op is None and _is_loss(step, c)}
    for call in step.forward():
        if call.parent in losses:
            continue
        if not _is_loss(step, call) and not (call.op == "sub" and call.module is None):
            continue
        two = [step.tensors[id] for _, id in call.inputs[:2] if id in step.tensors]
        count = _broadcast(two)
        if not count:
            continue
        severity: Severity = "error"
        if call.op == "sub":
            severity = "warning"
            if not _meets_data(two):
                continue
            shaped = _shaped(step) if shaped is None else shaped
            if max(two, key=_dims).id in shaped:
                continue
        first, second = (list(t.shape or ()) for t in two)
        yield Draft(
            message=f"{call.op or call.module} of {first} and {second} broadcasts to {count} "
            f"numbers (limit {two[0].numel}): every prediction is compared with every target",
            cause=location_text(call.location), severity=severity, phase="forward",
            module=call.module, op=call.op, seq=call.seq, tensor=two[0].id, value=count,
            limit=two[0].numel, location=call.location, fix=_repair(two),
            evidence={"placed": "direct", "shapes": [first, second]},
        )  # fmt: skip


def _is_loss(step: StepView, call: Call) -> bool:
    return step.kind_of(call) in (DISTANCE_MODULES if call.op is None else DISTANCE_OPS)


def _shaped(step: StepView) -> set[int]:
    """Collect what operations outside modules gave its shape, and what took that over from it."""
    shaped = set[int]()
    for call in step.forward():
        if call.op is None or call.module is not None:
            continue
        for _, id in call.outputs:
            alike = {i for _, i in call.inputs if _shape(step, i) == _shape(step, id)}
            if not alike or alike & shaped:
                shaped.add(id)
    return shaped


def _shape(step: StepView, id: int) -> tuple[int, ...] | None:
    tensor = step.tensors.get(id)
    return tensor.shape if tensor is not None else None


def _dims(tensor: Tensor) -> int:
    return len(tensor.shape or ())


def _broadcast(two: list[Tensor]) -> int:
    """Count the elements of the result if (..., 1) meets the same without its last dim, else 0."""
    if len(two) != 2 or two[0].shape is None or two[1].shape is None:
        return 0
    low, high = sorted((two[0].shape, two[1].shape), key=len)
    if high != (*low, 1) or two[0].numel < 2:
        return 0
    count = 1
    for a, b in zip((1, *low), high, strict=True):
        count *= max(a, b)
    return count if count > two[0].numel else 0


def _repair(two: list[Tensor]) -> str:
    """Name the side that has the last dim of 1, if it can be told."""
    if two[0].requires_grad == two[1].requires_grad:
        return "squeeze(-1) on the one that has a last dim of 1"
    high = max(two, key=_dims)
    name = "prediction" if high.requires_grad else "target"
    text = shape_text(high.shape)
    return f"{name}.squeeze(-1): it is the {name} that has a last dim of 1, {text}"


def _meets_data(two: list[Tensor]) -> bool:
    """Tell whether a result of the network meets something that has no gradient."""
    made, data = sorted(two, key=lambda t: not t.requires_grad)
    return made.requires_grad and not made.is_leaf and not data.requires_grad
