"""Optimizers of which only zero_grad is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView
from tensortrace.records import Action, Optimizer
from tensortrace.text import location_text

# So many batches are known again; 100 backwards are told of whatever they were on.
_MOST_BATCHES = 100


@dataclass(slots=True)
class _Unused:
    """How many backwards an optimizer has cleared the gradients of; the last that it has not.

    It `holds` parameters of these names.

    Before `scheduled` of them running something had set another learning rate; `repeated` of them
    running gave a loss and gradients that one before had given, as the last did if `again`.
    `epoch` is where that of its batch began; `passes` are those of each sampler that shuffles.
    """

    cleared: int = 0
    scheduled: int = 0
    repeated: int = 0
    rates: Any = None
    backward: Action | None = None
    again: bool = False
    epoch: Action | None = None
    passes: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    holds: frozenset[str] = frozenset()

    def passed(self, times: int) -> bool:
        """Whether a sampler has begun so many epochs."""
        return any(len(epochs) >= times for epochs in self.passes.values())


def never_stepped(
    step: StepView, memory: dict[str, Any], unused_most: int, idle_most: int, passes: int
) -> Iterator[Draft]:
    """Tell of an optimizer of which only zero_grad is called.

    Args:
        unused_most: backwards that may be cleared so.
        idle_most: those that may be at a learning rate that changes each time, which is meant
            for steps, or on the same batches again: gradients of many tasks or samples are taken
            at one rate, and one of each.
        passes: epochs of one sampler that say so, too.
    """
    stepped: set[int] = memory.setdefault("stepped", set())
    unused: dict[int, _Unused] = memory.setdefault("unused", {})
    # A comprehension fetches in a function of its own, on the same line.
    began: dict[str, Action] = memory.setdefault("began", {})
    again = bool(unused or not stepped) and _is_repeated(step, memory)
    epoch: Action | None = None
    for record in step.happened():
        if isinstance(record, Optimizer):
            stepped.add(record.index)
            unused.pop(record.index, None)
        elif record.action == "loader":
            began[location_text(record.location)] = record
        elif record.action == "fetch":
            epoch = began.get(location_text(record.location))
        elif record.action == "loss":
            for seen in unused.values():
                seen.backward, seen.again, seen.epoch = record, again, epoch
        elif record.action == "zero_grad" and record.optimizer not in stepped:
            index = record.optimizer
            if index is None:
                continue
            seen = unused.setdefault(index, _Unused())
            seen.holds |= frozenset(record.detail.get("held", ()))
            loss, seen.backward = seen.backward, None
            if loss is None:
                continue
            _count(seen, record)
            scheduled = seen.scheduled >= idle_most
            again_and_again = seen.repeated >= idle_most or seen.passed(passes)
            soon = scheduled or (again_and_again and not stepped)
            most = idle_most if soon else unused_most
            if seen.cleared >= most and any(map(step.trains, step.modules)):
                yield Draft(
                    message=f"optimizer {index}, {record.of}, has cleared the gradients of "
                    f"{seen.cleared} backwards (limit {most}) and has never stepped: its "
                    "parameters are what they were",
                    severity=None if scheduled or seen.cleared >= unused_most else "note",
                    cause=f"unused {index}", phase="optimizer", value=seen.cleared, limit=most,
                    location=loss.location, explanation="gradients alone move nothing",
                    fix="call optimizer.step() after backward()", evidence={"optimizer": index},
                )  # fmt: skip


def held_unstepped(memory: dict[str, Any]) -> frozenset[str]:
    """The names of the parameters that optimizers hold which have never stepped."""
    return frozenset().union(*(seen.holds for seen in memory["unused"].values()))


def _count(seen: _Unused, zero_grad: Action) -> None:
    """Take in that an optimizer which has never stepped clears the gradients of a backward."""
    still, rates, before = zero_grad.detail.get("still"), zero_grad.detail.get("lr"), seen.rates
    seen.rates = rates
    seen.cleared = seen.cleared + 1 if still else 0
    seen.repeated = seen.repeated + 1 if still and seen.again else 0
    changed = None not in (rates, before) and rates != before
    seen.scheduled = seen.scheduled + 1 if changed else 0
    if not still:
        seen.passes.clear()
    sampler = seen.epoch.detail.get("sampler_index") if seen.epoch is not None else None
    if seen.epoch is not None and sampler is not None:
        seen.passes.setdefault(sampler, set()).add((seen.epoch.step, seen.epoch.seq))


def _is_repeated(step: StepView, memory: dict[str, Any]) -> bool:
    """Whether the only backward of a step gave the loss and the gradients of one before.

    A model that starts at zero gives the same for all inputs.
    """
    if step.summary is None or len(step.losses) != 1:
        return False
    loss, columns = step.losses[0].detail.get("value"), step.summary.modules
    if loss is None or not any(columns.param_grad_rms) or not any(columns.output_rms):
        return False
    before: set[Any] = memory.setdefault("before", set())
    now = (loss, *columns.output_rms, *columns.param_grad_rms)
    repeated = now in before
    if len(before) < _MOST_BATCHES:
        before.add(now)
    return repeated
