"""Where values that are not finite begin: calls that made them, and which of them did harm."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tensortrace.causes.derivatives import made_of, parameter_shapes, upstream
from tensortrace.causes.held import given_weights, taken_weight
from tensortrace.checks import FILLS, StepView, completion_order, plain_op
from tensortrace.records import Call, Tensor

_TAKE_MASKS = "softmax|attention|transformer"


@dataclass(frozen=True, slots=True)
class Origin:
    """A call that made non-finite values, or the parent's own code before a call that got them."""

    call: Call
    tensor: Tensor
    between: tuple[Call | None, Call | None] | None = None


def origins_of(step: StepView) -> list[Origin]:
    """List the fresh forward calls that made what is bad, innermost and first first."""
    calls = [c for c in step.calls[step.fresh :]
             if c.phase == "forward" and not c.recompute and not c.replay]  # fmt: skip
    here = {c.seq: c for c in calls}
    last: dict[int, Call] = {}  # by parent: the child that completed last
    spoilt: set[int] = set()  # parents in which something bad was made already
    found: list[Origin] = []
    inside = _Children(step)
    for call in completion_order(calls):
        parent = here.get(call.parent) if call.parent is not None else None
        got, made = step.hurt(call.inputs), step.hurt(call.outputs)
        if parent and made and parent.seq not in spoilt and _of_weights(step, parent, call):
            found.append(Origin(parent, (step.hurt(parent.outputs) or made)[0]))
            spoilt.add(parent.seq)
        if parent and got and got[0].from_step is None and parent.seq not in spoilt:
            if not step.hurt(parent.inputs):
                found.append(Origin(parent, got[0], (last.get(parent.seq), call)))
            spoilt.add(parent.seq)
        if not got and call.seq not in spoilt and plain_op(call.op) not in FILLS:
            # -inf that goes in is a mask, unless it comes from nowhere to where none belongs.
            masks = [] if made else _new_masks(step, call, inside)
            by = _handed_over(step, call, here, inside) if made else None
            if by is not None:
                around, taker, tensor = by
                found.append(Origin(around, tensor, (last.get(around.seq), taker)))
            elif made or masks:
                after = last.get(call.seq)
                found.append(Origin(call, (made or masks)[0], (after, None) if after else None))
        if parent:
            last[parent.seq] = call
            if made:
                spoilt.add(parent.seq)
    return found


def _of_weights(step: StepView, parent: Call, call: Call) -> bool:
    """Whether an op of a module that was given finite values took a weight that is not finite."""
    return call.op is not None and not step.hurt(parent.inputs) and bool(taken_weight(step, call))


class _Children:
    """The calls inside each call of a step, gathered when they are first asked for.

    A sampler makes -inf in each of thousands of calls: none of them may walk over all others.
    """

    def __init__(self, step: StepView) -> None:
        self._step = step
        self._of: dict[int, list[Call]] | None = None

    def of(self, call: Call) -> list[Call]:
        """The calls directly inside one."""
        if self._of is None:
            self._of = {}
            for each in self._step.calls:
                if each.parent is not None:
                    self._of.setdefault(each.parent, []).append(each)
        return self._of.get(call.seq, [])


def _masks_in(step: StepView, names: list[tuple[str, int]]) -> list[Tensor]:
    return [t for t in step.nonfinite(names) if t.neginf]


def _new_masks(step: StepView, call: Call, inside: _Children) -> list[Tensor]:
    """Pick -inf that neither its inputs nor, where they are seen, its children had."""
    new = _masks_in(step, call.outputs)
    if not new or _masks_in(step, call.inputs):
        return []
    children = inside.of(call) if call.op is None else ()
    return [] if any(_masks_in(step, child.outputs) for child in children) else new


def _handed_over(
    step: StepView, call: Call, here: dict[int, Call], inside: _Children
) -> tuple[Call, Call, Tensor] | None:
    """Find whose own code made -inf that came to a module which has no use for a mask.

    Returns:
        That call, the call in it that was given the -inf and handed it on, and the -inf.
    """
    taker = call
    while (around := here.get(taker.parent) if taker.parent is not None else None) is not None:
        if taker.op or re.search(_TAKE_MASKS, step.cls_of(taker.module) or "", re.I):
            return None
        came = _masks_in(step, taker.inputs)
        before = (child for child in inside.of(around) if child.seq < taker.seq)
        known = [around.inputs, *(child.outputs for child in before)]
        if came and not any(_masks_in(step, names) for names in known):
            return around, taker, came[0]
        if not {t.id for t in came} & {id for _, id in around.inputs}:
            return None
        taker = around
    return None


