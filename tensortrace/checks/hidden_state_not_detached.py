"""TT705: a state that is carried into the next step together with its graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, completion_order
from tensortrace.records import Call, Tensor
from tensortrace.text import module_text

_AGAIN = "backward through the graph a second time"
_CHANGED = "modified by an inplace operation"
_STEPS, _STATES = 8, 64


@check("TT705", "hidden-state-not-detached", when="gate", after=("TT801",), of=("calls", "full"))
def hidden_state_not_detached(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """A hidden state of an earlier step enters a module together with its graph.

    Symptom:    "Trying to backward through the graph a second time" in the second step; with
                retain_graph=True "modified by an inplace operation", or every step takes longer;
                where the loss does not depend on the state, memory grows
    Threshold:  an input of a module has a grad_fn and was made in an earlier step, and backward()
                raises one of the two: an error, since it is the only backward of its step and the
                module that made the input has had its own. Without an exception it is a warning:
                the input was computed from one that was carried in the same way, and so on over
                `sustain` steps that each had an optimizer step
    Source:     PyTorch, word language model example (`repackage_hidden`); Williams and Peng 1990,
                truncated backpropagation through time; `sustain` chosen here: a generator's images
                that the next step uses are made anew, so they are carried once
    Fix:        state = state.detach() before the next step, or tuple(h.detach() for h in state)
    Misses:     states that no module gets as an input; evaluation that keeps its graphs (TT704);
                a state carried through steps that are not full; TT801 explains the exception where
                it runs too, and this is counted under it
    Example:    for x, y in batches:
                    logits, state = model(x, state)
                    criterion(logits, y).backward()
    Fixed:      for x, y in batches:
                    logits, state = model(x, state)
                    criterion(logits, y).backward()
                    state = tuple(h.detach() for h in state)
    """
    made: dict[int, dict[Any, int]] = memory.setdefault("made", {})
    raised = [a for a in step.actions
              if a.action == "exception" and _is_stale(str(a.detail.get("message")))]  # fmt: skip
    if raised and sum(a.action == "loss" for a in step.actions) == 1:
        told = next((f.id for f in step.findings if f.code == "TT801" and f.step == step.number
                     and f.seq == raised[0].seq), None)  # fmt: skip
        stale = (one for one in step.carried() if _likeness(one[2]) in made.get(_origin(one), {}))
        for carried in itertools.islice(stale, 1):
            yield _draft(*carried, "and backward() needs that graph as it was then",
                         severity="error", follows=told)  # fmt: skip
    if step.summary is None:
        return
    if step.summary.full:
        depths: dict[int, int] = {}
        for carried in step.carried():
            origin, state = _origin(carried), carried[2]
            before = made.get(origin, {}).get(_likeness(state), 0)
            depth = depths[state.id] = before + (origin in step.trained)
            if depth >= sustain and not raised:
                yield _draft(
                    *carried, f"on which hang those of {depth} optimizer steps (limit {sustain}): "
                    "they stay in memory", value=depth, limit=sustain,
                )  # fmt: skip
        made[step.number] = _made(step, depths)
        for old in sorted(made)[:-_STEPS]:
            del made[old]


def _is_stale(message: str) -> bool:
    return _AGAIN in message or _CHANGED in message


def _origin(carried: tuple[Call, str, Tensor]) -> int:
    origin = carried[2].from_step
    return -1 if origin is None else origin


def _made(step: StepView, depths: dict[int, int]) -> dict[Any, int]:
    """Tell what came of carried tensors or got a backward, and over how many steps it hangs."""
    backed = {c.forward for c in step.calls if c.phase == "backward"}
    forward = [c for c in step.calls if c.phase == "forward"]
    inner: dict[int | None, int] = {}
    for call in completion_order(forward) if depths else ():
        depth = max([depths.get(id, 0) for _, id in call.inputs] + [inner.pop(call.seq, 0)])
        if depth and call.grad_enabled:
            inner[call.parent] = max(depth, inner.get(call.parent, 0))
            for _, id in call.outputs:
                depths[id] = max(depth, depths.get(id, 0))
    made: dict[Any, int] = {}
    # What outermost modules return, and of the others what came last: that is a state.
    outer = (call for call in forward if call.parent is None)
    for call in itertools.chain(outer, reversed(forward)):
        if len(made) >= _STATES:
            break
        for _, id in call.outputs if depths or call.seq in backed else ():
            tensor = step.tensors.get(id)
            if tensor is None or not tensor.requires_grad or tensor.norm is None:
                continue
            if id in depths or call.seq in backed:
                made[_likeness(tensor)] = depths.get(id, 0)
    return made


def _likeness(tensor: Tensor) -> Any:
    """What a tensor has in common with itself in another step, where its id is another."""
    return tensor.shape, tensor.dtype, tensor.norm, tensor.mean, tensor.min, tensor.max


def _draft(call: Call, name: str, state: Tensor, what: str, **fields: Any) -> Draft:
    return Draft(
        message=f"{name} of {module_text(call.module)} comes from step {state.from_step} with its "
        f"graph ({state.grad_fn}), {what}",
        cause=f"{call.module}", phase="forward", module=call.module, seq=call.seq,
        tensor=state.id, location=call.location,
        evidence={"placed": "direct", "input": name, "from_step": state.from_step}, **fields,
    )  # fmt: skip
