"""TT615: each epoch in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action, Optimizer
from tensortrace.text import location_text

# By place, optimizer and sampler.
_Key: TypeAlias = tuple[str, int, int | None]
# Where a sampler is made anew for each epoch, so is its series.
_MOST_SERIES = 256


@dataclass(slots=True)
class _Series:
    """Epochs of one sampler in one loop in which one optimizer steps: `running` in one order.

    `epoch` is the record with which the last began.
    """

    epoch: Action
    running: int = 1


@check("TT615", "same-order-again", of=("loader", "fetch"), until=("threads",))
def same_order_again(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """A loader that shuffles gives each epoch in the same order.

    Symptom:    the loss goes through the same ups and downs in every epoch; validation is worse
                than it could be; where the seed is set anew, dropout drops the same units, too
    Threshold:  in `sustain` epochs running, of one loop in which one optimizer steps, a sampler
                begins in the same state of its random generator, or a DistributedSampler in the
                same epoch; a state dict that is loaded into what it trains begins anew
    Source:     torch.utils.data.distributed.DistributedSampler: without set_epoch "the same
                ordering will be always used"; the state decides what is drawn; `sustain` chosen
                here, as a search for a learning rate may come first
    Fix:        sampler.set_epoch(epoch) at the beginning of each epoch; set seeds once, before the
                first
    Misses:     samplers of your own, and those that are made anew in each epoch; batch samplers;
                iter() and next() on different lines; loops outside the block or the decorated
                function; a program that loads a state dict into what it trains in each epoch; a
                dataset with an attribute that is another in each. Warns of what is meant where
                trials with one seed put their weights back in place (copy_, reset_parameters),
                data change in place, or a validation comes between a forward and its backward
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
    begun: dict[str, dict[int | None, Action]] = memory.setdefault("begun", {})
    # Places where loaders began since a batch came: side by side, as zip reads them.
    beside: set[str] = memory.setdefault("beside", set())
    series: dict[_Key, _Series] = memory.setdefault("series", {})
    for record in step.happened():
        if isinstance(record, Optimizer):
            if record.anew:
                _forget(series, record.index)
            memory["updated"] = True
            # Of several loops, one inside another, that which gave the batch of the last loss.
            place = memory.get("trained") or memory.get("fetched")
            if place in begun and not record.skipped:
                read = begun[place].items()
                found = (_steps(series, (place, record.index, k), epoch) for k, epoch in read)
                yield from (_draft(one, sustain) for one in found if one and one.running >= sustain)
        elif record.action == "loss":
            memory["trained"] = memory.get("fetched")
        elif record.action == "fetch":
            if memory.pop("updated", False):
                memory.pop("trained", None)
            memory["fetched"] = location_text(record.location)
            beside.clear()
        elif record.action == "loader":
            place = location_text(record.location)
            if place not in beside:
                begun[place] = {}
            begun[place][record.detail.get("sampler_index")] = record
            beside.add(place)
        elif record.action == "load_state_dict":
            for optimizer in record.detail.get("optimizers", ()):
                _forget(series, optimizer)


def _forget(series: dict[_Key, _Series], optimizer: int) -> None:
    for key in [key for key in series if key[1] == optimizer]:
        del series[key]


def _steps(series: dict[_Key, _Series], key: _Key, epoch: Action) -> _Series | None:
    """Take in a step of an optimizer; the series if it is the first of an epoch like the last."""
    last = series.get(key)
    if last is not None and last.epoch is epoch:
        return None
    order = epoch.detail.get("order")
    # Of a single batch the order does not matter.
    if (
        last is None
        or order is None
        or order != last.epoch.detail.get("order")
        or epoch.detail.get("batches") == 1
    ):
        series[key] = _Series(epoch)
        if len(series) > _MOST_SERIES:
            del series[next(iter(series))]
        return None
    last.epoch, last.running = epoch, last.running + 1
    series[key] = series.pop(key)  # as the newest
    return last


def _draft(series: _Series, sustain: int) -> Draft:
    begun, epochs = series.epoch, series.running
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
        evidence={"placed": "direct", "sampler": sampler, "epochs": epochs,
                  "sampler_index": begun.detail.get("sampler_index")}, fix=fix,
    )  # fmt: skip
