"""What a module held that was not finite before its call: weights, a buffer, a constant.

A replay that has no op to blame took it, and so it shows there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tensortrace.causes import Reason, largest
from tensortrace.causes.derivatives import parameter_shapes
from tensortrace.records import Call, Tensor
from tensortrace.step_view import MOVED, StepView
from tensortrace.text import location_text, number_text

WEIGHTS = Reason(
    "what went into this module is finite, its weights are not, and no optimizer step that was "
    "seen wrote them so: code between the steps did, or they were loaded like that",
    "find what writes to the weights (a NaN passed to copy_, add_, an average of weights); load "
    "the weights of a step before this one",
)
HELD = Reason(
    "a tensor that is no input of this module was not finite before it: a buffer, a constant, or "
    "what another part of the program left there",
    "find where that tensor is set: a running mean of nothing, a state dict, 0 / 0 in NumPy",
)


def weights_reason(step: StepView, call: Call) -> Reason:
    """Say of weights that were not finite before a module call who wrote them so."""
    # The number of updates goes up when a step ends: of one that began before and goes on, this
    # call is in a further evaluation of its closure, and the weights were moved in between.
    inside = (o for o in step.taken if o.seq < call.seq and o.update == call.update)
    running = next(inside, None)
    if running is None:
        return WEIGHTS
    losses = [largest(step.tensors[a.tensor]) for a in step.losses
              if a.seq < call.seq and a.tensor in step.tensors]  # fmt: skip
    grads = [largest(step.tensors[id]) for c in step.calls
             if c.phase == "backward" and c.op is None and c.seq < call.seq
             for _, id in c.outputs if id in step.tensors]  # fmt: skip
    seen = {"losses": max(losses, default=0.0), "gradients": max(grads, default=0.0)}
    met = [f"{what} up to {number_text(most)}" for what, most in seen.items() if most]
    searches = ', line_search_fn=None if it is "strong_wolfe"' if running.cls == "LBFGS" else ""
    return Reason(
        f"{running.cls}.step() at {location_text(running.location)} wrote its weights between two "
        "evaluations of its closure, unless the closure itself did"
        + (f"; it had met {' and '.join(met)}" if met else ""),
        f"a smaller lr{searches}; bound what the model makes of its parameters (softplus, clamp), "
        "so that the loss stays in range wherever the optimizer tries; or float64",
    )


def spoilt_weights(step: StepView, call: Call) -> tuple[str, Tensor] | None:
    """Find the parameter that was not finite before a module call, in a replay or its own ops."""
    inside = (c for c in step.calls if c.op is not None and c.parent == call.seq)
    for op in inside:
        taken = taken_weight(step, op)
        if taken is not None:
            return taken
    module = step.module_of(call)
    own = module.parameters if module is not None else []
    for op in step.replayed:
        for held in step.nonfinite(op.inputs) if op.module == call.module else ():
            names = [p.name for p in own if p.shape == held.shape and held.is_leaf]
            # The buffers of a norm have the shapes of its weights.
            if names and buffer_name(step, held) is None:
                return f"{call.module}.{names[0]}" if call.module else names[0], held
    return None


def taken_weight(step: StepView, op: Call) -> tuple[str, Tensor] | None:
    """Find, among what an op of a module's own code took, a parameter of it that is not finite."""
    module = step.modules.get(op.module) if op.module is not None else None
    if module is None or op.phase != "forward":
        return None
    # The buffers of a norm have the shapes of its weights; only these need a gradient.
    has_buffers = "norm" in (op.op or "")
    for held in step.hurt(op.inputs):
        known = held.is_leaf and (held.requires_grad or not has_buffers)
        for p in module.parameters if known else ():
            if (p.shape, p.requires_grad) == (held.shape, held.requires_grad):
                return f"{op.module}.{p.name}" if op.module else p.name, held
    return None


