"""TT207: gradients that are cleared after backward and before the optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensortrace.checks import Draft, StepView, check, clears
from tensortrace.records import Location, Optimizer


@dataclass(slots=True)
class Cycle:
    """What happened since the last step of one optimizer, and how many parameters it holds."""

    held: int = 0
    backward: bool = False
    wiped: bool = False
    wiper: Location | None = None
    running: int = 0


@check("TT207", "gradients-wiped", severity="error", until=("threads",))
def gradients_wiped(step: StepView, memory: dict[str, Any], *, sustain: int = 3) -> Iterator[Draft]:
    """zero_grad runs between backward and the optimizer step, which then finds no gradient.

    Symptom:    the loss does not move at all, and nothing is raised
    Threshold:  in `sustain` steps running of an optimizer, the last that happened before the step
                was a backward, then a zero_grad of this optimizer or of a module; and the step
                found every gradient None or exactly 0. An error, since such a step cannot learn
    Source:     definition; `sustain` chosen here, so that one odd step (to please a scheduler, say)
                says nothing
    Fix:        the order is optimizer.zero_grad(), loss.backward(), optimizer.step()
    Misses:     gradients cleared by hand (p.grad = None) at that place; a zero_grad that leaves
                some of the gradients
    Example:    loss.backward()
                optimizer.zero_grad()
                optimizer.step()
    Fixed:      optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    """
    cycles: dict[int, Cycle] = memory.setdefault("cycles", {})
    for record in step.happened():
        if isinstance(record, Optimizer):
            cycle = cycles.get(record.index)
            if cycle is None:
                cycle = cycles[record.index] = Cycle()
            if record.parameters is not None:
                cycle.held = len(record.parameters)
            if not record.skipped:
                nothing = record.no_grad == cycle.held or record.grad_norm == 0
                cycle.running = cycle.running + 1 if cycle.wiped and nothing else 0
                if cycle.running >= sustain:
                    yield _draft(record, cycle, sustain)
            cycle.backward = cycle.wiped = False
        elif record.action == "loss":
            for cycle in cycles.values():
                cycle.backward, cycle.wiped = True, False
        elif record.action == "zero_grad":
            for index, cycle in cycles.items():
                if clears(record, index) and cycle.backward:
                    cycle.wiped, cycle.wiper = True, record.location


def _draft(record: Optimizer, cycle: Cycle, sustain: int) -> Draft:
    return Draft(
        message=f"optimizer {record.index}, {record.cls}, found all {cycle.held} gradients None or "
        f"0 in {cycle.running} steps running (limit {sustain}): zero_grad ran after backward and "
        "before step",
        cause=f"optimizer {record.index}", phase="optimizer", value=cycle.running, limit=sustain,
        location=cycle.wiper, evidence={"optimizer": record.index, "parameters": cycle.held},
    )  # fmt: skip
