"""Where values that are not finite begin: calls that made them, and which of them did harm."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tensortrace.causes.derivatives import made_of, parameter_shapes, upstream
from tensortrace.causes.held import given_weights, taken_weight
from tensortrace.checks import FILLS, StepView, completion_order, plain_op
from tensortrace.records import Call, Tensor


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
            masks = [] if made else _new_masks(step, call)
            came = _unexplained_masks(step, parent, call) if made else []
            if came and parent:
                found.append(Origin(parent, came[0], (last.get(parent.seq), call)))
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


def _new_masks(step: StepView, call: Call) -> list[Tensor]:
    """Pick -inf that neither its inputs nor, where they are seen, its children had."""
    if any(t.neginf for t in step.nonfinite(call.inputs)):
        return []
    children = (c for c in step.calls if c.parent == call.seq and call.op is None)
    if any(t.neginf for c in children for t in step.nonfinite(c.outputs)):
        return []
    return [t for t in step.nonfinite(call.outputs) if t.neginf]


def _unexplained_masks(step: StepView, parent: Call | None, call: Call) -> list[Tensor]:
    """Pick -inf that the parent's own code handed to a module that has no use for a mask."""
    takes_masks = re.search("softmax|attention|transformer", step.cls_of(call.module) or "", re.I)
    if parent is None or call.op or takes_masks:
        return []
    before = [c for c in step.calls if c.parent == parent.seq and c.seq < call.seq]
    known = [parent.inputs, *(c.outputs for c in before)]
    if any(t.neginf for names in known for t in step.nonfinite(names)):
        return []
    return [t for t in step.nonfinite(call.inputs) if t.neginf]


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
    after = (o for o in origins if o.call.op is not None and o.call.seq > last)
    # What has not the shape of a gradient, nor is taken for such a one, is a number for show.
    shapes = parameter_shapes(step, None)
    return next((o for o in after if o.tensor.shape in shapes
                 or shapes & made_of(step, [o.tensor])), None)  # fmt: skip


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