def damaged_by(step: StepView, damage: str) -> list[int]:
    """The ids of the bad tensors that the damage shows in: losses, or what modules returned."""
    if damage == "loss":
        losses = (a.tensor for a in step.actions if a.action == "loss")
        return [id for id in losses if id is not None and id in step.tensors]
    return [t.id for c in step.calls if c.parent is None for t in step.hurt(c.outputs)]


def first_made(step: StepView) -> Call | None:
    """The first backward call that made a bad gradient of finite ones."""
    backward = (c for c in step.calls if c.phase == "backward" and step.nonfinite(c.outputs))
    return next((c for c in backward if not step.nonfinite(c.inputs)), None)


def is_backward_of(backward: Call, call: Call) -> bool:
    """Whether a backward call is that of a forward call, or of a parameter of its module."""
    own = backward.op is None and call.op is None and backward.module == call.module
    return backward.forward == call.seq or own


def _after_backward(step: StepView, origins: list[Origin]) -> Origin | None:
    """Pick what was written to gradients after a backward pass in which all was finite."""
    calls = [c for c in step.calls if c.phase == "backward"]
    if any(step.nonfinite(c.inputs) or step.nonfinite(c.outputs) for c in calls):
        return None
    last = max((c.seq for c in calls), default=-1)
    ops = (o for o in origins if o.call.op is not None)
    # What has not the shape of a gradient, nor is taken for such a one, is a number for show. What
    # was made before counts by what is made of it after: gradients are combined by hand like that.
    shapes = parameter_shapes(step, None)
    return next((o for o in ops if (o.call.seq > last and o.tensor.shape in shapes)
                 or shapes & made_of(step, [o.tensor], since=last)), None)  # fmt: skip


def guilty_of(step: StepView, origins: list[Origin], damage: str) -> Origin | None:
    """Pick the origin whose values are found on the way back from the damage."""
    if damage == "gradient":
        first = first_made(step)
        if first is None:
            return _after_backward(step, origins)
        # Values that a masked or sparse product leaves out do harm as factors of its gradient.
        took = [
            t.id for c in step.forward() if is_backward_of(first, c) for t in step.hurt(c.inputs)
        ]
        behind = upstream(step, took)[0] if took else set()
        # An op may make something finite of NaN, and NaN of its gradient: fused attention does.
        backward = (c for c in step.calls if c.phase == "backward" and step.nonfinite(c.inputs))
        spoilt = {c.forward for c in backward} if first.op is None else set()
        own = [o for o in origins if is_backward_of(first, o.call)]
        taken = [o for o in origins if o.tensor.id in behind]
        hidden = [o for o in origins if o.call.seq in spoilt]
        return next(iter([*own, *taken, *hidden]), None)
    bad = damaged_by(step, damage)
    reached, lost = upstream(step, bad)
    for origin in origins:
        if origin.tensor.id in reached:
            return (
                _before_unmeasured(step, origins, bad) if unknown_before(step, origin) else origin
            )
    return origins[0] if (lost or not bad) and step.blamed() is None else None


def unknown_before(step: StepView, origin: Origin) -> list[tuple[Call, str, Tensor]]:
    """What an origin may have had its values from, as nobody has measured it, with its call."""
    call, ends = origin.call, origin.between
    found = [(call, name, tensor) for name, tensor in step.unmeasured(call.inputs)]
    until = ends[1].seq if ends and ends[1] else math.inf
    for child in step.forward() if ends else ():
        if child.parent == call.seq and child.seq < until:
            made = step.unmeasured(child.outputs)
            found += [(child, name, tensor) for name, tensor in made]
    return found


def _before_unmeasured(step: StepView, origins: list[Origin], bad: list[int]) -> Origin | None:
    """Pick the origin whose values are found on the way back, if what is unknown is bad as well."""
    past = {id for id, tensor in step.tensors.items() if step.unmeasured([("", id)])}
    reached, _ = upstream(step, bad, past=past)
    return next((o for o in origins if o.tensor.id in reached), None)


def weights_from(step: StepView, call: Call, origins: list[Origin]) -> Origin | None:
    """Find what spoilt weights that a module was given in this step, by no optimizer."""
    given = given_weights(step, call)
    reached = upstream(step, (tensor.id for tensor in given))[0] if given else set()
    before = (o for o in origins if o.call.seq < call.seq and o.call is not call)
    return next((o for o in before if o.tensor.id in reached), None)
