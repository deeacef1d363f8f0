"""What is said of a call that made values that are not finite, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from msgspec import structs

from tensortrace.causes import (
    Facts,
    Reason,
    backward,
    first_text,
    follow,
    forward,
    selector,
    values_text,
)
from tensortrace.causes.held import (
    HELD,
    buffer_name,
    buffer_reason,
    calls_around,
    held_by,
    spoilt_weights,
    weights_reason,
)
from tensortrace.causes.hooks import ADVICE, named, ran_between
from tensortrace.checks import Draft, StepView, completion_order, count_text, plain_op
from tensortrace.checks.nonfinite_forward.origins import Origin, unknown_before
from tensortrace.records import Call, ChainLink, Finding, Location, Tensor
from tensortrace.text import location_text, module_text, shape_text, short_dtype

_NOT_ALL = "inputs not all of which were measured"
_UNMEASURED = "not all that it may come from was measured"
HARMLESS = "; harmless in this step: loss and gradients stay finite"
# Where nothing is trained.
_UNJUDGED = "; no outermost module returned it, and there was neither a loss nor a gradient"
# Under a GradScaler gradients are not.
_SKIPPED = "; the loss stays finite, the gradients do not: the scaler skipped the step"
_UNDECIDED = "; the loss stays finite, the gradients do not: the scaler has not decided yet"
# Something else did the harm, as far as was seen: this may still have.
_APART = "; no way from it to what did harm in this step was seen"
_ENDINGS = (HARMLESS, _UNJUDGED, _SKIPPED, _UNDECIDED, _APART)
# A module says as little as this, unless it is the op and nothing else.
_MODULES = frozenset({"softmax", "logsoftmax", "crossentropy", "nll", "bce", "kldiv", "ctc"})


def draft_of(step: StepView, origin: Origin, damage: str | None, length: int) -> Draft:
    """Tell of an origin; a note if it did no damage. `length` is that of the chain."""
    placed: str | None = "direct"
    place = ""
    # Named before it is narrowed: in a later step the same cause is not replayed again.
    # A step at rest sees no call inside an outermost one.
    found, unseen = origin.between or (), origin.call.op is None and not origin.between
    cause = " ".join(str(part) for part in (
        origin.call.module, origin.call.op, *(c.module if c else None for c in found)))  # fmt: skip
    if origin.call.op is None or origin.between:
        placed, op = step.narrowed(origin.call.seq, "forward")
        origin = Origin(op, step.nonfinite(op.outputs)[0]) if op else _passed_over(step, origin)
        place = f"{op.op} {location_text(op.location)}" if op and damage else ""
    call, tensor = origin.call, origin.tensor
    weights = spoilt_weights(step, call) if call.op is None else None
    where = _name(step, call)
    inputs = [(n, step.tensors[i]) for n, i in call.inputs if i in step.tensors]
    facts = _facts(step, call)
    reason = _reason(call, facts)
    if damage == "gradient" and call.op:
        reason = _with_backward(step, call, facts, reason)
    unknown = unknown_before(step, origin) if facts.stray is None else []
    went_in = _NOT_ALL if unknown else _went_in(facts)
    made = f"{where} made {count_text(tensor)} from {went_in}{first_text(tensor)}"
    if weights is not None:
        reason = weights_reason(step, call)
        made = f"{weights[0]} holds {count_text(weights[1])}: {where} made {count_text(tensor)}"
    location = call.location
    entered_bad = call.op is None and weights is None and not _took_hooked(step, call)
    held = held_by(step, call) if entered_bad else None
    if held is not None:
        by, bad = held
        reason, location = HELD, by.location or location
        called = buffer_name(step, bad)
        of = f"the buffer {called}" if called else "a tensor that is no input of it"
        if called:
            reason = buffer_reason(step, called, bad)
        made = (f"{where} made {count_text(tensor)} in {by.op}, of {of}: "
                f"{short_dtype(bad.dtype)} {shape_text(bad.shape)} with "
                f"{count_text(bad)}")  # fmt: skip
    evidence: dict[str, Any] = {
        "placed": placed or "module",
        "reached": damage,
        "inputs": [{"name": n, "shape": t.shape, "dtype": t.dtype, "min": t.min, "max": t.max,
                    "zeros": t.zeros, "neginf": t.neginf} for n, t in inputs],
    }  # fmt: skip
    if call.replay and (unseen or step.passed_over(call.module)):
        evidence["passed_over"] = True
    if "passed_over" in evidence or step.was_passed_over("TT101", call.module):
        cause = f"inside {call.module}"
    if origin.between and held is None:
        told, places = _code_between(step, origin.between, where)
        made = f"the code of {where} made {count_text(tensor)} {told}"
        made += ", or a call before that did: not all was measured" if unknown else ""
        evidence.update(places)
    if unknown and held is None and weights is None:
        evidence["placed"] = _UNMEASURED if placed in (None, "direct") else placed
        reason = _of_unmeasured(step, unknown)
    links = _chain(step, call, tensor, reason, length)
    reason = forward.with_chain(reason, facts, _facts_of(step, links[:-1]))
    draft = Draft(
        message=made if damage else made + _ending(step),
        follows=step.poisoned or _updated_by(step, call), severity="error" if damage else "note",
        # The same layer over and over is one note.
        cause=cause if damage else re.sub(r"\d+", "#", cause), place=place,
        phase="forward", module=call.module, op=call.op, seq=call.seq, tensor=tensor.id,
        param=weights[0] if weights else None,
        value=tensor.nonfinite, limit=0, location=location, explanation=reason.why,
        fix=reason.fix, evidence=evidence, chain=links,
    )  # fmt: skip
    return _with_hooks(step, origin, draft)


def _facts_of(step: StepView, links: Iterable[ChainLink]) -> list[Facts]:
    by_seq = {c.seq: c for c in (*step.calls, *step.replayed)}
    return [_facts(step, by_seq[link.seq]) for link in links if link.seq in by_seq]


def with_weights(step: StepView, found: Draft, call: Call) -> Draft:
    """Add of which module the weights are that were made of what an op spoilt."""
    message = f"{found.message}; {_name(step, call)} got its weights from it"
    return replace(found, message=message, evidence={**found.evidence, "weights_of": call.module})


def _with_hooks(step: StepView, origin: Origin, draft: Draft) -> Draft:
    """Name the forward hooks of the user's that a replay left out which has no op to blame."""
    hooks = _hooks_there(step, origin) if draft.op is None and draft.param is None else []
    if not hooks or (held_by(step, origin.call) and not _took_hooked(step, origin.call)):
        return draft
    return replace(
        draft,
        message=draft.message.replace(" made ", ", or a forward hook there, made ", 1),
        location=hooks[0] if len(hooks) == 1 else draft.location,
        explanation="run again without your hooks no op makes what is not finite, so one that "
        f"returns another value, or writes a weight, may have: {named(hooks)}",
        fix=ADVICE,
        evidence={**draft.evidence, "hooks": [location_text(at) for at in hooks]},
    )


