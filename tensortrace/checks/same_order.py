"""TT615: each epoch in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action, Optimizer
from tensortrace.text import location_text


@dataclass(slots=True)
class _Loop:
    """One loop over a loader: the optimizers that step in this epoch of it and in the one before.

    `again` says that this epoch has the order of the one before, `running` counts such epochs in
    which an optimizer goes on stepping that stepped in the one before.
    """

    stepped: set[int] = field(default_factory=set)
    before: set[int] = field(default_factory=set)
    again: bool = False
    counted: bool = False
    running: int = 0


@check("TT615", "same-order-again", of=("loader", "fetch"))
def same_order_again(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """A loader that shuffles gives each epoch in the same order.

    Symptom:    the loss goes through the same ups and downs in every epoch; validation is worse
                than it could be; where the seed is set anew, dropout drops the same units, too
    Threshold:  in `sustain` epochs running a sampler begins in the same state of its random
                generator, or a DistributedSampler in the same epoch, while an optimizer goes on
                stepping
    Source:     torch.utils.data.distributed.DistributedSampler: without set_epoch "the same
                ordering will be always used"; the state decides what is drawn; `sustain` chosen
                here, as a search for a learning rate may come first
    Fix:        sampler.set_epoch(epoch) at the beginning of each epoch; set seeds once, before the
                first
    Misses:     samplers of your own, and those that are made anew in each epoch; batch samplers;
                iter() and next() on different lines
    Example:    for epoch in range(10):
                    for x, y in DataLoader(data, sampler=distributed_sampler):
                        train(x, y)
    Fixed:      for epoch in range(10):
                    distributed_sampler.set_epoch(epoch)
                    for x, y in DataLoader(data, sampler=distributed_sampler):
                        train(x, y)
    """
    if step.summary is None:
        return
    loops: dict[str, _Loop] = memory.setdefault("loops", {})
    begun: dict[str, Action] = memory.setdefault("begun", {})
    for record in step.happened():
        if isinstance(record, Optimizer):
            # Of several loops, one inside another, that which gave the last batch.
            loop = loops.get(memory.get("fetched", ""))
            if loop and not record.skipped and _steps(loop, record.index, sustain):
                yield _draft(begun[memory["fetched"]], loop, sustain)
        elif record.action == "fetch":
            memory["fetched"] = location_text(record.location)
        elif record.action == "loader":
            place = location_text(record.location)
            begun[place] = record
            _begins(loops.setdefault(place, _Loop()), record)


def _begins(loop: _Loop, loader: Action) -> None:
    if not loop.counted:
        loop.running = 0
    loop.before, loop.stepped = loop.stepped, set()
    # Of a single batch the order does not matter.
    several = loader.detail.get("batches") != 1
    loop.again, loop.counted = several and loader.detail.get("same_order", 1) > 1, False


def _steps(loop: _Loop, optimizer: int, sustain: int) -> bool:
    """Take in a step of an optimizer; whether it is the first of an epoch that is one too many."""
    loop.stepped.add(optimizer)
    if not loop.again or loop.counted or optimizer not in loop.before:
        return False
    loop.counted = True
    loop.running += 1
    return loop.running + 1 >= sustain


def _draft(begun: Action, loop: _Loop, sustain: int) -> Draft:
    epochs = loop.running + 1
    sampler = begun.detail.get("sampler", "sampler")
    if sampler == "DistributedSampler":
        why = "set_epoch of its DistributedSampler is not called in between"
        fix = "sampler.set_epoch(epoch) at the beginning of each epoch"
    else:
        why = f"the generator that its {sampler} draws from is in the same state each time"
        fix = "set seeds once, before the first epoch, or another seed for each"
    return Draft(
        message=f"{epochs} epochs running (limit {sustain}) {begun.of} comes in the same order: "
        f"{why}",
        cause=location_text(begun.location), value=epochs, limit=sustain, location=begun.location,
        evidence={"placed": "direct", "sampler": sampler, "epochs": epochs}, fix=fix,
    )  # fmt: skip
