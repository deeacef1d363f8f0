"""TT703: a running total that keeps the graphs of all steps alive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text

_SUMS = frozenset(("add", "add_", "__iadd__"))
_REMEMBERED = 64


@check("TT703", "graph-kept-alive")
def graph_kept_alive(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """A loss is added to a total of earlier steps together with its graph.

    Symptom:    memory grows from step to step until it runs out, in the middle of an epoch
    Threshold:  outside modules a number with a graph that was made in an earlier step gets another
                number with a graph added, in a step with a backward and an optimizer step, as that
                earlier step was, and so it is the `sustain`-th such step of the run at least
    Source:     PyTorch FAQ, "My model reports cuda runtime error(2): out of memory" ("Don't
                accumulate history across your training loop"); `sustain` chosen here
    Fix:        total += loss.detach(), or loss.item()
    Misses:     outputs or losses kept in a list; totals inside modules; a total over one step
    """
    if step.summary is None:
        return
    trained: list[int] = memory.setdefault("trained", [])
    if not step.optimizers or not any(a.action == "loss" for a in step.actions):
        return
    memory["count"] = memory.get("count", 0) + 1
    if memory["count"] >= sustain:
        for call in step.calls:
            total = _total(step, call)
            if total is not None and total.from_step in trained:
                yield Draft(
                    message=f"{call.op} adds to a total of step {total.from_step} that has a graph "
                    f"({total.grad_fn or 'changed in place'}): the graphs of all its steps stay in "
                    "memory",
                    cause=location_text(call.location), phase="forward", op=call.op, seq=call.seq,
                    tensor=total.id, value=memory["count"], limit=sustain, location=call.location,
                    evidence={"placed": "direct", "from_step": total.from_step},
                )  # fmt: skip
    trained.append(step.number)
    del trained[:-_REMEMBERED]


def _total(step: StepView, call: Call) -> Tensor | None:
    """Pick the number of an earlier step to which a call adds another one, both with a graph."""
    if call.op not in _SUMS or call.phase != "forward" or call.module is not None:
        return None
    given = [step.tensors.get(id) for _, id in call.inputs]
    if len(given) != 2 or not all(t is not None and _is_number(t) for t in given):
        return None
    old = [t for t in given if t is not None and t.from_step is not None]
    return old[0] if len(old) == 1 else None


def _is_number(tensor: Tensor) -> bool:
    return tensor.numel == 1 and tensor.requires_grad and not tensor.is_leaf
