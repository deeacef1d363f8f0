"""TT704: evaluation that builds a graph nobody uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call
from tensortrace.text import module_text


@check("TT704", "evaluation-without-no-grad")
def evaluation_without_no_grad(
    step: StepView, memory: dict[str, Any], *, batches: int = 2, apart: int = 3
) -> Iterator[Draft]:
    """The network that is trained runs in eval mode with gradients on, and no backward follows.

    Symptom:    validation needs as much memory as training, and more time than it has to
    Threshold:  an outermost call of a module in eval mode returns something that requires a
                gradient, parameters of it or inside it are held by an optimizer that has stepped,
                and no gradient arrives at the call or inside it in this step; `batches` times, in
                this step or in steps running that have neither a backward nor an optimizer step;
                or in `apart` such steps of the run
    Source:     torch.no_grad ("It will reduce memory consumption for computations"); `batches`
                chosen here, so that one odd call says nothing, `apart` since a thinned run may
                always look at the first batch of a validation
    Fix:        with torch.inference_mode(): around the evaluation, or torch.no_grad()
    Misses:     evaluation before the first optimizer step; evaluation of a network that is in no
                optimizer (a teacher, an average); an output in eval mode
                that is kept for the backward of a later step is reported
    Example:    model.eval()
                for x, y in validation:
                    total += criterion(model(x), y).item()
    Fixed:      model.eval()
                with torch.inference_mode():
                    for x, y in validation:
                        total += criterion(model(x), y).item()
    """
    held: set[str] = memory.setdefault("held", set())
    for optimizer in step.optimizers if "holds" in step.has else ():
        held.update(optimizer.parameters or ())
    if step.summary is None:
        return
    idle = not (step.optimizers or step.losses)
    memory["idle"] = memory.get("idle", 0) + 1 if idle else 0
    if not step.calls:
        return
    if not held or any(a.action == "exception" for a in step.actions):
        return
    wasted = [c for c in step.calls if _is_evaluation(step, c)]
    if not wasted:
        return
    inside = _insides(step, wasted)
    reached = {c.forward for c in step.calls if c.phase == "backward"}
    wasted = [c for c in wasted if reached.isdisjoint(inside[c.seq])
              and any(not held.isdisjoint(step.trainable(path)) for path in inside[c.seq].values())
              ]  # fmt: skip
    # Layers that are called one by one are one pass.
    passes = max(Counter(call.module for call in wasted).values(), default=0)
    count, limit = passes + max(memory["idle"] - 1, 0), batches
    memory["met"] = memory.get("met", 0) + bool(wasted and idle)
    if count < limit <= apart <= memory["met"]:
        count, limit = memory["met"], apart
    if wasted and count >= limit:
        call = wasted[-1]
        yield Draft(
            message=f"{module_text(call.module)} runs in eval mode with gradients enabled, "
            f"{count} times without a backward (limit {limit}): its graph is built for nothing",
            cause=call.module or "the root", phase="forward", module=call.module, seq=call.seq,
            value=count, limit=limit, location=call.location, evidence={"placed": "direct"},
        )  # fmt: skip


def _is_evaluation(step: StepView, call: Call) -> bool:
    if call.training is not False or call.phase != "forward" or call.op is not None:
        return False
    made = (step.tensors.get(id) for _, id in call.outputs)
    return (
        call.parent is None and call.grad_enabled and not call.recompute
        and any(t is not None and t.requires_grad and not t.is_leaf for t in made)
    )  # fmt: skip


def _insides(step: StepView, roots: list[Call]) -> dict[int, dict[int, str]]:
    """List what ran inside each of some outermost calls, itself too: seq and module path."""
    inside: dict[int, dict[int, str]] = {c.seq: {c.seq: c.module or ""} for c in roots}
    above = {c.seq: c.seq for c in roots}
    for call in sorted(step.calls, key=lambda c: c.seq):
        if call.phase == "forward" and call.parent in above:
            above[call.seq] = above[call.parent]
            inside[above[call.seq]][call.seq] = call.module or ""
    return inside