def _replay_of(step: StepView, call: Call) -> Mapping[str, Any]:
    """What the replay of the outermost call around a call says."""
    seqs = {around.seq for around in calls_around(step, call)}
    replays = (a.detail for a in step.actions if a.action == "replay")
    return next((d for d in replays if d.get("phase") == "forward" and d.get("forward") in seqs),
                {})  # fmt: skip


def _took_hooked(step: StepView, call: Call) -> bool:
    """Whether a replay began with what a hook of the user's had made of the arguments."""
    return call.parent is None and bool(_replay_of(step, call).get("hooked"))


def _hooks_there(step: StepView, origin: Origin) -> list[Location]:
    """Where the forward hooks are defined that a replay left out and that ran at an origin."""
    call, after = origin.call, origin.between[0] if origin.between else None
    return ran_between(step, _replay_of(step, call), call, after, None)


def _ending(step: StepView) -> str:
    """Say of values that are not known to have done harm what has become of the step."""
    if step.damage() is not None:
        return _APART
    if not (step.scaled() and step.reaches_parameter()):
        judged = step.losses or any(c.phase == "backward" for c in step.calls)
        return HARMLESS if judged else _UNJUDGED
    return _SKIPPED if any(o.skipped for o in step.optimizers) else _UNDECIDED


def without_ending(note: Draft | Finding) -> str:
    """The message of a note but for what it says of the rest of its step."""
    message = note.message
    for ending in _ENDINGS:
        message = message.removesuffix(ending)
    return message


def _went_in(facts: Facts) -> str:
    """Say of what was given to a call that it does not explain what came out."""
    masks = sum(t.neginf for t in facts.inputs)
    told = [f"inputs with {masks} -inf" if masks else "finite inputs"] if facts.inputs else []
    told += [f"the number {facts.stray[1]}"] if facts.stray else []
    return " and ".join(told) or "no tensor"


