"""TT212: a bootstrapped target that the gradient of the loss goes through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.causes.terms import hands_on, makers
from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.kinds import DISTANCE_MODULES, DISTANCE_OPS
from tensortrace.records import Action, Call, ChainLink
from tensortrace.text import location_text, module_text

_MAXIMA = frozenset(("max", "amax"))
_PICKS = frozenset(("gather", "getitem", "takealongdim"))
_DISTANCES = DISTANCE_OPS | DISTANCE_MODULES | {"sub", "rsub"}


@check("TT212", "target-with-graph", when="full", of=("calls",))
def target_with_graph(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """The target of Q-learning is made with a graph, so that the loss moves it as well.

    Symptom:    Q values learn slowly, to wrong values or not at all, though the loss falls: the
                values of the next states are moved toward those of the states before them
    Threshold:  in the graph of a loss two tensors are subtracted from each other, or compared by
                mse_loss, l1_loss, smooth_l1_loss or huber_loss. One is picked, by gather or by
                indices, from what a module with parameters to train returned; the other is a sum
                of something without a graph and of the max over what another call of that module
                returned for another input, and requires a gradient
    Source:     Mnih et al. 2015 (the parameters that the target is made of are held fixed); Sutton
                and Barto 2018, section 11.5: the gradient through both converges slowly and to the
                wrong values
    Fix:        make the target under torch.no_grad(), or .detach() it; better of a copy of the
                network that is updated now and then
    Misses:     a target without a max (SARSA, a critic of states, the smaller of two critics);
                a prediction that is picked by a product with one-hot rows, or not at all; one call
                for both states; what is made inside a module. An algorithm that takes the gradient
                of the whole residual on purpose is told of
    Example:    q = policy(state).gather(1, action)
                target = reward + 0.99 * policy(following).amax(1, keepdim=True)
                loss = F.smooth_l1_loss(q, target)
    Fixed:      q = policy(state).gather(1, action)
                with torch.no_grad():
                    target = reward + 0.99 * policy(following).amax(1, keepdim=True)
                loss = F.smooth_l1_loss(q, target)
    """
    if not any(call.op in _MAXIMA for call in step.calls):
        return
    made = makers(step.forward())
    for loss in step.losses:
        for distance in _graph(step, loss.tensor, made):
            if step.kind_of(distance) not in _DISTANCES or len(distance.inputs) != 2:
                continue
            one, other = (_graph(step, id, made) for _, id in distance.inputs)
            best = _bootstrap(step, one, other, made) or _bootstrap(step, other, one, made)
            if best is not None:
                yield _draft(step, loss, distance, best, _source(best, made))


def _graph(step: StepView, id: int | None, made: dict[int, Call]) -> list[Call]:
    """List the calls that a tensor's gradient goes back to, as far as the first modules."""
    todo = [id] if id is not None else []
    seen, found = set(todo), list[Call]()
    while todo:
        id = todo.pop()
        call, tensor = made.get(id), step.tensors.get(id)
        if call is None or tensor is None or not tensor.requires_grad:
            continue
        found.append(call)
        # A criterion of nn computes a loss of what others returned.
        if call.op is not None or step.kind_of(call) in DISTANCE_MODULES:
            new = [given for _, given in call.inputs if given not in seen]
            seen.update(new)
            todo += new
    return found


def _bootstrap(
    step: StepView, picked: list[Call], target: list[Call], made: dict[int, Call]
) -> Call | None:
    """The max in a target of which the network is that of a prediction; None if there is none."""
    picks = (_source(c, made) for c in picked if plain_op(c.op) in _PICKS and len(c.inputs) > 1)
    told = [call for call in picks if call is not None]
    if not told or not any(_adds_constant(step, call) for call in target):
        return None
    for call in target:
        source = _source(call, made) if call.op in _MAXIMA else None
        if source is not None and step.learns(source.module or ""):
            given = [id for _, id in source.inputs]
            if any(source.module == one.module and given != [id for _, id in one.inputs]
                   for one in told):  # fmt: skip
                return call
    return None


def _source(call: Call, made: dict[int, Call]) -> Call | None:
    """The module call whose output, or a view or copy of it, an op was given first."""
    maker: Call | None = call
    while maker is not None and maker.inputs:
        maker = made.get(maker.inputs[0][1])
        if maker is None or maker.op is None:
            return maker
        if not hands_on(maker):
            return None
    return None


def _adds_constant(step: StepView, call: Call) -> bool:
    given = [step.tensors[id].requires_grad for _, id in call.inputs if id in step.tensors]
    return plain_op(call.op) in ("add", "iadd", "radd") and len(given) > 1 and not all(given)


def _draft(step: StepView, loss: Action, distance: Call, best: Call, source: Call | None) -> Draft:
    path = source.module or "" if source is not None else ""
    links = tuple(
        ChainLink(call.seq, call.outputs[0][1], call.op or call.module, call.location)
        for call in (best, distance)
    )
    return Draft(
        message=f"the loss moves its own target: {best.op} at {location_text(best.location)} takes "
        f"what {module_text(path, step.cls_of(path))} returned with gradients on, and "
        f"{distance.op or step.kind_of(distance)} compares it with what is picked from another "
        "call of that",
        cause=location_text(distance.location), phase="forward", module=distance.module,
        op=distance.op, seq=distance.seq, tensor=best.outputs[0][1], location=distance.location,
        chain=(*links, ChainLink(loss.seq, loss.tensor, "loss", loss.location)),
        evidence={"placed": "direct", "max": best.seq, "loss": loss.seq},
    )  # fmt: skip
