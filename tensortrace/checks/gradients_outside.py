"""TT208: gradients of parameters that no optimizer holds, which grow without end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action, Location, from_scalar


@check(
    "TT208",
    "gradients-outside-optimizer",
    severity="note",
    of=("zero_grad.grown", "clip.outside", "loss.left_updates"),
)
def gradients_outside(
    step: StepView, memory: dict[str, Any], *, sustain: int = 4, alone: int = 20
) -> Iterator[Draft]:
    """optimizer.zero_grad leaves the gradients of parameters outside it, and they add up.

    Symptom:    clipping shrinks the step more and more, as the norm counts gradients that never go
                away; a part that is unfrozen later starts with one huge step
    Threshold:  over `sustain` calls of an optimizer's zero_grad running, the gradient of parameters
                that no optimizer holds was added to and not cleared. A note, since it may only cost
                time and memory; a warning if gradients are clipped together with them. Or: over
                `alone` optimizer steps that of an nn.Parameter which no module that ran holds
                either has only grown, while its value was not written
    Source:     torch.optim.Optimizer.zero_grad clears what the optimizer holds; `sustain` chosen
                here: both optimizers of a GAN have stepped by then; `alone` too: one that steps in
                every tenth step only has
    Fix:        for p in frozen.parameters(): p.requires_grad_(False); or model.zero_grad(); clip
                what the optimizer holds, not model.parameters(); give an optimizer what is to be
                learnt, the temperature of a soft actor-critic too
    Misses:     looked for at the zero_grad of steps that are written in full, and at their losses;
                the first such parameter stands for all; what is no nn.Parameter, as an input that
                requires a gradient may keep it; an optimizer that first steps later than that
    Example:    optimizer = torch.optim.AdamW(model.head.parameters())  # the body is not trained
                for x, y in loader:
                    optimizer.zero_grad()
                    criterion(model(x), y).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
    Fixed:      model.body.requires_grad_(False)
                optimizer = torch.optim.AdamW(model.head.parameters())
                for x, y in loader:
                    optimizer.zero_grad()
                    criterion(model(x), y).backward()
                    nn.utils.clip_grad_norm_(model.head.parameters(), 1.0)
                    optimizer.step()
    """
    for action in step.actions:
        if action.action == "zero_grad" and action.detail.get("grown", 0) >= sustain:
            yield _draft(action, memory.get("clipped"), sustain)
        elif action.action == "clip" and action.detail.get("outside"):
            memory["clipped"] = action.location
        elif action.action == "loss" and action.detail.get("left_updates", 0) >= alone:
            yield from _lone(action, alone)


def _draft(zero_grad: Action, clipped: Location | None, sustain: int) -> Draft:
    grown = zero_grad.detail["grown"]
    names = zero_grad.detail.get("left_names", ["(not known)"])
    left = zero_grad.detail.get("left", len(names))
    more = ", ..." if left > len(names) else ""
    whose = ("1 parameter that no optimizer holds keeps its gradient" if left == 1
             else f"{left} parameters that no optimizer holds keep their gradients")  # fmt: skip
    together = f", and clipping counts {'it' if left == 1 else 'them'}" if clipped else ""
    return Draft(
        message=f"{whose}, added to over {grown} calls of zero_grad running (limit {sustain})"
        f"{together}: {', '.join(names)}{more}",
        cause="left", severity="warning" if clipped else "note", phase="backward",
        module=names[0].rpartition(".")[0], param=names[0], value=grown, limit=sustain,
        location=clipped or zero_grad.location, evidence={"parameters": names, "left": left},
    )  # fmt: skip


def _lone(loss: Action, limit: int) -> Iterator[Draft]:
    # Zero: it was cleared by hand, and its value may be written by way of .data, which none sees.
    if from_scalar(loss.detail.get("left_absmax")) == 0:
        return
    updates, left = loss.detail["left_updates"], loss.detail.get("left", 1)
    shape = f"of shape {loss.detail.get('left_shape', '(not known)')}"
    what = (f"a parameter {shape} keeps its gradient" if left == 1
            else f"{left} parameters, one {shape}, keep their gradients")  # fmt: skip
    yield Draft(
        message=f"{what}, added to over {updates} optimizer steps (limit {limit}): no optimizer "
        "holds it, and no module that ran",
        cause="alone", phase="backward", value=updates, limit=limit, location=loss.location,
        fix="give it to an optimizer if it is to be learnt, else requires_grad_(False)",
        evidence={"left": left, "shape": loss.detail.get("left_shape")},
    )  # fmt: skip
