"""Whether what is not finite began beside a tensor: at ops that took nothing made of it."""

from __future__ import annotations

from collections.abc import Iterable

from tensortrace.causes.derivatives import first_bad, upstream
from tensortrace.records import Call, Tensor
from tensortrace.step_view import StepView, finite


def began_beside(step: StepView, tensor: Tensor) -> bool:
    """Whether ops spoilt the loss, or a finite loss's gradients, that took nothing of a tensor.

    A constant of +inf that excludes, or begins a running minimum, is dealt with in the program.
    False where it is not known which ops those were.
    """
    origins = _origins(step)
    if not origins:
        return False
    made = _made_of(step, tensor.id)
    # What brings it in, as torch.tensor does, has made it.
    return not any(id in made for call in origins for _, id in (*call.inputs, *call.outputs))


def _origins(step: StepView) -> list[Call]:
    """The ops that spoilt the loss; of a finite one, that whose backward spoilt a gradient."""
    bad = [a.tensor for a in step.losses if not finite(a.detail.get("value"))]
    if not bad:
        call = first_bad(step, None)
        if call is None or call.op is None or step.nonfinite(call.inputs):
            return []
        return [c for c in step.forward() if c.seq == call.forward]
    reached, lost = upstream(step, (id for id in bad if id is not None))
    if lost or None in bad:
        return []
    return [c for c in step.forward() if any(id in reached for _, id in c.outputs)
            and not any(id in reached for _, id in c.inputs)]  # fmt: skip


def _made_of(step: StepView, source: int) -> set[int]:
    """The ids of what calls made of a tensor, in place too; finite or not."""
    made = {source}
    for call in step.forward():
        if not made.isdisjoint(_behind(step, call.inputs)):
            made |= _behind(step, call.outputs)
    return made


def _behind(step: StepView, names: Iterable[tuple[str, int]]) -> set[int]:
    """Some tensors, with what they are views of or were before they were written to."""
    found = {id for _, id in names}
    for tensor in [step.tensors[id] for id in found if id in step.tensors]:
        found |= {id for id in (tensor.previous, tensor.view_of) if id is not None}
    return found
