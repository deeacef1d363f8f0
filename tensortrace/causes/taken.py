"""The calls that a fault in the graph of a loss belongs to, found by what they handed each other.

The graph has the names of nodes alone, and others in the step have the same: a metric takes a
sigmoid as well. Where the trail of tensors is lost, it is better to name none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tensortrace.causes import plain_op
from tensortrace.kinds import PASSING
from tensortrace.records import Action, Call, Tensor
from tensortrace.step_view import StepView

_NLL = frozenset(("nllloss", "nllloss2d", "nlllossnd"))
# What has such a node inside, though the one that it returned may be another: of a view, of the
# smoothed labels.
_LOSSES = {
    "logsoftmax": frozenset(("crossentropy", "crossentropyloss")),
    **dict.fromkeys(_NLL, frozenset(("nllloss",))),
}


class Taken(NamedTuple):
    """The call that made what a loss takes, and the one whose line is shown; None if not known."""

    made: Call | None
    place: Call | None


def taken(
    step: StepView, action: Action, pair: tuple[str, str], loss: str | None,
    shape: Sequence[int] | None = None,
) -> Taken:  # fmt: skip
    """Find the calls of two nodes of a loss's graph, of which one takes what the other made.

    Args:
        step: the step.
        action: that of the loss, with its graph.
        pair: the names of the nodes; the first takes.
        loss: that of the node whose call has the line if none is known that made it.
        shape: of what was made; None takes any.
    """
    trail = _trail(step, action)
    made = _maker(trail, pair, shape)
    return Taken(made, made or _only(trail, loss))


@dataclass(frozen=True, slots=True)
class _Trail:
    """What a loss came from: its graph, and the calls that made its tensors and theirs, by seq.

    `makers` has the innermost call that made each tensor of the step, by id.
    """

    step: StepView
    graph: Sequence[tuple[str, Sequence[int]]]
    calls: Sequence[Call]
    makers: Mapping[int, Call]

    def count(self, node: str | None) -> int:
        return sum(name == node for name, _ in self.graph)

    def names(self, call: Call) -> set[str | None]:
        """The nodes that made what a call returned."""
        tensors = self.step.tensors
        return {tensors[id].grad_fn for _, id in call.outputs if id in tensors}


def _trail(step: StepView, action: Action) -> _Trail:
    returned: dict[int, list[Call]] = {}
    makers: dict[int, Call] = {}
    for call in step.forward():
        given = {id for _, id in call.inputs}
        for _, id in call.outputs:
            returned.setdefault(id, []).append(call)
            if id not in given:
                makers[id] = call
    todo, seen, calls = [action.tensor], set[int](), dict[int, Call]()
    while todo:
        at = todo.pop()
        if at is None or at in seen:
            continue
        seen.add(at)
        if at in step.tensors:
            todo += [step.tensors[at].view_of, step.tensors[at].previous]
        for call in returned.get(at, ()):
            # At module level it is not seen which of them made it.
            for inner in step.inside(call):
                calls[inner.seq] = inner
                todo += [id for _, id in inner.inputs]
    ordered = [calls[seq] for seq in sorted(calls)]
    return _Trail(step, action.detail.get("graph", ()), ordered, makers)


def _maker(trail: _Trail, pair: tuple[str, str], shape: Sequence[int] | None) -> Call | None:
    user, node = pair
    certain: list[Call | None] = []
    modules: list[Call] = []
    for call in trail.calls:
        for _, id in call.inputs if _takes(trail, call, user) else ():
            tensor, maker = _before_views(trail, id)
            if tensor is None:
                continue
            if tensor.grad_fn == node:
                if shape is None or tensor.shape == tuple(shape):
                    certain.append(maker)
            elif tensor.grad_fn in PASSING and maker is not None and maker.op is None:
                modules.append(maker)
    if certain:
        return certain[-1]
    # The view that a module returned may be of anything, unless no other node takes anything else.
    if modules and all(any(trail.graph[i][0] == node for i in above)
                       for name, above in trail.graph if name == user):  # fmt: skip
        return modules[-1]
    return _fitting(trail, pair)


def _takes(trail: _Trail, call: Call, user: str) -> bool:
    """Whether a call returned what a node made, or is known to have it inside."""
    word, kind = plain_op(user), plain_op(trail.step.kind_of(call))
    words = set(map(plain_op, trail.names(call)))
    if word in words or kind in _LOSSES.get(word, ()):
        return True
    # A module of the user's may have both.
    return word == "logsoftmax" and call.op is None and kind not in _NLL and bool(words & _NLL)


def _before_views(trail: _Trail, id: int) -> tuple[Tensor | None, Call | None]:
    """What a tensor was before views and casts, as far back as they were seen, and its maker."""
    seen = set[int]()
    while True:
        seen.add(id)
        tensor, maker = trail.step.tensors.get(id), trail.makers.get(id)
        if tensor is None or tensor.grad_fn not in PASSING:
            return tensor, maker
        before = tensor.view_of
        if before is None and maker is not None and maker.op is not None and maker.inputs:
            before = maker.inputs[0][1]
        if before is None or before in seen:  # a log may say anything
            return tensor, maker
        id = before


def _fitting(trail: _Trail, pair: tuple[str, str]) -> Call | None:
    """The only call that can have been a node, where what took its result was not seen."""
    user, node = pair
    graph = trail.graph
    places = {i for name, above in graph if name == user for i in above if graph[i][0] == node}
    given = {graph[i][0] for place in places for i in graph[place][1]}
    found = [call for call in trail.calls
             if any(trail.makers.get(id) is call for _, id in call.outputs)
             and node in trail.names(call) and _fits(trail, call, node, given)]  # fmt: skip
    lines = {(c.module, c.location) for c in found}
    # Another of them may have been inside a module, unseen.
    others = sum(name == node and any(graph[i][0] in given for i in above) for name, above in graph)
    return found[-1] if len(lines) == 1 and len(found) >= others else None


def _fits(trail: _Trail, call: Call, node: str, given: set[str]) -> bool:
    """Whether a call may have taken what nodes of these names made; not known of a larger one."""
    if plain_op(trail.step.kind_of(call)) != plain_op(node):
        return call.op is None
    tensors = (_before_views(trail, id)[0] for _, id in call.inputs)
    return any(tensor is not None and tensor.grad_fn in given for tensor in tensors)


def _only(trail: _Trail, node: str | None) -> Call | None:
    """The innermost call that returned what a node made; None if several lines did, or not all."""
    calls = [c for c in trail.calls if node is not None and node in trail.names(c)]
    around = {c.parent for c in calls}
    inner = [c for c in calls if c.seq not in around]
    lines = {(c.location.file, c.location.line) for c in inner if c.location is not None}
    return inner[-1] if len(lines) == 1 and len(inner) >= trail.count(node) else None
