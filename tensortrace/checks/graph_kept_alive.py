"""TT703: a running total or a list that keeps the graphs of all steps alive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text, module_text, shape_text

_SUMS = frozenset(("add", "add_", "__iadd__"))
# Calls that are remembered, of so many steps, and totals.
_PLACES = 256
_RECENT = 40


@dataclass(slots=True)
class _Since:
    """What was summed up since the last update, the steps of micro-batches among it.

    `first` is the first step after that update. By number, `totals` have how many updates what is
    in them has outlived; so have those of `before` it, None if no loss was seen then.
    """

    first: int
    before: dict[float, int] | None = None
    totals: dict[float, int] = field(default_factory=dict)
    lost: bool = False

    def lived(self, total: Tensor) -> int:
        """How many updates a number has outlived to which something is added."""
        if total.from_step is None or total.min is None:
            return 0
        if total.from_step >= self.first:
            return self.totals.get(total.min, 0)
        return 0 if self.before is None else self.before.get(total.min, 0) + 1


@check("TT703", "graph-kept-alive")
def graph_kept_alive(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3, growing: int = 8
) -> Iterator[Draft]:
    """A total or a list keeps losses or outputs of earlier steps together with their graphs.

    Symptom:    memory grows from step to step until it runs out, in the middle of an epoch
    Threshold:  outside modules a number with a graph that was made before the last update, or since
                it by such an addition, gets another number with a graph added, in a step with a
                backward and an optimizer step, the `sustain`-th such step of the run at least; and
                it is what an addition to a number of before the update before has made. Or:
                in each of `growing` such steps running more tensors with a graph are still alive
                that were made, and last used, before the step before
    Source:     PyTorch FAQ, "My model reports cuda runtime error(2): out of memory" ("Don't
                accumulate history across your training loop"); `sustain` chosen here, `growing` so
                that a list which is emptied now and then is silent
    Fix:        total += loss.detach(), or loss.item(); losses.append(loss.item()),
                outputs.append(output.detach())
    Misses:     totals inside modules; a total over one step; one that first keeps graphs past the
                first twenty steps of a thinned run, which looks at no two steps running there;
                lists of what only modules inside others have made; a list that is kept short, or
                filled where nothing is trained
    Example:    losses.append(loss)
                print(sum(losses) / len(losses))
    Fixed:      losses.append(loss.item())
                print(sum(losses) / len(losses))
    """
    if step.summary is None:
        return
    if step.summary.full:
        _remember(step, memory.setdefault("places", {}))
    since: _Since | None = memory.get("since")
    if since is None:
        since = memory["since"] = _Since(step.number)
    old = _add_totals(step, since) if step.calls else []
    lost = bool(step.losses)
    since.lost = since.lost or lost
    if not step.optimizers:
        return
    since.first, since.before = step.number + 1, since.totals if since.lost else None
    since.totals, since.lost = {}, False
    if not lost:
        return
    memory["count"] = memory.get("count", 0) + 1
    for call, total in old if memory["count"] >= sustain else ():
        yield Draft(
            message=f"{call.op} adds to a total of step {total.from_step} that has a graph "
            f"({total.grad_fn or 'changed in place'}): the graphs of all its steps stay in "
            "memory",
            cause=location_text(call.location), phase="forward", op=call.op, seq=call.seq,
            tensor=total.id, value=memory["count"], limit=sustain, location=call.location,
            evidence={"placed": "direct", "from_step": total.from_step},
        )  # fmt: skip
    kept = next((a.detail["kept"] for a in step.losses if "kept" in a.detail), None)
    if kept or memory.get("stored"):
        yield from _stored(memory, kept, growing)


def _stored(
    memory: dict[str, Any], kept: Mapping[str, Any] | None, growing: int
) -> Iterator[Draft]:
    count = kept["tensors"] if kept else 0
    memory["grown"] = memory.get("grown", 0) + 1 if count > memory.get("stored", 0) else 0
    memory["stored"] = count
    if kept and memory["grown"] >= growing:
        call = memory.get("places", {}).get((kept["step"], kept["id"]))
        made = f"{call.op or module_text(call.module)} made one" if call else "one was made"
        yield Draft(
            message=f"{count} tensors of earlier steps are alive with their graphs, more in each "
            f"of {memory['grown']} optimizer steps (limit {growing}): {made} in step {kept['step']}"
            f", {shape_text(tuple(kept['shape']))} ({kept['grad_fn'] or 'changed in place'})",
            cause="stored", phase="forward", module=call.module if call else None,
            op=call.op if call else None, value=memory["grown"], limit=growing,
            location=call.location if call else None,
            evidence={"placed": "direct" if call else "not known", **kept},
        )  # fmt: skip


def _remember(step: StepView, places: dict[tuple[int, int], Call]) -> None:
    """Keep which calls outside modules made what has a graph, of the last few steps."""
    for call in step.calls[-_PLACES:]:
        if call.phase == "forward" and call.parent is None:
            for _, id in call.outputs:
                tensor = step.tensors.get(id)
                if tensor is not None and tensor.requires_grad:
                    places[step.number, id] = call
    recent = [key for key in places if key[0] > step.number - _RECENT][-_PLACES:]
    for old in places.keys() - recent:
        del places[old]


def _add_totals(step: StepView, since: _Since) -> list[tuple[Call, Tensor]]:
    """Keep the numbers that additions to a number of an earlier step have made.

    So does the sum of the losses of two optimizers, of which the first has ended a step; but to
    that nothing is added.

    Returns:
        The additions to a total that outlived two updates, each with that total.
    """
    made: dict[int, int] = {}
    found: list[tuple[Call, Tensor]] = []
    for call in step.forward():
        if call.op not in _SUMS or call.module is not None:
            continue
        total = _total(step, call)
        lived = [made[id] for _, id in call.inputs if id in made]
        if total is not None:
            lived.append(since.lived(total))
            if lived[-1] > 1:
                found.append((call, total))
        for _, number in call.outputs if lived else ():
            made[number] = max(lived)
            tensor = step.tensors.get(number)
            # An id is of its step: in the next one the number itself is all that is the same.
            if tensor is not None and tensor.min is not None:
                since.totals[tensor.min] = max(lived)
    for old in list(since.totals)[:-_PLACES]:
        del since.totals[old]
    return found


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
