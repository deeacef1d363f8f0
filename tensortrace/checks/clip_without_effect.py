"""TT205: gradient clipping that does nothing, or nothing but clip."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action, Optimizer, from_scalar
from tensortrace.text import number_text


@dataclass(slots=True)
class Cycle:
    """What happened since the last step of one optimizer; bounded by the window."""

    norms: deque[float]
    backward: bool = False
    early: Action | None = None
    in_time: bool = False
    running: int = 0


@check("TT205", "clip-without-effect", until=("threads",))
def clip_without_effect(
    step: StepView,
    memory: dict[str, Any],
    *,
    sustain: int = 3,
    window: int = 100,
    low: float = 0.5,
    high: float = 10.0,
) -> Iterator[Draft]:
    """Gradients are clipped where it has no effect, or at a value that always or never acts.

    Symptom:    the loss explodes in spite of clipping; or training crawls, as each step has the
                same length whatever the gradient
    Threshold:  a warning: in `sustain` steps running of an optimizer, its gradients were clipped
                after its last step and before the first backward, and not again before the next
                step; or in `sustain` steps running the norm of what was clipped is exactly 0, no
                optimizer holds any of it, and one steps with gradients. Notes: over `window` clips
                running every norm was above max_norm and max_norm < low * their mean, or every one
                was below it and max_norm > high * mean
    Source:     the order is that of the torch.nn.utils.clip_grad_norm_ docs: backward, clip, step;
                "values from half to ten times this average" work: Pascanu, Mikolov and Bengio 2013,
                section 3.2; `sustain` and `window` chosen here
    Fix:        clip between loss.backward() (scaler.unscale_, if there is one) and optimizer.step()
    Misses:     clipping by value leaves no norm to compare; with several optimizers a clip counts
                for the first that holds any of its parameters; max_norm=inf only measures and is
                left out
    Example:    loss.backward()
                optimizer.step()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    Fixed:      loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    """
    cycles: dict[int, Cycle] = memory.setdefault("cycles", {})
    nothing: _Nothing | None = memory.get("nothing")
    if nothing is None:
        nothing = memory["nothing"] = _Nothing()
    for record in step.happened():
        if isinstance(record, Optimizer):
            if nothing.clip is not None or nothing.running:
                yield from nothing.stepped(record, sustain)
            cycle = cycles.get(record.index)
            if cycle is None:
                cycle = cycles[record.index] = Cycle(deque(maxlen=window))
            useless = cycle.early is not None and cycle.backward and not cycle.in_time
            cycle.running = cycle.running + 1 if useless else 0
            if cycle.early is not None and cycle.running >= sustain:
                yield _misplaced(cycle.early, record, cycle.running, sustain)
            cycle.backward, cycle.in_time, cycle.early = False, False, None
        elif record.action == "loss":
            for cycle in cycles.values():
                cycle.backward = True
        elif record.action == "clip" and _limit(record) < math.inf:
            nothing.clip = record if _is_of_nothing(record) else None
            if record.optimizer not in cycles:
                continue  # its first step is still to come, or no optimizer holds what is clipped
            cycle = cycles[record.optimizer]
            if not cycle.backward:
                cycle.early = record
                continue
            cycle.in_time = True
            yield from _measure(record, cycle, low, high)


@dataclass(slots=True)
class _Nothing:
    """Clips of nothing since the last optimizer step, and steps running that had one."""

    clip: Action | None = None
    running: int = 0

    def stepped(self, record: Optimizer, sustain: int) -> Iterator[Draft]:
        """An optimizer has stepped: with gradients that no clip before it had?"""
        clip, self.clip = self.clip, None
        if clip is None or not from_scalar(record.grad_norm):
            self.running = 0
            return
        self.running += 1
        if self.running >= sustain:
            yield Draft(
                message=f"the norm of what is clipped is 0 in {self.running} steps running (limit "
                f"{sustain}), and that of the gradients of optimizer {record.index}, {record.cls}, "
                f"is {number_text(record.grad_norm)}: nothing is clipped",
                cause="nothing", phase="optimizer", value=self.running, limit=sustain,
                location=clip.location, evidence={"optimizer": record.index},
                fix="give it model.parameters() anew each time: an iterator of parameters, as "
                "params = model.parameters() is, is used up by its first user",
            )  # fmt: skip


def _is_of_nothing(clip: Action) -> bool:
    return clip.optimizer is None and from_scalar(clip.detail.get("total_norm")) == 0


def _limit(clip: Action) -> float:
    limit = from_scalar(clip.detail.get("max_norm", clip.detail.get("value")))
    return math.inf if limit is None else limit


def _misplaced(clip: Action, record: Optimizer, running: int, sustain: int) -> Draft:
    return Draft(
        message=f"gradients of optimizer {record.index}, {record.cls}, are clipped after its step "
        f"and before the next backward, {running} steps running (limit {sustain}): what it steps "
        "with is not clipped",
        cause=f"misplaced {record.index}", phase="optimizer", value=running, limit=sustain,
        location=clip.location, evidence={"optimizer": record.index},
    )  # fmt: skip


def _measure(clip: Action, cycle: Cycle, low: float, high: float) -> Iterator[Draft]:
    norm, limit = from_scalar(clip.detail.get("total_norm")), _limit(clip)
    if norm is None or not math.isfinite(norm):
        return
    cycle.norms.append(norm)
    mean, many = fmean(cycle.norms), len(cycle.norms)
    if many < (cycle.norms.maxlen or 0) or not mean:
        return
    always = min(cycle.norms) > limit and limit < low * mean
    never = max(cycle.norms) < limit and limit > high * mean
    if always or never:
        word = "every" if always else "none"
        yield Draft(
            message=f"max_norm {number_text(limit)} clipped {word} of the last {many} gradients; "
            f"their mean norm is {number_text(mean)} (useful: {low:g} to {high:g} times it)",
            cause=f"{word} {clip.optimizer}", severity="note", phase="backward", value=limit,
            limit=(low if always else high) * mean, location=clip.location,
            fix=f"max_norm between {number_text(low * mean)} and {number_text(high * mean)}",
            evidence={"mean_norm": mean, "optimizer": clip.optimizer},
        )  # fmt: skip