def held_by(step: StepView, call: Call) -> tuple[Call, Tensor] | None:
    """Find, in such a replay, the first op that took a spoilt tensor which nothing in it made."""
    made = {id for op in step.replayed for _, id in op.outputs}
    for op in step.replayed:
        for held in step.hurt(op.inputs) if op.module == call.module else ():
            if held.is_leaf and held.id not in made:
                return op, held
    return None


def given_weights(step: StepView, call: Call) -> list[Tensor]:
    """List what is not finite that a module took as a weight, and that this step made before it.

    A replay shows it; without one, what no other call made something finite of.
    """
    entry = calls_around(step, call)[-1].seq
    before = (c for c in step.forward() if c.seq < entry and c.parent is None)
    return [*taken_inside(step, call), *fit_as_weights(step, call, unhealed(step, before))]


def fit_as_weights(step: StepView, call: Call, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Pick what has the shape of a parameter of a module that no replay could run with its weights.

    Unless they are known to have been others for the time of the call (functional_call), only what
    has a graph: statistics of weights, which have that shape too, have none.
    """
    placed, op = step.narrowed(call.seq, "forward")
    if call.op is not None or op is not None or placed not in (None, *MOVED):
        return []
    shapes, replaced = parameter_shapes(step, call.module), placed == MOVED[1]
    return [t for t in tensors if t.shape in shapes and (replaced or t.grad_fn is not None)]


def unhealed(step: StepView, calls: Iterable[Call]) -> list[Tensor]:
    """List what calls made that is not finite, but for that of which another made what is.

    A comparison or a count makes nothing of it.
    """
    healed: set[int] = set()
    for call in step.forward():
        if any(step.is_float(id) for _, id in call.outputs) and not step.hurt(call.outputs):
            healed.update(id for _, id in call.inputs)
    return [t for c in calls for t in step.hurt(c.outputs) if t.id not in healed]


def taken_inside(step: StepView, call: Call) -> list[Tensor]:
    """List what is not finite that ops inside a replayed module took and that was there before."""
    if call.op is not None or step.narrowed(call.seq, "forward")[1] is not None:
        return []
    made = {id for op in step.replayed for _, id in op.outputs}
    made.update(id for around in calls_around(step, call) for _, id in around.inputs)
    inside = (op for op in step.replayed if is_below(op.module, call.module))
    return [t for op in inside for t in step.hurt(op.inputs) if t.id not in made]


def calls_around(step: StepView, call: Call) -> list[Call]:
    """A call and those that it ran inside of, the outermost last."""
    by_seq, around = {c.seq: c for c in step.forward()}, [call]
    while (parent := around[-1].parent) is not None and parent in by_seq:
        around.append(by_seq[parent])
    return around


def is_below(path: str | None, module: str | None) -> bool:
    """Whether a module path is that of a module or of one inside it."""
    return not module or f"{path}.".startswith(f"{module}.")


def buffer_reason(step: StepView, name: str, held: Tensor) -> Reason:
    """Say of a buffer that was not finite where the same forward writes to it."""
    later = {tensor.id for tensor in step.tensors.values() if tensor.previous == held.id}
    written = (c for c in step.replayed if any(id in later for _, id in c.outputs))
    writer = next(written, None)
    if writer is None or writer.location is None:
        return replace(HELD, why=f"the buffer {name} was not finite before this call")
    at = location_text(writer.location)
    return Reason(
        f"the buffer {name} was not finite before this call; a call of this module writes to it "
        f"in {writer.op} at {at}, and an earlier one may have spoilt it there",
        f"look at what goes into {writer.op} at {at} for a batch of one row, of equal rows, or "
        "with nothing selected",
    )


def buffer_name(step: StepView, tensor: Tensor) -> str | None:
    """What a replay called a tensor that its modules hold as a buffer."""
    named = (a.detail.get("buffers", {}).get(str(tensor.id)) for a in step.actions)
    return next((name for name in named if name), None)
