"""TT102: the backward call that made the first NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tensortrace.causes import Facts, Reason, backward, first_text, follow, forward, selector
from tensortrace.causes.derivatives import (
    backward_pass,
    derivative_to_blame,
    first_bad,
    first_maker,
    is_placed,
)
from tensortrace.causes.hooks import ADVICE, named, ran_between
from tensortrace.checks import (
    Draft,
    StepView,
    check,
    completion_order,
    count_text,
    finite,
    is_own_backward,
    plain_op,
)
from tensortrace.records import DERIVATIVE, Call, ChainLink, Location, Tensor
from tensortrace.text import location_text, module_text

_UNSEEN = (
    "no bad gradient was seen in the backward pass: a hook, or code between backward() and the "
    "update may have made it, or what was not seen"
)
_HOOKS = (
    "look at what divides or scales gradients between backward() and step(), and at "
    "register_post_accumulate_grad_hook"
)
_LOOK = 'find the op with level="op": '
_NO_OP = (
    "keep what it takes away from the point where its slope is infinite (eps before sqrt, norm and "
    "log), masks before the op and not after it"
)
_NOT_BEGUN = (
    "it was computed anew inside a backward, and the gradients that the pass through it began with "
    "were not seen: they may have been bad already"
)
_OTHER_THREAD = Reason(
    "this was called in a thread that did not enter the block: its ops outside modules, a loss "
    "too, are not seen, and may have made what is not finite in the forward or the backward pass",
    "enter the block, or call the decorated function, in the thread that trains",
)
_OF_ANOTHER_RANK = "; or it is another rank's, averaged in with those of this one"
_OTHER_LOGS = "read the logs of the other ranks first: tensortrace report FOLDER shows all; then "


@dataclass(frozen=True, slots=True)
class Origin:
    """The backward call with the first bad gradient, and the forward call it is the backward of.

    `derivative` is the call of autograd.grad that spoilt the loss, if that ran it.
    """

    call: Call
    grad: Tensor
    forward: Call | None
    direct: bool
    derivative: Call | None = None


@check(
    "TT102", "nonfinite-backward", severity="error", when="gate", after=("TT101",),
    of=("calls",),
)  # fmt: skip
def nonfinite_backward(
    step: StepView, memory: dict[str, Any], *, chain: int = 8
) -> Iterator[Draft]:
    """A backward call makes NaN or infinity out of finite gradients.

    Symptom:    the loss is finite, the gradients are not; after the optimizer step all is NaN. Or
                the loss is not, and is made of gradients (a penalty, forces, an inner step)
    Threshold:  the first backward call in execution order with a NaN or infinite element among the
                gradients that it made and none among those that arrived, if a parameter gradient
                or the total norm is not finite either; a note if none is, or if a GradScaler
                skipped the step. Up to `chain` links of what made the values to blame are told
    Source:     the rule of TT101 turned round (output bad, input finite); a GradScaler's skip is
                how it finds its scale (torch.amp), no fault
    Fix:        keep the argument of the named op away from the point where its slope is infinite
                (eps before sqrt, norm and log), masks before the op and not after it
    Misses:     the gradient of a view whose base is modified later cannot be seen; at module level
                the op inside the module is deduced from its neighbours; the slope of a slope, which
                only the backward of a backward computes, is placed between calls; weights that are
                mere tensors and are moved through NumPy or torch._foreach functions
    Example:    distance = ((a - b) ** 2).sum(dim=1).sqrt()  # a pair of equal ones: slope inf
                loss = torch.where(same, distance, (margin - distance).relu()).mean()
    Fixed:      distance = (((a - b) ** 2).sum(dim=1) + 1e-12).sqrt()
                loss = torch.where(same, distance, (margin - distance).relu()).mean()
    """
    if memory.get("step") != step.number:
        memory.update(step=step.number, origin=None, told=False)
    if memory["told"]:
        return
    blamed = None
    if step.bad and step.blamed() is None and step.damage() == "loss":
        blamed = derivative_to_blame(step)
        if blamed is None or not is_placed(step, blamed):
            return  # what TT103 will say comes first
    if blamed is not None or ((step.bad or step.replayed) and memory["origin"] is None):
        memory["origin"] = _first(step, blamed)
    origin: Origin | None = memory["origin"]
    closed = step.summary is not None
    if origin is None and not closed:
        return
    if origin is None:
        # No call shows it, the optimizer met it: no module level gradient was seen on the way.
        if not step.scaled():
            yield from _parameter_only(step)
        return
    verdict = _verdict(step) if blamed is None else "harmful"
    if verdict == "undecided" and not closed:
        return
    memory["told"] = True
    yield _draft(step, origin, verdict, chain)


def _parameter_only(step: StepView) -> Iterator[Draft]:
    """Tell of the first parameter that an optimizer met with a bad gradient."""
    for param in step.params:
        grad = param.grad
        if grad is None or not step.had_bad_gradient(param):
            continue
        if grad.nonfinite:
            message = f"the gradient of {param.name} holds {count_text(grad)}"
        elif not finite(param.update_norm):
            message = f"gradients were clipped by a norm that is not finite, {param.name}'s too"
        else:
            continue
        yield Draft(
            message=f"{message}; no backward call that was seen made it",
            follows=step.blamed(), cause="parameter only", phase="backward",
            module=param.module, param=param.name, seq=param.seq, tensor=grad.id,
            value=grad.nonfinite or param.update_norm, limit=0,
            evidence={"placed": "parameter only"},
            explanation=_UNSEEN + _OF_ANOTHER_RANK * (step.world_size > 1),
            fix=_OTHER_LOGS * (step.world_size > 1) + _HOOKS,
        )  # fmt: skip
        return


def _verdict(step: StepView) -> str:
    """Say "harmful", "skipped" by a scaler, or "undecided" as long as no parameter is reached.

    Of a micro-batch it is the scaler that is, until its update comes.
    """
    if step.scaled():
        if any(o.skipped for o in step.optimizers) or (step.summary and step.summary.skipped):
            return "skipped"
        # The gate is before the scaler decides; only a step that was taken did harm.
        taken = any(not o.skipped and not finite(o.grad_norm) for o in step.optimizers)
        return "harmful" if taken and step.summary is not None else "undecided"
    return "harmful" if step.reaches_parameter() else "undecided"


def _first(step: StepView, derivative: Call | None) -> Origin | None:
    """Find the first backward call whose gradients went bad, and its forward call."""
    call = first_bad(step, derivative)
    if call is None:
        # Of a leaf that goes straight into a module nobody sees the gradient: a replay does.
        call = step.narrowed(None, "backward")[1]
        if call is None:
            return None
    call = _function_around(step, call, derivative) or call
    made, arrived = step.nonfinite(call.outputs), step.nonfinite(call.inputs)
    if call.op is not None and not arrived:
        return Origin(call, made[0], _forward(step, call.forward), True, derivative)
    if arrived and (call.op is not None or not made):
        return Origin(call, arrived[0], _consumer(step, call, arrived[0]), False, derivative)
    return Origin(call, made[0], _last_of(step, call), False, derivative)


def _function_around(step: StepView, call: Call, derivative: Call | None) -> Call | None:
    """Find the user's backward to blame that computed a module anew and ran a pass through it.

    Its own record comes after those of that pass, whose first gradient it made.
    """
    if not _began_unseen(step, _forward(step, call.forward)):
        return None
    later = (c for c in backward_pass(step, derivative)
             if c.seq > call.seq and is_own_backward(c))  # fmt: skip
    own = next(later, None)
    bad = own is not None and step.nonfinite(own.outputs) and not step.nonfinite(own.inputs)
    return own if bad else None


def _began_unseen(step: StepView, source: Call | None) -> bool:
    """Whether a module was computed anew inside a backward, and by no other module that was."""
    around = _forward(step, source.parent) if source is not None else None
    return source is not None and source.recompute and not (around is not None and around.recompute)


def _forward(step: StepView, seq: int | None) -> Call | None:
    both = (*step.calls, *step.replayed)
    return next((c for c in both if c.seq == seq), None) if seq is not None else None


def _last_of(step: StepView, call: Call) -> Call | None:
    """Find the forward call of the module whose parameter this gradient is for."""
    mine = [c for c in step.calls
            if c.phase == "forward" and c.op is None and c.module == call.module]  # fmt: skip
    return _forward(step, call.forward) or (mine[-1] if mine else None)


def _consumer(step: StepView, call: Call, grad: Tensor) -> Call | None:
    """Find the innermost forward call that took the tensor and may have spoilt its gradient.

    The one that returned the tensor if all that were seen to take it have not: it may have used
    it itself.
    """
    source = _forward(step, call.forward)
    taken = grad.grad_of
    if taken is None and source is not None:
        taken = next((id for n, id in source.outputs if n == call.inputs[0][0]), None)
    if taken is None:
        return None
    spoilt = {c.forward for c in step.calls if c.phase == "backward" and step.nonfinite(c.inputs)}
    takers = sorted((c for c in step.calls if c.phase == "forward" and not c.recompute
                     and c.seq not in spoilt and any(id == taken for _, id in c.inputs)),
                    key=lambda c: c.seq)  # fmt: skip
    # Without grad there is no backward, but of what a reentrant checkpoint computes once more.
    again = {c.module for c in step.calls if c.recompute and c.op is None}
    ran = [c for c in takers if c.grad_enabled or (c.op is None and c.module in again)]
    # Of an op all that its backward made is known, and what is around it only handed the tensor on.
    cleared = {c.seq for c in ran if _gave_finite(step, c)}
    for inner in reversed(ran):  # from the inside out
        if inner.seq in cleared and inner.parent is not None:
            cleared.add(inner.parent)
    left = [c for c in ran if c.seq not in cleared]
    if not left and ran and source is not None and source.op is not None:
        # The slope of a slope is computed where no op is seen, and belongs to either of two ops.
        twice = any(c.op == DERIVATIVE and c.phase == "forward" for c in step.calls)
        if twice and (_has_slope(ran[-1]) or not _has_slope(source)):
            left = ran
    return left[-1] if left else source if takers else None


def _has_slope(call: Call) -> bool:
    """Whether the gradient of an op is known to be computed with its values."""
    return backward.known(plain_op(call.op))


def _between(step: StepView, call: Call) -> tuple[Call | None, Call | None, Call | None]:
    """Find the parent of the call whose output got the bad gradient, the call, and its next one."""
    source = _forward(step, call.forward)
    if source is None:
        return None, None, None
    siblings = [c for c in step.calls if c.phase == "forward" and c.parent == source.parent
                and source.seq < c.seq < call.seq]  # fmt: skip
    return _forward(step, source.parent), source, min(siblings, key=lambda c: c.seq, default=None)


def _gave_finite(step: StepView, call: Call) -> bool:
    """Whether the gradients that a call made for its inputs were seen: of ops alone they are."""
    made = [c for c in step.calls if c.phase == "backward" and c.op is not None and c.outputs
            and c.forward == call.seq]  # fmt: skip
    return bool(made) and not any(step.nonfinite(c.outputs) for c in made)


def _name(step: StepView, call: Call) -> str:
    known = step.modules.get(call.module) if call.module is not None else None
    return call.op or module_text(call.module, known.cls if known else None)


def _place(
    step: StepView, origin: Origin, others: Sequence[str] = ()
) -> tuple[Call, str, dict[str, Any]]:
    """Say whose backward it was: the call, the words for it, and how sure that is.

    Args:
        others: what else may have made it.
    """
    call, got = origin.call, count_text(origin.grad)
    if origin.direct or origin.forward is not None:
        by = origin.forward or call
        placed = "direct" if origin.direct else "module"
        told = f"the backward of {_name(step, call if origin.direct else by)}"
        if not origin.direct and by.seq == call.forward:  # nobody else who was seen took it
            others = ["of what took its output unseen", *others]
        elif not origin.direct and by.op is None and step.nonfinite(call.inputs):
            # Code of the module around it may have taken the same tensor: no op of it was seen.
            around = _forward(step, by.parent)
            others = [f"of the code of {_name(step, around)}", *others] if around else others
        told = f"{told}{_or(others)} made {got} from finite gradients"
        return by, told, {"placed": placed}
    parent, source, following = _between(step, call)
    if source is None:
        return call, f"the gradient that arrives at {_name(step, call)} holds {got}", {
            "placed": "module"}  # fmt: skip
    of = _name(step, parent) if parent else "the program"
    end = f"the entry of {_name(step, following)}" if following else f"the exit of {of}"
    lines = [location_text(c.location) if c else None for c in (source, following)]
    if following is not None and not _gave_finite(step, following):
        others = [f"of {_name(step, following)} itself", *others]
    told = (f"the backward of the code of {of} between the exit of {_name(step, source)} and "
            f"{end}{_or(others)} made {got}")  # fmt: skip
    between = [source.module, following.module if following else None]
    return parent or source, told, {
        "placed": "module", "between": between, "between_lines": lines}  # fmt: skip


def _or(others: Sequence[str]) -> str:
    return "".join(f", or {other}" for other in others) + "," * bool(others)


def _narrowed(step: StepView, origin: Origin) -> tuple[Origin, str | None]:
    """Move an origin to the op that a replay came to, with how sure that is; None if seen."""
    placed = None
    if not origin.direct or is_own_backward(origin.call):
        placed, op_call = step.narrowed(None, "backward")
        if op_call is not None:
            made, of = step.nonfinite(op_call.outputs)[0], _forward(step, op_call.forward)
            origin = replace(origin, call=op_call, grad=made, forward=of, direct=True)
    elif origin.derivative is not None and origin.derivative.replay:
        placed = step.narrowed(origin.derivative.parent, "forward")[0]
    elif origin.call.replay:
        placed = step.narrowed(None, "backward")[0]
    return origin, placed


def _draft(step: StepView, origin: Origin, verdict: str, length: int) -> Draft:
    # Named before it is narrowed: in a later step the same cause is not replayed again.
    found = _place(step, origin)[0]
    cause = f"{found.module} {found.op or origin.call.op}"
    origin, placed = _narrowed(step, origin)
    call, grad = origin.call, origin.grad
    hooks = [] if origin.direct else _hooks(step)
    of_values = [] if origin.direct or hooks else _forward_hooks(step, origin)
    blamed = hooks or of_values
    by, message, evidence = _place(step, origin, ["a hook there"] if blamed else [])
    if placed is not None:
        evidence["placed"] = placed
    maker = _made_before(step, by)
    op = call.op if origin.direct else by.op
    found_there = placed is not None and call.replay and origin.direct and verdict == "harmful"
    place = f"{op} {location_text(by.location)}" if found_there else ""
    if by.replay and step.passed_over(by.module):
        evidence["passed_over"] = True
    if "passed_over" in evidence or step.was_passed_over("TT102", by.module):
        cause = f"inside {by.module}"
    waits = verdict == "undecided" and step.scaled() and step.reaches_parameter()
    if verdict != "harmful":
        # The micro-batches of an update that the scaler skips are one note with it.
        cause = "skipped" if waits else verdict
    message += first_text(grad)
    if origin.derivative is not None:
        message += f"; the loss is made of what {DERIVATIVE} returned"
        if origin.derivative.location is not None:
            message += f" at {location_text(origin.derivative.location)}"
        evidence["derivative"] = origin.derivative.seq
    if verdict == "skipped":
        scales = [a.detail["scale"] for a in step.actions if a.detail.get("scale") is not None]
        scale = f" (scale {scales[-1]})" if scales else ""
        # A range that is left gives infinities; what else makes NaN does so at any scale.
        why = "as it should while it settles" if grad.posinf or grad.neginf else (
            "and a lower scale may not help: there is NaN without infinity")  # fmt: skip
        message += f"; the scaler{scale} skipped the step, {why}"
    elif waits:
        message += "; the scaler has not decided yet"
    elif verdict == "undecided":
        message += "; no parameter is reached"
    # What arrived at a call was made by another one.
    made_it = origin.direct or origin.forward is not None
    reason = _reason(step, by) if op and made_it else _without_op(step, origin, by)
    if maker is not None:
        spoilt = step.hurt(maker.outputs)[0]
        message += f"; what went in was not finite: {maker.op} made {count_text(spoilt)}"
        inputs = [step.tensors[id] for _, id in maker.inputs if id in step.tensors]
        reason = forward.explain(Facts(plain_op(maker.op), inputs, [spoilt], maker.arguments))
    if blamed:
        reason = _reason_of_hooks(hooks, of_values)
        evidence["hooks"] = [location_text(at) for at in blamed]
    evidence["inputs"] = [{"name": n, "shape": t.shape, "dtype": t.dtype, "min": t.min,
                           "max": t.max, "zeros": t.zeros} for n, t in _inputs(step, by)
                          ] if op else []  # fmt: skip
    return Draft(
        message=message, severity="error" if verdict == "harmful" else "note",
        follows=step.blamed(), cause=cause, place=place,
        phase="backward", module=by.module, op=op,
        param=call.outputs[0][0] if call.op is None and call.outputs else None,
        seq=call.seq, tensor=grad.id, value=grad.nonfinite, limit=0,
        location=(maker.location if maker is not None else blamed[0] if len(blamed) == 1 else None)
        or by.location or call.location,
        explanation=reason.why, fix=reason.fix,
        evidence={**evidence, "verdict": verdict}, chain=_chain(step, origin, by, reason, length),
    )  # fmt: skip


def _without_op(step: StepView, origin: Origin, by: Call) -> Reason:
    """Explain a gradient whose op is not known, or was not the one to make it."""
    # Nobody was seen to take what an outermost call of that thread returned: its loss was not seen.
    if by.thread and origin.forward is None and by.seq == origin.call.forward:
        return _OTHER_THREAD
    inside = any(c.op is not None and c.parent is not None for c in step.calls)
    fix = None if by.op else _NO_OP if inside else _LOOK + _NO_OP
    if _began_unseen(step, by):
        return Reason(_NOT_BEGUN, fix)
    return Reason("finite gradients went in, others came out", fix)


def _made_before(step: StepView, by: Call) -> Call | None:
    """The op of a replay that spoilt what went into the op to blame, which hid it in forward.

    Fused attention makes zeros of a row with NaN, and NaN of its gradient.
    """
    if not by.replay or by.phase != "forward" or not step.hurt(by.inputs):
        return None
    return first_maker(step, step.hurt(by.inputs), step.replayed)


def _hooks(step: StepView) -> list[Location]:
    """Where the hooks are defined that a replay left out which found nothing to blame."""
    replays = (a for a in step.actions if a.action == "replay")
    found: Any = next((a.detail["hooks"] for a in replays if a.detail.get("hooks")), [])
    return msgspec.convert(found, list[Location])


def _forward_hooks(step: StepView, origin: Origin) -> list[Location]:
    """Where the forward hooks are defined, left out like that, that ran where the gradient is of.

    What such a hook returns has a backward like any other value. None where the replay was not
    alike: then something else may be to blame for that.
    """
    around, source, following = _between(step, origin.call)
    replays = (a.detail for a in step.actions if a.action == "replay")
    replay = next((d for d in replays if d.get("phase") == "backward"), {})
    if replay.get("differs") is not None:
        return []
    return ran_between(step, replay, around, source, following)


def _reason_of_hooks(of_gradients: list[Location], of_values: list[Location]) -> Reason:
    without = "run again without your hooks no op makes what is not finite, so "
    if of_gradients:
        return Reason(
            f"{without}one that returns another gradient may have: {named(of_gradients)}",
            "look at what the hook returns for a gradient of zeros (g / g.norm() is 0 / 0)",
        )
    return Reason(
        f"{without}the backward of one that returns another value may have: {named(of_values)}",
        ADVICE,
    )


def _inputs(step: StepView, call: Call) -> list[tuple[str, Tensor]]:
    if call.phase == "backward":
        return []
    return [(name, step.tensors[id]) for name, id in call.inputs if id in step.tensors]


def _reason(step: StepView, by: Call) -> Reason:
    """Explain the backward of an op by what went into its forward and who took its result."""
    outputs = [step.tensors[id] for _, id in by.outputs if id in step.tensors]
    inputs = [tensor for _, tensor in _inputs(step, by)]
    facts = Facts(plain_op(by.op), inputs, outputs if by.phase == "forward" else [], by.arguments)
    if by.phase == "backward":
        own = by.op if is_own_backward(by) else None
        return backward.explain(facts) if own is None else backward.explain_function(own)
    forward = (c for c in (*step.calls, *step.replayed) if c.phase == "forward")
    return backward.explain(facts, selector(by, forward))


def _chain(
    step: StepView, origin: Origin, by: Call, reason: Reason, length: int
) -> tuple[ChainLink, ...]:
    """Link what made the values to blame, the forward call and its backward; cause first."""
    call, grad = origin.call, origin.grad
    calls = completion_order(c for c in (*step.calls, *step.replayed) if c.phase == "forward")
    behind = follow(by, reason, calls, step.tensors, length - 2)
    links = [(c, c.outputs[0][1] if c.outputs else None) for c in behind]
    if by is not call:
        links.append((by, grad.grad_of))
    links.append((call, grad.id))
    if origin.derivative is not None:
        gradients = step.nonfinite(origin.derivative.outputs)
        links.append((origin.derivative, gradients[0].id))
    return tuple(ChainLink(c.seq, id, c.op or c.module, c.location) for c, id in links)
