"""TT603: labels and indices outside of what their loss or table has room for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import BINARY_LOSSES, CLASS_LOSSES
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text

_KINDS = BINARY_LOSSES | CLASS_LOSSES | {"Embedding"}


@check("TT603", "label-out-of-range", severity="error", of=("calls",))
def label_out_of_range(
    step: StepView, memory: dict[str, Any], *, beyond: float = 0.5
) -> Iterator[Draft]:
    """Labels lie outside the range of the loss, or indices outside their table.

    Symptom:    binary cross entropy falls below 0 and never stops; or batches fail and are skipped
    Threshold:  a target of binary cross entropy lies more than `beyond` outside of 0 to 1 and the
                result is one number, so that no mask comes after it: an error, since the loss has
                no lower bound then. A class index is not in 0 to C - 1 and is not ignore_index, or
                an index of an embedding not among its rows: an error, where torch did not check
                it, or where it raised and the program went on
    Source:     torch.nn.BCEWithLogitsLoss ("Target: values between 0 and 1"), CrossEntropyLoss;
                `beyond` chosen here: noisy labels of 0.7 to 1.2 are a known trick for GANs
    Fix:        y = (y + 1) / 2 for labels -1 and 1; y / 255 for masks; y - 1 for classes that count
                from 1
    Misses:     an exception that leaves the block is explained by TT801; ignore_index of a loss
                module is not known, so without an exception only functions are checked; a mask
                given as `weight` silences it; on CUDA the device itself asserts first, after which
                no value can be read, and to look before would wait for the device in each step
    Example:    y = torch.tensor(frame["label"].values, dtype=torch.float32)  # -1 and 1
                loss = F.binary_cross_entropy_with_logits(logits, y)
    Fixed:      y = (torch.tensor(frame["label"].values, dtype=torch.float32) + 1) / 2
                loss = F.binary_cross_entropy_with_logits(logits, y)
    """
    if step.summary is None or any(a.action == "exception" for a in step.actions):
        return
    for call in step.forward():
        if len(call.inputs) < 1:
            continue
        kind = step.kind_of(call)
        if kind not in _KINDS:
            continue
        module, given = step.module_of(call), [step.tensors.get(id) for _, id in call.inputs]
        outside = None
        if kind in BINARY_LOSSES:
            outside = _binary(step, call, given, beyond)
        elif kind in CLASS_LOSSES:
            outside = _class(call, given)
        elif kind == "Embedding" and module is not None and call.exception and module.parameters:
            outside = _outside(given[0], module.parameters[0].shape[0], None)
        if outside is not None:
            value, limit, said = outside
            yield Draft(
                message=f"{value:g} in the labels or indices of {call.op or call.module}: {said}",
                cause=location_text(call.location), phase="forward", module=call.module,
                op=call.op, seq=call.seq, tensor=call.inputs[-1][1], value=value, limit=limit,
                location=call.location, fix=_ignoring(kind, value),
                evidence={"placed": "direct", "raised": call.exception},
            )  # fmt: skip


def _ignoring(kind: str, value: float) -> str | None:
    """What to write where a class index is one that marks what has no label, in most data sets."""
    if kind not in CLASS_LOSSES or value not in (255, -1):
        return None
    return f"{kind}(..., ignore_index={value:g}) if it marks what to leave out"


Outside = tuple[float, float, str]


def _binary(
    step: StepView, call: Call, given: list[Tensor | None], beyond: float
) -> Outside | None:
    made = [step.tensors[id] for _, id in call.outputs if id in step.tensors]
    if len(given) != 2 or not made or made[0].numel != 1:
        return None
    target = given[1]
    if target is None or target.numel < 2 or target.min is None or target.max is None:
        return None
    for value, limit in ((target.min, 0.0), (target.max, 1.0)):
        if abs(value - 0.5) > 0.5 + beyond and (value < 0) == (limit == 0):
            return value, limit, "binary cross entropy wants 0 to 1"
    return None


def _class(call: Call, given: list[Tensor | None]) -> Outside | None:
    if len(given) < 2 or given[0] is None or not given[0].shape:
        return None
    shape = given[0].shape
    # A module's ignore_index is not known: then torch must have refused the label.
    if call.op is None and call.exception is None:
        return None
    ignored = call.arguments.get("ignore_index", -100) if call.op is not None else None
    return _outside(given[1], shape[1] if len(shape) > 1 else shape[0], ignored)


def _outside(index: Tensor | None, count: int, ignored: int | None) -> Outside | None:
    if index is None or not index.dtype.startswith(("int", "uint")):
        return None
    said = f"there are {count}, allowed are 0 to {count - 1}"
    if index.max is not None and index.max >= count and index.max != ignored:
        return index.max, count - 1, said
    if index.min is not None and index.min < 0 and index.min not in (ignored, -100):
        return index.min, 0, said
    return None