def _code_between(
    step: StepView, ends: tuple[Call | None, Call | None], where: str
) -> tuple[str, dict[str, Any]]:
    """Name the calls that code of a module lies between: in words, and as evidence."""
    a, b = ends
    names = [_end(step, a, f"the entry of {where}", "the exit of "),
             _end(step, b, f"the exit of {where}", "the entry of ")]  # fmt: skip
    lines = [location_text(c.location) if c else None for c in ends]
    at = " to ".join(line for line in lines if line)
    told = f"between {names[0]} and {names[1]}" + (f" ({at})" if at else "")
    return told, {"between": [a and a.module, b and b.module], "between_lines": lines}


def _passed_over(step: StepView, origin: Origin) -> Origin:
    """Move to the module inside, if the step passed it over, that took what was spoilt before."""
    inside = {id for op in step.replayed for _, id in op.outputs}
    for op in step.replayed:
        bad = step.nonfinite(op.outputs)
        given = any(t.is_leaf and t.id not in inside for t in step.hurt(op.inputs))
        if bad and given and step.passed_over(op.module):
            return Origin(structs.replace(op, op=None), bad[0])
    return origin


def _updated_by(step: StepView, call: Call) -> str | None:
    """The finding that an optimizer's update follows from that came before a call of its step.

    One that evaluates a closure several times (LBFGS) moves the weights in between.
    """
    updated = any(o.seq < call.seq and not o.skipped for o in step.optimizers)
    return step.blamed() if updated else None


def _end(step: StepView, call: Call | None, otherwise: str, side: str) -> str:
    return side + _name(step, call) if call else otherwise


def _name(step: StepView, call: Call) -> str:
    cls = step.cls_of(call.module)
    path = module_text(call.module, cls)
    return call.op or (f"{path} ({cls})" if call.module and cls else path)


def _facts(step: StepView, call: Call) -> Facts:
    cls = (step.cls_of(call.module) or "").lower()
    word = plain_op(call.op) if call.op else cls.removesuffix("loss")
    inputs = [step.tensors[i] for _, i in call.inputs if i in step.tensors]
    outputs = [step.tensors[i] for _, i in call.outputs if i in step.tensors]
    return Facts(word, inputs, outputs, call.arguments)


def _reason(call: Call, facts: Facts) -> Reason:
    """Say in one sentence why this call makes what is not finite, and what to write instead."""
    if call.op is None and facts.word not in _MODULES:
        mask = any(t.neginf for t in facts.inputs)
        if mask and forward.known(facts.word):
            return forward.explain(facts)
        what = "of what went into this module only -inf" if mask else "what went into this module"
        why = f"{what} is {'not ' * mask}finite, what came out is not"
        return Reason(f"{why}: its weights, or an operation in its own forward")
    return forward.explain(facts)


def _of_unmeasured(step: StepView, unknown: list[tuple[Call, str, Tensor]]) -> Reason:
    """Name the first tensor that may have been bad before, as nobody has measured it."""
    call, name, tensor = unknown[0]
    of = re.sub("^subclass ", "a tensor of class ", tensor.unmeasured or "")
    told = f", {of}," if of != tensor.unmeasured else ""
    return Reason(
        f"{name} of {_name(step, call)}{told} was not measured: {values_text(tensor)}, which may "
        "have held what is not finite",
        f"ask it in that line: x.isfinite().all(); where that is False, what made {name} is to "
        "blame",
    )


def _with_backward(step: StepView, call: Call, facts: Facts, reason: Reason) -> Reason:
    """Add why the gradient is not finite either, although what came out was masked away."""
    if not backward.known(facts.word):
        return reason  # NaN is carried on by all of them
    if facts.outputs and not any(t.requires_grad for t in facts.outputs):
        return reason  # it has no backward
    forward_calls = (c for c in (*step.calls, *step.replayed) if c.phase == "forward")
    back = backward.explain(facts, selector(call, forward_calls))
    return Reason(f"{reason.why}; in backward {back.why}", back.fix or reason.fix, reason.blamed,
                  reason.carries)  # fmt: skip


def _chain(
    step: StepView, call: Call, tensor: Tensor, reason: Reason, length: int
) -> tuple[ChainLink, ...]:
    """Link what made the values to blame with the call itself; the cause comes first."""
    calls = [c for c in (*step.calls, *step.replayed) if c.phase == "forward"]
    links = follow(call, reason, completion_order(calls), step.tensors, length - 1)
    made = [(c, c.outputs[0][1] if c.outputs else None) for c in links]
    return tuple(ChainLink(c.seq, id, c.op or c.module, c.location)
                 for c, id in [*made, (call, tensor.id)])  # fmt: skip
