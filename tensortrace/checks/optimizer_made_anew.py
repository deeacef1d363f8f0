"""TT414: an optimizer that is made again and again, and forgets each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Optimizer


@dataclass(slots=True)
class _Made:
    """How often one was made anew after a single step, running, and after several, in all."""

    after_one: int = 0
    after_more: int = 0


@check("TT414", "optimizer-made-anew", severity="note")
def optimizer_made_anew(
    step: StepView, memory: dict[str, Any], *, least: int = 3, sustain: int = 20
) -> Iterator[Draft]:
    """An optimizer is made anew again and again for the same parameters, without its state.

    Symptom:    the loss leaps up at the start of each epoch, and learns more slowly than it should;
                with one for each batch Adam behaves as if it saw only the signs of the gradients
    Threshold:  for the same parameters an optimizer of the same class that keeps a state was made
                `least` times in the place of one that had taken several steps and is gone, and
                began without a state. A warning where it was made `sustain` times running in the
                place of one that had taken a single step
    Source:     Kingma and Ba, "Adam" (2015), section 2: with t = 1 each step is as long as the
                learning rate in every weight, whatever the gradient. `least` and `sustain` chosen
                here: a few optimizers, one for each phase of a training, are silent
    Fix:        make the optimizer once, before the loop over epochs, and hand it to what needs it;
                where another is to go on from it, new.load_state_dict(old.state_dict())
    Misses:     one that is kept alive, in a list; SGD without momentum, which keeps nothing, and
                Adagrad, which begins with a state. Where it is meant (federated rounds, restarts,
                adaptation of one sample after another) it is reported all the same
    Example:    for epoch in range(9):
                    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
                    for x, y in loader:
                        train(model, optimizer, x, y)
    Fixed:      optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
                for epoch in range(9):
                    for x, y in loader:
                        train(model, optimizer, x, y)
    """
    made: dict[int, _Made] = memory.setdefault("made", {})
    for optimizer in step.optimizers:
        if optimizer.anew:
            made.pop(optimizer.index, None)
        if not optimizer.lost_state:
            continue
        count = made.setdefault(optimizer.index, _Made())
        if optimizer.lost_state == 1:
            count.after_one += 1
        else:
            count.after_one = 0
            count.after_more += 1
        if count.after_one >= sustain:
            yield _draft(optimizer, count.after_one, sustain, severity="warning")
        elif count.after_more >= least:
            yield _draft(optimizer, count.after_more, least)


def _draft(optimizer: Optimizer, made: int, limit: int, **severity: Any) -> Draft:
    steps = optimizer.lost_state
    after = "each after a single step" if steps == 1 else f"the last time after {steps} steps"
    begins = "Adam then moves each weight by the learning rate, whatever its gradient"
    return Draft(
        message=f"optimizer {optimizer.index}, {optimizer.cls}, was made anew {made} times "
        f"for the same parameters, {after} (limit {limit}), and has nothing of what the one before "
        "had kept",
        cause=f"optimizer {optimizer.index}", phase="optimizer", value=made, limit=limit,
        location=optimizer.location,
        explanation="what an optimizer keeps of earlier gradients (a momentum; of Adam the means "
        "of the gradients and of their squares) begins at nothing each time"
        + (f": {begins}" if steps == 1 else ""),
        evidence={"optimizer": optimizer.index, "times": made, "steps": steps},
        **severity,
    )  # fmt: skip
