"""TT701: training that goes on in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import BATCH_NORMS, DROPOUTS
from tensortrace.records import Call, Location, Optimizer
from tensortrace.text import module_text

_SENSITIVE = BATCH_NORMS + DROPOUTS
# Once, a last eval() when training is over says it too.
_AGAIN = 2


@dataclass(slots=True)
class Switched:
    """A module was put in eval mode; `updates` since then, and by which optimizers.

    `early` is before the first update, and `again` how often since eval() was called once more.
    """

    step: int
    location: Location | None
    early: bool
    again: int = 0
    updates: int = 0
    optimizers: set[int] = field(default_factory=set)

    def may_be_meant(self) -> bool:
        """Whether nothing says that it should train in the other mode."""
        return self.early and self.again < _AGAIN


@check("TT701", "eval-mode-in-training", of=("holds",), since=("eval",))
def eval_mode_in_training(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """The network goes on being trained in eval mode: no dropout, fixed BatchNorm statistics.

    Symptom:    after the first validation the training loss drops and the network overfits; or
                BatchNorm normalises with statistics of long ago
    Threshold:  an outermost call in eval mode, with a BatchNorm or Dropout in eval mode inside,
                gets a gradient, and the module was put in eval mode after an optimizer step, with
                `sustain` more since, one of an optimizer that holds parameters of it among them,
                and no train() of it; or before the first optimizer step, if eval() is called again
                twice without a train() between, each time after more optimizer steps
    Source:     torch.nn.Module.eval; `sustain` and twice chosen here
    Fix:        model.train() at the top of each training epoch, behind the validation
    Misses:     a network that was in eval mode when the first optimizer step came, and is not put
                in it again later (fine-tuning in eval mode may be meant); modules of your own that
                look at self.training; a train() of another module of the same class in between
    Example:    model.train()
                for epoch in range(10):
                    train(model, loader)
                    model.eval()
                    validate(model, validation)
    Fixed:      for epoch in range(10):
                    model.train()
                    train(model, loader)
                    model.eval()
                    validate(model, validation)
    """
    switched: dict[str, Switched] = memory.setdefault("switched", {})
    held: dict[int, set[str]] = memory.setdefault("held", {})
    _follow(step, switched, held)
    counting = {
        of: s for of, s in switched.items() if s.updates >= sustain and not s.may_be_meant()
    }
    if step.summary is None or not counting:
        return
    reached = {c.forward for c in step.calls if c.phase == "backward"}
    for call in step.calls:
        if call.phase != "forward" or call.op or call.parent is not None or call.training:
            continue
        one = counting.get(call.module or "") or counting.get(step.cls_of(call.module))
        if one is None or call.seq not in reached:
            continue
        inside = step.inside(call)
        sensitive = {
            c.module or "" for c in inside if c.training is False and _is_sensitive(step, c)
        }
        own = {name for c in inside for name in step.trainable(c.module)}
        # Not of this step alone: where gradients are accumulated, none that is looked at has one.
        if sensitive and any(own & held.get(index, set()) for index in one.optimizers):
            yield Draft(
                message=f"{module_text(call.module, step.cls_of(call.module))} is in eval "
                f"mode since step {one.step} and was trained in it in {one.updates} optimizer "
                f"steps (limit {sustain}): {len(sensitive)} BatchNorm or Dropout modules are off",
                cause=call.module or "the root", phase="forward", module=call.module, seq=call.seq,
                value=one.updates, limit=sustain, location=one.location or call.location,
                evidence={"placed": "direct", "since": one.step, "modules": sorted(sensitive)[:20]},
            )  # fmt: skip


def _is_sensitive(step: StepView, call: Call) -> bool:
    module = step.modules.get(call.module or "")
    return module is not None and module.cls.startswith(_SENSITIVE) and not module.inert


def _follow(step: StepView, switched: dict[str, Switched], held: dict[int, set[str]]) -> None:
    """Take in what was switched in a step, by name, and which parameters optimizers hold."""
    trains = step.updated >= 0
    for record in step.happened():
        if isinstance(record, Optimizer):
            if record.parameters is not None:
                held[record.index] = set(record.parameters)
            trains = trains or not record.skipped
            for each in switched.values() if not record.skipped else ():
                each.updates += 1
                each.optimizers.add(record.index)
        elif record.action == "train":
            switched.pop(record.of or "", None)
        elif record.action == "eval":
            again, one = "again" in record.detail, switched.get(record.of or "")
            if one is None or not again:
                early = again or not trains  # it may have been made in eval mode
                one = switched[record.of or ""] = Switched(step.number, record.location, early)
            one.again += again
            if one.early:
                one.location = record.location
