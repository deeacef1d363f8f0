"""TT412: a state dict that holds no copies, loaded into the module that it is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action
from tensortrace.text import location_text


@dataclass(slots=True)
class _Line:
    """A line that loads: how often, with updates between, and the last update before it."""

    times: int = 0
    update: int = -1
    itself: bool = True


@check("TT412", "loaded-into-itself", of=("load_state_dict",))
def loaded_into_itself(
    step: StepView, memory: dict[str, Any], *, least: int = 1, sustain: int = 2
) -> Iterator[Draft]:
    """load_state_dict got the module's own tensors back, not copies: nothing was restored.

    Symptom:    "the best weights" score as the last ones do; a target network that is to lag
                behind never does
    Threshold:  all that was given are the tensors that the module holds by those names, and since
                state_dict() returned them an optimizer has moved the module in at least `least`
                steps, or another state was loaded into it. If neither has happened: one line has
                loaded the module from itself at `sustain` times, with updates between, and has
                loaded nothing else
    Source:     PyTorch tutorials, "Saving and Loading Models": state_dict() "returns a reference
                to the state and not its copy". `least` 1: a single step is not undone; `sustain`
                chosen here, so that a single load without effect is silent
    Fix:        best = copy.deepcopy(model.state_dict()), or torch.save it; for a target network
                target_net = copy.deepcopy(policy_net)
    Misses:     a state that was taken before the trace began or that assign=True has made the
                module's own; one whose first tensor a filter drops, or all of whose tensors it
                detaches anew; one that is loaded when its optimizer is gone; DTensors. Told in
                vain: a state that is kept over updates and then written in place, on purpose,
                before it is loaded, or written through `.data`
    Example:    for epoch in range(9):
                    train(model)
                    if (score := evaluate(model)) > best_score:
                        best_score, best = score, model.state_dict()
                model.load_state_dict(best)
    Fixed:      for epoch in range(9):
                    train(model)
                    if (score := evaluate(model)) > best_score:
                        best_score, best = score, copy.deepcopy(model.state_dict())
                model.load_state_dict(best)
    """
    lines: dict[str, _Line] = memory.setdefault("lines", {})
    for action in step.actions:
        if action.action != "load_state_dict":
            continue
        detail, place = action.detail, location_text(action.location)
        line = lines.setdefault(place, _Line())
        own = detail.get("own", 0)
        if not own or own < detail.get("matched", 0) + detail.get("unexpected", 0):
            line.itself = False
            continue
        updates = detail.get("updates")
        if updates is None:
            continue
        if updates >= least or detail.get("reloaded"):
            yield _not_restored(action, own, updates, least)
        elif updates == 0 and detail.get("optimizers"):
            line.times += action.update > line.update
            line.update = action.update
            if line.itself and line.times >= sustain:
                yield _its_own_copy(action, own, line.times, sustain)


def _not_restored(action: Action, own: int, updates: int, least: int) -> Draft:
    since = [f"an optimizer has moved them in {updates} step{'s' * (updates > 1)}"] * bool(updates)
    if action.detail.get("reloaded"):
        since.append("another state was loaded into them")
    return Draft(
        message=f"{_all_own(action, own)}, so nothing was restored: since state_dict() returned "
        f"them, {' and '.join(since)} (limit {least})",
        cause=location_text(action.location), value=updates, limit=least,
        location=action.location,
        explanation="state_dict() returns the tensors themselves, not copies: what is kept of it "
        "changes as the module does, and loading it copies each tensor onto itself",
        fix="keep a copy: best = copy.deepcopy(model.state_dict())",
        evidence={"own": own, "updates": updates},
    )  # fmt: skip


def _its_own_copy(action: Action, own: int, times: int, sustain: int) -> Draft:
    return Draft(
        message=f"{_all_own(action, own)}, so nothing was copied: this line loads it from itself, "
        f"{times} times with updates between (limit {sustain})",
        cause=location_text(action.location), value=times, limit=sustain,
        location=action.location,
        explanation="the module that is to get the weights and the one that they are taken from "
        "are one: a target network that was assigned, not copied, is never behind",
        fix="make the other module a copy: target_net = copy.deepcopy(policy_net)",
        evidence={"own": own, "times": times},
    )  # fmt: skip


def _all_own(action: Action, own: int) -> str:
    given = f"all {own} tensors" if own > 1 else "the tensor"
    are = "are those" if own > 1 else "is the one"
    return f"{given} of the state dict {are} that {action.of or 'the module'} already holds"
