"""TT105: data that is not finite when it comes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, count_text, plain_op
from tensortrace.records import Call, Severity, Tensor
from tensortrace.text import location_text

# Ops that only bring data in: what they return counts as data.
_SOURCES = frozenset(("tensor", "astensor", "asarray", "fromnumpy", "frombuffer", "load"))


@check("TT105", "nonfinite-input", severity="error", when="gate", after=("TT104",), of=("calls",))
def nonfinite_input(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A tensor that nothing in the program made comes in with NaN or infinity.

    Symptom:    NaN loss on some batches only, before any weight has changed
    Threshold:  a floating tensor of more than one element that enters an outermost module, or an
                op outside modules, that no call of this or an earlier step made, holds NaN (error)
                or infinity (warning), and the damage reaches the loss, a gradient or the output;
                a note if it does not (missing values that are handled), or if it is -inf alone
                (a mask)
    Source:     definition of the origin rule for data; one element alone is left out because of
                `best = torch.tensor(float("inf"))`
    Fix:        find the sample: torch.isnan(x).flatten(1).any(1).nonzero(); clean it where it is
                loaded (0/0 in a normalisation, missing values, log of 0 in a spectrogram)
    Misses:     data made by operations inside the block is seen as those operations (TT101)
    Example:    frame = pandas.read_csv("train.csv")  # empty cells are NaN
                x = torch.tensor(frame.values, dtype=torch.float32)
    Fixed:      frame = pandas.read_csv("train.csv")
                x = torch.tensor(frame.fillna(frame.median()).values, dtype=torch.float32)
    """
    if memory.get("step") != step.number:
        memory.update(step=step.number, met=[])
    if step.bad and len(memory["met"]) < 8:
        memory["met"] += list(_entries(step))[: 8 - len(memory["met"])]
    if not memory["met"] or (memory["met"] and not (step.summary or step.damage())):
        return
    damage = step.damage()
    for call, name, tensor in memory["met"]:
        severity: Severity = "error" if tensor.nan else "warning"
        if damage is None or not (tensor.nan or tensor.posinf):
            severity = "note"
        by = call.op or call.module or "the model"
        message = f"{count_text(tensor)} in the data: {name} of {by}"
        if severity == "note":
            message += "; loss and gradients stay finite"
        yield Draft(
            message=message, severity=severity, follows=step.blamed(), phase="forward",
            cause=f"{name} {location_text(call.location)}", module=call.module, op=call.op,
            seq=call.seq, tensor=tensor.id, value=tensor.nonfinite, limit=0,
            location=call.location,
            evidence={"placed": "direct", "shape": tensor.shape, "reached": damage},
        )  # fmt: skip
    memory["met"] = []


def _entries(step: StepView) -> Iterator[tuple[Call, str, Tensor]]:
    """List the bad tensors that come in from outside, once each, where they are first used."""
    made: set[int] = set()
    for call in step.calls:
        if call.phase == "forward" and not (plain_op(call.op) in _SOURCES and not call.inputs):
            made.update(id for _, id in call.outputs)
    seen: set[int] = set()
    for call in step.calls[step.fresh :]:
        if call.phase != "forward" or call.parent is not None or call.recompute or call.replay:
            continue
        for name, id in call.inputs:
            if id in made or id in seen:
                continue
            seen.add(id)
            tensor = step.tensors.get(id)
            if tensor is not None and tensor.nonfinite and _is_data(tensor):
                yield call, name, tensor


def _is_data(tensor: Tensor) -> bool:
    links = (tensor.from_step, tensor.view_of, tensor.grad_of, tensor.previous)
    return (
        tensor.numel > 1
        and not tensor.requires_grad
        and tensor.dtype.startswith(("float", "bfloat", "complex"))
        and all(link is None for link in links)
    )
