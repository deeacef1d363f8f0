"""TT206: gradients that are carried over from one optimizer step to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check, clears
from tensortrace.records import Action, ChainLink, Location, Optimizer


@dataclass(slots=True)
class Cycle:
    """What happened since the last step of one optimizer; `carried` is None before a backward.

    `held` are the names of what it holds, of which the first stands for all.
    """

    carried: bool | None = None
    running: int = 0
    ever_cleared: bool = False
    backward: Location | None = None
    held: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ByHand:
    """How often running a loop has moved its weights, and not cleared their gradients."""

    running: int = 0
    ever_cleared: bool = False


@check("TT206", "zero-grad-forgotten", severity="error")
def zero_grad_forgotten(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """The gradient of the last optimizer step is still there when the next backward adds to it.

    Symptom:    the loss falls at first, then oscillates or climbs; the gradient norm grows step by
                step, as if the momentum were 1
    Threshold:  in `sustain` steps running of an optimizer, its gradient lay untouched since the
                step before when backward began, and no zero_grad, of it or of a module, came
                before the step; an error if nothing has cleared it since its first step, else a
                warning. A warning, too, if so many turns running a loop without an optimizer has
                moved a weight and left its gradient as it was
    Source:     definition: backward adds to .grad (torch.autograd.backward, "accumulates gradients
                in the leaves"). That it lay untouched is seen by identity and version, so clearing
                by hand counts; `sustain` chosen here
    Fix:        optimizer.zero_grad() after optimizer.step(), or before backward()
    Misses:     one gradient stands for all that an optimizer holds, so clearing a part of them is
                not seen; a loop that means to sum gradients up over its steps is reported; of
                weights that are moved by hand only those near the loss, and on the CPU, are seen
    Example:    for x, y in loader:
                    loss = criterion(model(x), y)
                    loss.backward()
                    optimizer.step()
    Fixed:      for x, y in loader:
                    optimizer.zero_grad()
                    loss = criterion(model(x), y)
                    loss.backward()
                    optimizer.step()
    """
    cycles: dict[int, Cycle] = memory.setdefault("cycles", {})
    for record in step.happened():
        if isinstance(record, Optimizer):
            cycle = cycles.get(record.index)
            if cycle is None:
                cycle = cycles[record.index] = Cycle()
            cycle.held = record.parameters or cycle.held
            if not record.skipped:
                # Gradients that were put there by hand are not added to.
                added = cycle.carried and record.added is not False
                cycle.running = cycle.running + 1 if added else 0
                if cycle.running >= sustain:
                    yield _draft(record, cycle, sustain)
            cycle.carried = None
        elif record.action == "loss":
            for index, cycle in cycles.items():
                _backward_begins(record, index, cycle)
            if record.detail.get("by_hand") is not None:
                yield from _by_hand(record, memory.setdefault("by hand", ByHand()), sustain)
        elif record.action == "zero_grad":
            for index, cycle in cycles.items():
                if clears(record, index):
                    cycle.carried, cycle.ever_cleared = False, True


def _backward_begins(loss: Action, index: int, cycle: Cycle) -> None:
    fates = loss.detail.get("gradients")
    fate = fates.get(str(index)) if fates else None
    if fate == "kept":  # the last of a cycle is what adds to it: no backward before it has
        cycle.backward = loss.location
    if cycle.carried is None:
        cycle.carried = fate == "kept"
        cycle.ever_cleared = cycle.ever_cleared or fate != "kept"
    elif fate is None:
        cycle.carried, cycle.ever_cleared = False, True


def _by_hand(loss: Action, seen: ByHand, sustain: int) -> Iterator[Draft]:
    """Tell of a loop that moves its weights itself."""
    moved = loss.detail["by_hand"]
    seen.running = 0 if moved["cleared"] else seen.running + 1
    seen.ever_cleared = seen.ever_cleared or moved["cleared"]
    if seen.running < sustain:
        return
    shape = tuple(moved["shape"])
    name = moved["name"] or f"a weight of shape {shape}"
    yield Draft(
        message=f"backward added to the gradient of the turn before in {seen.running} turns "
        f"running (limit {sustain}): the loop moves {name} and nothing clears its gradient in "
        "between",
        cause="by hand", phase="backward", value=seen.running, limit=sustain,
        # Nobody knows whether it is the gradient that moves it.
        severity="warning", param=moved["name"], location=loss.location,
        evidence={"shape": shape, "ever_cleared": seen.ever_cleared},
        fix="w.grad = None, or w.grad.zero_(), after each update",
    )  # fmt: skip


def _draft(record: Optimizer, cycle: Cycle, sustain: int) -> Draft:
    return Draft(
        message=f"backward added to the gradients of the step before in {cycle.running} steps "
        f"running of optimizer {record.index}, {record.cls} (limit {sustain}): nothing cleared "
        f"{_of(cycle.held)} in between",
        cause=f"optimizer {record.index}", phase="backward",
        param=cycle.held[0] if cycle.held else None,
        chain=(ChainLink(record.seq, None, f"{record.cls}.step", record.location),),
        value=cycle.running, limit=sustain,
        severity="warning" if cycle.ever_cleared else "error", location=cycle.backward,
        evidence={"optimizer": record.index, "ever_cleared": cycle.ever_cleared},
    )  # fmt: skip


def _of(held: list[str]) -> str:
    if not held:
        return "them"
    more = f" and {len(held) - 1} others" if len(held) > 1 else ""
    return f"those of {held[0]}{more}"
