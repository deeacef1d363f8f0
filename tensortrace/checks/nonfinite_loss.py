"""TT103: a loss that is not a number, or not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, finite, is_damage
from tensortrace.records import Call, ChainLink

# Calls followed back from the loss, and how many of them, from the first, a finding shows.
_LONGEST = 1000
_LINKS = 8
_COMPILED = "CompiledFunctionBackward"
_SHOW = (
    'run it once with trace(compiled="eager"): what is compiled runs as it is written, and the op '
    "is named with its line"
)


@check(
    "TT103", "nonfinite-loss", severity="error", when="gate",
    after=("TT101", "TT102", "TT104", "TT105"),
    of=("calls",),
)  # fmt: skip
def nonfinite_loss(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """The loss is NaN or infinite, and no call that was seen made it so.

    Symptom:    loss=nan or loss=inf; the optimizer step that follows spoils every parameter
    Threshold:  the value that entered `GradScaler.scale` or `backward()` is not finite, and neither
                a forward call (TT101), the parameters (TT104) nor the data (TT105) explain it
    Source:     definition; every tool read for this project stops at the same condition
    Fix:        look at the line that makes the loss: a weight or constant that is infinite, a
                division by a count that is zero; run with level="op" to see the calls inside
    Misses:     a loss that is very large but finite is the business of the series checks; a later
                bad loss in a step of which no call is known is told when that step ends
    Example:    pos_weight = (y_train == 0).sum() / (y_train == 1).sum()  # no positive: inf
                loss = F.binary_cross_entropy_with_logits(logits, y, pos_weight=pos_weight)
    Fixed:      pos_weight = (y_train == 0).sum() / (y_train == 1).sum().clamp_min(1)
                loss = F.binary_cross_entropy_with_logits(logits, y, pos_weight=pos_weight)
    """
    if memory.get("step") != step.number:
        memory.update(step=step.number, seen=-1)
    again = _known(step)
    for action in step.actions:
        if action.action != "loss" or action.seq <= memory["seen"]:
            continue
        value = action.detail.get("value")
        if not finite(value) and again is not None and step.summary is None:
            return  # the step line will say whether it is the same again
        memory["seen"] = action.seq
        if finite(value):
            continue
        trail = _trail(step, action.tensor)
        first = trail[-1] if trail else None
        by = f"; the trail ends at {first.op or first.module or 'the model'}" if first else ""
        given = step.nonfinite(first.inputs) if first else []
        compiled = any(tensor.grad_fn == _COMPILED for tensor in given)
        by += ", which got it from what torch.compile made" if compiled else ""
        yield Draft(
            message=f"the loss is {value} and no finite values were seen to turn so{by}",
            cause=f"{action.location.file}:{action.location.line}" if action.location else "loss",
            follows=step.blamed() or again, phase="forward", module=first.module if first else None,
            op=first.op if first else None, seq=action.seq, tensor=action.tensor, value=value,
            location=(first.location if first else None) or action.location,
            evidence={"placed": "direct" if first else "loss"},
            chain=tuple(ChainLink(c.seq, c.outputs[0][1], c.op or c.module, c.location)
                        for c in trail[: -_LINKS - 1 : -1]),
            fix=_SHOW if compiled else None,
        )  # fmt: skip


def _known(step: StepView) -> str | None:
    """The finding that a bad loss follows from, in a step of which no call is known.

    A log has the calls of steps with a new finding; of the others its step line says what they
    repeat. Until that is read any damage so far may be it, and so it stays without a gate before
    the line, which alone would have counted.
    """
    if step.calls or step.poisoned:
        return None
    damage = [f.id for f in step.findings if is_damage(f)]
    last = damage[-1] if damage else None
    gated = step.optimizers or any(a.action in ("gate", "exception") for a in step.actions)
    if step.summary is None or not gated:
        return last
    repeats = [id for id in step.summary.repeats if id.startswith("TT1")]
    return next((id for id in repeats if id in damage), last if repeats else None)


def _trail(step: StepView, tensor: int | None) -> list[Call]:
    """Follow bad tensors back from the loss to a call with clean inputs, or that nobody made."""
    makers: dict[int, list[Call]] = {}
    for call in step.calls:
        if call.phase == "forward":
            for _, id in call.outputs:
                makers.setdefault(id, []).append(call)
    trail: list[Call] = []
    while tensor is not None and len(trail) < _LONGEST:
        before = trail[-1].seq if trail else None
        made = [c for c in makers.get(tensor, ()) if before is None or c.seq < before]
        if not made:
            known = step.tensors.get(tensor)
            tensor = known.view_of if known is not None else None
            continue
        trail.append(made[-1])
        behind = step.nonfinite(made[-1].inputs)
        tensor = behind[0].id if behind else None
    return trail
