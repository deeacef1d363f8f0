"""TT614: probabilities where a KL divergence expects their logarithms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text, shape_text

_KINDS = frozenset(("kl_div", "KLDivLoss"))
_SOFTMAX = frozenset(("softmax", "softmax_", "Softmax"))
_OPS = frozenset(("softmax", "log_softmax"))


@check("TT614", "kl-div-of-probabilities", severity="error", of=("calls",))
def kl_div_of_probabilities(
    step: StepView, memory: dict[str, Any], *, above: float = 0.01
) -> Iterator[Draft]:
    """A KL divergence gets probabilities where it takes their logarithms.

    Symptom:    a distillation loss below 0, or one that never comes near 0; the student learns
                nothing, or the teacher's classes with the wrong weights
    Threshold:  the input of kl_div, or its target with log_target=True, is what softmax returned
                (an error), or has an element more than `above` over 0, the largest logarithm of a
                probability (a warning: the logarithm of a density may be); or the input is what
                log_softmax returned, and the target what softmax or log_softmax did over another
                dim, which has another number of elements (a warning)
    Source:     torch.nn.KLDivLoss ("expects the argument input in the log-space"); `above` chosen
                here, far over what rounding makes of log_softmax
    Fix:        F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean"); with
                log_target=True the target is teacher.log_softmax(-1)
    Misses:     a loss inside a module of your own is seen as that module's call at module level;
                another dim of as many elements, and what nn.LogSoftmax or nn.Softmax returned;
                whether nn.KLDivLoss has log_target is not known, so its target is not judged
    Example:    p, q = student(x).softmax(-1), teacher(x).softmax(-1)
                loss = F.kl_div(p, q, reduction="batchmean")
    Fixed:      p, q = student(x).log_softmax(-1), teacher(x).softmax(-1)
                loss = F.kl_div(p, q, reduction="batchmean")
    """
    if step.summary is None:
        return
    losses = [c for c in step.forward() if step.kind_of(c) in _KINDS]
    if not losses:
        return
    softmaxes = {id: c for c in step.forward() if step.kind_of(c) in _SOFTMAX
                 for _, id in c.outputs}  # fmt: skip
    for call in losses:
        taken = ("input", "target") if call.arguments.get("log_target") else ("input",)
        for what, (_, id) in zip(taken, call.inputs, strict=False):
            tensor = step.tensors.get(id)
            if tensor is not None and tensor.max is not None and tensor.max > above:
                yield _draft(call, what, tensor, softmaxes.get(id))
        yield from _beside(step, call)


def _draft(call: Call, what: str, tensor: Tensor, made: Call | None) -> Draft:
    came = "comes from softmax" if made is not None else f"holds values up to {tensor.max:.3g}"
    return Draft(
        message=f"the {what} of {call.op or call.module or 'KLDivLoss'} {came}, and is taken for "
        "logarithms of probabilities, which are 0 at most",
        severity="error" if made is not None else "warning",
        cause=f"{what} {location_text(call.location)}", phase="forward", module=call.module,
        op=call.op, seq=call.seq, tensor=tensor.id, value=tensor.max, limit=0,
        location=call.location,
        evidence={"placed": "direct", "made": made.seq if made is not None else None},
    )  # fmt: skip


def _beside(step: StepView, call: Call) -> Iterator[Draft]:
    ids = [id for _, id in call.inputs[:2]]
    made = {id: c for c in step.forward() if c.op in _OPS for _, id in c.outputs}
    if len(ids) != 2 or any(id not in made or id not in step.tensors for id in ids):
        return
    shape = step.tensors[ids[0]].shape
    if made[ids[0]].op != "log_softmax" or shape != step.tensors[ids[1]].shape or not shape:
        return
    given, wanted = (_dim_of(made[id], len(shape)) for id in ids)
    if given is None or wanted is None or shape[given] == shape[wanted]:
        return
    yield Draft(
        message=f"the input of {call.op or call.module or 'KLDivLoss'} is log_softmax over dim "
        f"{given} of {shape_text(shape)}, and its target adds up to 1 over dim {wanted}",
        severity="warning", cause=f"dim {given} {location_text(call.location)}", phase="forward",
        module=made[ids[0]].module, op="log_softmax", seq=made[ids[0]].seq, tensor=ids[0],
        value=given, limit=wanted, location=made[ids[0]].location,
        fix="take log_softmax and the softmax of the target over one dim, that of the classes",
        evidence={"placed": "direct", "made": made[ids[1]].seq},
    )  # fmt: skip


def _dim_of(call: Call, dims: int) -> int | None:
    """The dim that a softmax was taken over, counted from the first; None if it is not known."""
    dim = call.arguments.get("dim")
    return dim % dims if type(dim) is int and -dims <= dim < dims else None
