"""TT409: an optimizer steps and nothing at all is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Optimizer

# They skip a parameter without a gradient, so such a step does nothing.
_TORCH = frozenset({
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam",
    "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
})  # fmt: skip


@check("TT409", "nothing-trainable", severity="error")
def nothing_trainable(
    step: StepView, memory: dict[str, Any], *, sustain: int = 4, idle: int = 8
) -> Iterator[Draft]:
    """An optimizer steps again and again and none of its parameters has a gradient.

    Symptom:    the loss stays what it was but for the noise of the batches; no error is raised
    Threshold:  in `sustain` steps running of an optimizer of torch.optim all parameters that it
                holds have the gradient None, and in these training steps no module that ran has a
                gradient of its own parameters. An error: torch.optim skips a parameter without a
                gradient, so these steps did nothing. A warning if other modules have gradients,
                but this optimizer met none in its first `idle` steps (a generator behind detach())
    Source:     definition; torch.optim.Optimizer.zero_grad on None: "in one case it does the step
                with a gradient of 0 and in the other it skips the step altogether"; `sustain` as
                in TT401
    Fix:        call loss.backward(); look for detach() and no_grad between the parameters and the
                loss; do not make the loss anew with torch.tensor(loss) or .item(), nor set
                requires_grad on it; set requires_grad_(True) on what is to be trained, after the
                rest is frozen
    Misses:     other optimizers, as some work without gradients; gradients that are there and 0
                (TT203); a loss that needs no gradient at all raises in backward (TT801)
    Example:    loss = torch.tensor(criterion(model(x), y).item(), requires_grad=True)
                loss.backward()
                optimizer.step()
    Fixed:      loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
    """
    held: dict[int, int] = memory.setdefault("held", {})
    running: dict[int, int] = memory.setdefault("running", {})
    for optimizer in step.taken if "holds" in step.has else ():
        if optimizer.parameters is not None:
            held[optimizer.index] = len(optimizer.parameters)
    if step.summary is None:
        return
    if step.losses:
        memory["backward"] = True
    rms = step.summary.modules.param_grad_rms
    elsewhere = rms.count(None) < len(rms)
    if elsewhere:
        running.clear()
    # Steps from the first on, None once the optimizer has met a gradient.
    idling: dict[int, int | None] = memory.setdefault("idling", {})
    for optimizer in step.taken:
        index = optimizer.index
        count = held.get(index, 0)
        without = 0 < count == optimizer.no_grad and optimizer.cls in _TORCH
        before = idling.get(index, 0)
        idling[index] = before + 1 if without and before is not None else None
        if not elsewhere:
            running[index] = running.get(index, 0) + 1 if without else 0
            if running[index] >= sustain:
                yield _draft(step, optimizer, running[index], sustain, "backward" in memory)
        elif before is not None and before + 1 == idle and without:
            # Gradients that are wiped (TT207), parameters that were replaced (TT405): told already.
            told = (f.id for f in step.findings if f.code in ("TT207", "TT405")
                    and f.evidence["optimizer"] == index)  # fmt: skip
            yield _behind_detach(optimizer, idle, next(told, None))


def _behind_detach(optimizer: Optimizer, idle: int, told: str | None) -> Draft:
    return Draft(
        message=f"none of the {optimizer.no_grad} parameters of optimizer {optimizer.index}, "
        f"{optimizer.cls}, had a gradient in its first {idle} steps, though other modules have: "
        "its steps do nothing",
        severity="warning", cause=f"optimizer {optimizer.index}", phase="optimizer", value=idle,
        limit=idle, location=optimizer.location, evidence={"optimizer": optimizer.index},
        follows=told,
    )  # fmt: skip


def _draft(
    step: StepView, optimizer: Optimizer, running: int, sustain: int, backward: bool
) -> Draft:
    declared = [p for module in step.modules.values() for p in module.parameters]
    if declared and not any(p.requires_grad for p in declared):
        why = f"all {len(declared)} parameters of the modules that ran have requires_grad=False"
    elif backward:
        why = "the losses that backward() began at do not depend on them"
    else:
        why = "backward() was never called"
    return Draft(
        message=f"none of the {optimizer.no_grad} parameters of optimizer {optimizer.index}, "
        f"{optimizer.cls}, has a gradient in {running} steps running (limit {sustain}): {why}",
        cause=f"optimizer {optimizer.index}", phase="optimizer", value=running, limit=sustain,
        location=optimizer.location, evidence={"optimizer": optimizer.index},
    )  # fmt: skip
