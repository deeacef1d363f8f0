"""TT104: a parameter or an update that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, count_text, finite
from tensortrace.records import Finding, Optimizer, Param, Scalar
from tensortrace.text import number_text

_FINITE = "weights and gradients were finite"
_UNMEASURED = "the gradient was not measured where the optimizer took it, and may have been bad"
_UPDATE = (
    "the update itself divides by zero or overflows (a second moment or a norm of 0 without eps, "
    "an eps that is 0 in float16)"
)
_SCHEDULE = (
    "look at what sets the {} in this step: past its end a polynomial schedule takes a fractional "
    "power of a negative number (max(0.0, 1 - step / total) ** 0.9 does not), a warm-up over 0 "
    "steps divides by 0"
)


@check("TT104", "nonfinite-parameter", severity="error", when="gate", of=("calls",))
def nonfinite_parameter(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A parameter holds NaN or infinity, or the optimizer has just written one.

    Symptom:    the outputs of a module are NaN for every input, from one step to the next
    Threshold:  any NaN or infinite element in a parameter before the optimizer step, or an update
                whose norm is not finite although the gradient was; -inf alone is a note (a learned
                mask). Counted under the earlier finding where one explains it
    Source:     definition; an update can be NaN by itself (eps=0 and a zero second moment in Adam)
    Fix:        load the weights of a step before this one; if the checkpoint itself is bad, go back
                further; for an update: the learning rate (a schedule past its end), eps of the
                optimizer, weight decay in float16
    Misses:     optimizer state is seen through the update only; a parameter without a gradient is
                seen through what its module makes (TT101)
    Example:    optimizer = torch.optim.Adam(model.half().parameters())  # eps 1e-8 is 0 in f16
                loss = F.mse_loss(model(x.half()), y.half())
    Fixed:      optimizer = torch.optim.Adam(model.parameters())
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.mse_loss(model(x), y)
    """
    if memory.get("step") != step.number:
        memory.update(step=step.number, seen=-1, poisoned=step.poisoned)
    bad: list[tuple[Param, str, Scalar | None, bool]] = []
    for param in step.params:
        if param.seq <= memory["seen"]:
            continue
        memory["seen"] = param.seq
        value, grad = param.value, param.grad
        if value.nonfinite:
            mask = not (value.nan or value.posinf)
            bad.append(
                (param, f"holds {count_text(value)} before this step", value.nonfinite, mask)
            )
        elif not finite(param.update_norm) and not step.had_bad_gradient(param):
            # With a bad gradient it is the gradient's finding (TT102) that says it all.
            what = "was written NaN or infinity by this optimizer step"
            if grad is not None and grad.unmeasured is None:
                what += ", its gradient is finite"
            bad.append((param, what, param.update_norm, False))
    if not bad:
        return
    bad.sort(key=lambda one: one[3])
    param, what, number, mask = bad[0]
    others = len(bad) - 1
    more = f", and {others} more parameter{'s' * (others > 1)}" if others else ""
    # Bad before anything else was: then what forward shows follows from this, although the weights
    # are known only after the gate that showed it.
    earlier = any(f.code < "TT2" and f.severity != "note" and f.step < step.number
                  for f in step.findings)  # fmt: skip
    first = bool(param.value.nonfinite) and not memory["poisoned"] and not earlier
    # A replay may have come to the same weights at the gate before.
    names = {p.name for p, *_ in bad}
    told = next((f.id for f in step.causes if f.code == "TT101" and f.param in names), None)
    follows = told or (None if first or mask else step.blamed())
    by = _writer(step, param)
    # Of an update the line of the optimizer's step is the place, of weights that were bad no line.
    wrote = None if param.value.nonfinite else step.step_of(param)
    at = by.location if by else wrote.location if wrote else None
    why, fix = (by.explanation, by.fix) if by else (None, None)
    if not param.value.nonfinite:
        why, fix = _update_reason(wrote, _gradient_is_known(step, param, wrote))
    more += f"; written at the end of step {by.step}, where {by.op} made them" if by else ""
    yield Draft(
        message=f"{param.name} {what}{more}", severity="note" if mask else "error",
        follows=follows, cause="mask" if mask else "parameters",
        location=at, explanation=why, fix=fix,
        phase="optimizer", module=param.module, param=param.name, seq=param.seq,
        tensor=param.value.id, value=number, limit=0,
        evidence={"placed": "direct", "parameters": [p.name for p, *_ in bad[:20]]},
    )  # fmt: skip


def _gradient_is_known(step: StepView, param: Param, optimizer: Optimizer | None) -> bool:
    """Whether a gradient that was not bad is known to be finite: measured, or clipped by a norm."""
    if param.grad is None or param.grad.unmeasured is None:
        return True
    return optimizer is not None and step.norm_of(optimizer) is not None


def _update_reason(optimizer: Optimizer | None, known: bool) -> tuple[str, str | None]:
    """Say why an update is not finite, and what to do: a number of its schedules may not be.

    Args:
        optimizer: whose step it was.
        known: whether the gradients that it took are known to be finite.
    """
    numbers = {f"{i}.learning rate": rate for i, rate in enumerate(optimizer.lr)
               } if optimizer else {}  # fmt: skip
    numbers.update(optimizer.stray if optimizer else {})
    spoilt = next((key for key, number in numbers.items() if not finite(number)), None)
    if optimizer is None or spoilt is None:
        return f"{_FINITE}: {_UPDATE}" if known else f"{_UNMEASURED}; or {_UPDATE}", None
    group, _, name = spoilt.partition(".")
    name = name.replace("_", " ")
    of = f" of group {group}" if len(optimizer.lr) > 1 else ""
    is_ = "hold" if name == "betas" else "is"
    told = f"the {name}{of} {is_} {number_text(numbers[spoilt])}"
    return f"{_FINITE}, but {told}" if known else told, _SCHEDULE.format(name)


def _writer(step: StepView, param: Param) -> Finding | None:
    """Find the note of the step before about what was written in place to such a parameter."""
    if not param.value.nonfinite:
        return None
    notes = (f for f in step.findings if f.code == "TT101" and f.step == step.number - 1)
    shape = list(param.value.shape or ())
    return next((f for f in notes if shape in f.evidence.get("wrote", [])), None)
