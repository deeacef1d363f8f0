"""TT103: a loss that is not a number, or not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, finite
from tensortrace.records import ChainLink


@check(
    "TT103", "nonfinite-loss", severity="error", when="gate",
    after=("TT101", "TT102", "TT104", "TT105"),
)  # fmt: skip
def nonfinite_loss(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """The loss is NaN or infinite, and no call that was seen made it so.

    Symptom:    loss=nan or loss=inf; the optimizer step that follows spoils every parameter
    Threshold:  the value that entered `GradScaler.scale` or `backward()` is not finite, and neither
                a forward call (TT101), the parameters (TT104) nor the data (TT105) explain it
    Source:     definition; every tool read for this project stops at the same condition
    Fix:        look at the line that makes the loss: a weight or constant that is infinite, a
                division by a count that is zero; run with level="op" to see the calls inside
    Misses:     a loss that is very large but finite is the business of the series checks
    """
    if memory.get("step") != step.number:
        memory.update(step=step.number, seen=-1)
    for action in step.actions:
        if action.action != "loss" or action.seq <= memory["seen"]:
            continue
        memory["seen"] = action.seq
        value = action.detail.get("value")
        if finite(value):
            continue
        maker = next((c for c in reversed(step.calls) if c.phase == "forward" and action.tensor
                      in {id for _, id in c.outputs}), None)  # fmt: skip
        by = f", made by {maker.op or maker.module or 'the model'}" if maker else ""
        yield Draft(
            message=f"the loss is {value}{by}; nothing that was seen before it explains that",
            cause=f"{action.location.file}:{action.location.line}" if action.location else "loss",
            follows=step.blamed(), phase="forward", module=maker.module if maker else None,
            op=maker.op if maker else None, seq=action.seq, tensor=action.tensor, value=value,
            location=(maker.location if maker else None) or action.location,
            evidence={"placed": "direct" if maker else "loss"},
            chain=(ChainLink(maker.seq, action.tensor, maker.op or maker.module, maker.location),)
            if maker else (),
        )  # fmt: skip
