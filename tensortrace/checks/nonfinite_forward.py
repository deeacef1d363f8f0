"""TT101: the forward call that made the first NaN or infinity."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
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
from tensortrace.causes.derivatives import (
    derivative_to_blame,
    first_maker,
    is_placed,
    leaked,
    made_of,
    parameter_shapes,
    upstream,
)
from tensortrace.causes.held import (
    HELD,
    WEIGHTS,
    buffer_name,
    buffer_reason,
    calls_around,
    fit_as_weights,
    given_weights,
    held_by,
    is_below,
    spoilt_weights,
    taken_inside,
    taken_weight,
    unhealed,
)
from tensortrace.checks import (
    FILLS,
    MOVED,
    Draft,
    StepView,
    check,
    completion_order,
    count_text,
    is_damage,
    is_left_by,
    plain_op,
)
from tensortrace.records import DERIVATIVE, Call, ChainLink, Finding, Location, Tensor
from tensortrace.text import location_text, module_text, shape_text, short_dtype

# Origins kept of one step: the first is what counts, the rest help to find which one did harm.
KEPT = 16
_NOT_ALL = "inputs not all of which were measured"
_UNMEASURED = "not all that it may come from was measured"
HARMLESS = "; harmless in this step: loss and gradients stay finite"
# Under a GradScaler gradients are not.
_SKIPPED = "; the loss stays finite, the gradients do not: the scaler skipped the step"
_UNDECIDED = "; the loss stays finite, the gradients do not: the scaler has not decided yet"
_ENDINGS = (HARMLESS, _SKIPPED, _UNDECIDED)
# A module says as little as this, unless it is the op and nothing else.
_MODULES = frozenset({"softmax", "logsoftmax", "crossentropy", "nll", "bce", "kldiv", "ctc"})


@dataclass(frozen=True, slots=True)
class Origin:
    """A call that made non-finite values, or the parent's own code before a call that got them."""

    call: Call
    tensor: Tensor
    between: tuple[Call | None, Call | None] | None = None


@dataclass(frozen=True, slots=True)
class Noted:
    """A note about values that did no harm in their step, and what was there of them at its end."""

    note: Draft
    tensor: Tensor
    left: list[Tensor]


@check(
    "TT101", "nonfinite-forward", severity="error", when="gate", after=("TT104", "TT105"),
    of=("calls",),
)  # fmt: skip
def nonfinite_forward(step: StepView, memory: dict[str, Any], *, chain: int = 8) -> Iterator[Draft]:
    """A forward call makes NaN or infinity out of finite inputs.

    Symptom:    the loss turns NaN or infinite; every value after this call is spoilt
    Threshold:  the first call in completion order with NaN or +inf among its outputs (or -inf
                where no input had it and the op is no fill) and neither among its inputs, whose
                damage reaches the loss, a gradient, or the output of an outermost module; a note
                where it reaches none of them. Up to `chain` links of what made its values are told
    Source:     origin rule as msprobe's overflow_check (input normal, output anomalous); fills and
                -inf masks as in TorchLens; measured on torch's op_db, where fills with -inf are
                the only false origins
    Fix:        keep the argument of the named op inside its domain (clamp, eps), or compute the
                named module in float32
    Misses:     at module level the op inside a module is deduced from its neighbours, not seen, and
                of a forward hook only the place is named; a value masked away before any module
                boundary is not seen and does no harm
    Example:    p = torch.softmax(logits, dim=1)
                loss = -torch.log(p)[torch.arange(len(y)), y].mean()  # a p that rounds to 0: inf
    Fixed:      loss = F.cross_entropy(logits, y)
    """
    if memory.get("step") != step.number:
        # Of the step before, since data may be prepared after the last update. That reaches back
        # one step only, and the step before a finding is written in full like its own.
        before = memory["notes"] if memory.get("step") == step.number - 1 else []
        memory.update(step=step.number, origins=[], told=False, before=before, notes=[])
    origins: list[Origin] = memory["origins"]
    if step.bad and len(origins) < KEPT:
        origins += _origins(step)[: KEPT - len(origins)]
    raised = _raised(step)
    if raised is not None:
        origins[:] = [raised]
    if memory["told"] or not (step.bad or origins):
        return
    damage = step.damage()
    guilty = _guilty(step, origins, damage) if damage and origins else None
    if guilty and _is_backward(step, guilty.call):
        return  # TT102 has the place in the pass that made it
    left = _left_mask(step, guilty.call, memory["before"]) if guilty else None
    if left is not None:
        memory["told"] = True
        yield _from_before(step, left, None, damage)
    elif guilty:
        memory["told"] = True
        maker = _weights_from(step, guilty.call, origins)
        found = _draft(step, maker or guilty, damage, chain)
        if maker is not None:
            found = _with_weights(step, found, guilty.call)
        follows = found.follows or _by_hand(step, found) or _grown(step, found)
        found = replace(found, follows=follows)
        note = _written_by(step, guilty.call, memory["before"])
        yield _from_before(step, note, found) if note else found
    elif damage == "loss" and (leak := _leak(step, memory, chain)) is not None:
        memory["told"] = True
        yield leak
    elif damage and memory["before"] and (taken := step.inherited()):
        memory["told"] = True
        yield _from_before(step, _about(taken, memory["before"]), None, damage)
    elif damage and not guilty and (earlier := _made_earlier(step, damage)) is not None:
        memory["told"] = True
        yield _from_earlier(step, earlier, damage)
    elif step.summary is not None and not step.poisoned and step.blamed() is None:
        # 0 * -inf of a value that is a note already is no second one.
        own = [origin for origin in origins if not step.nonfinite(origin.call.inputs)]
        notes = [_note(step, origin, chain) for origin in own]
        memory["notes"] = [_noted(step, note, o) for note, o in zip(notes, own, strict=True)]
        yield from (note for note, o in zip(notes, own, strict=True)
                    if not _is_backward(step, o.call))  # fmt: skip


def _raised(step: StepView) -> Origin | None:
    """The call that ended the run because of what it made itself, or the op in it that did."""
    call = step.raised_on_values()
    spoilt = step.spoilt_inside(call)
    if call is None or spoilt is None:
        return None
    maker = first_maker(step, [spoilt], step.replayed or step.calls)
    # Before it another may have made something that did no harm.
    if maker is None or maker is step.narrowed(call.seq, "forward")[1]:
        return Origin(call, spoilt)
    return Origin(maker, step.hurt(maker.outputs)[0])


def _leak(step: StepView, memory: dict[str, Any], chain: int) -> Draft | None:
    """Tell what made a part of the loss that left its module unseen.

    Only the first time is there a replay: what the same line takes later is the same again.
    """
    left = leaked(step)
    if not left:
        return None
    known: dict[Location | None, Draft] = memory.setdefault("leaks", {})
    line = left[0][0].location
    origin = _leaked(step, [tensor for _, tensor in left]) if line not in known else None
    if origin is not None:
        known[line] = _draft(step, origin, "loss", chain)
    return known.get(line)


def _leaked(step: StepView, left: list[Tensor]) -> Origin | None:
    """The op inside a module that made what left it unseen, as a replay has met it."""
    looks = _looks(left)
    same = [t for c in step.replayed for t in step.hurt(c.outputs) if looks & _looks([t])]
    maker = first_maker(step, same[-1:], step.replayed) if same else None
    return Origin(maker, step.hurt(maker.outputs)[0]) if maker is not None else None


def _is_backward(step: StepView, call: Call) -> bool:
    """Whether a backward pass that was seen made the values: inside this call, or before it."""
    blamed = derivative_to_blame(step)
    if blamed is not None and is_placed(step, blamed):
        inside = blamed.replay and step.narrowed(call.seq, "forward")[1] is blamed
        if inside or (not blamed.replay and blamed.seq < call.seq):
            return True
    return call.op == DERIVATIVE and is_placed(step, call)


def _about(taken: list[Tensor], before: list[Noted]) -> Draft:
    """The note about what came in; where that was computed on from it, one that looks like it."""
    known, shapes = _looks(taken), {t.shape for t in taken}
    same = [noted.note for noted in before if known & _looks([noted.tensor])]
    alike = [noted.note for noted in before if noted.tensor.shape in shapes]
    return [*same, *alike, before[0].note][0]


def _looks(tensors: Iterable[Tensor]) -> set[tuple[Any, ...]]:
    return {(t.shape, t.nan, t.posinf, t.neginf) for t in tensors}


def _noted(step: StepView, note: Draft, origin: Origin) -> Noted:
    outside = (c for c in step.forward() if c.parent is None)
    left = [t for t in unhealed(step, outside) if origin.tensor.id in upstream(step, [t.id])[0]]
    return Noted(note, origin.tensor, left)


def _note(step: StepView, origin: Origin, length: int) -> Draft:
    """Tell of harmless values, and of the shapes of what they were written to in place."""
    note = _draft(step, origin, None, length)
    changed = (t for c in step.forward() for t in step.hurt(c.outputs) if t.previous is not None)
    wrote = {t.shape for t in changed if origin.tensor.id in upstream(step, [t.id])[0]}
    return replace(note, evidence={**note.evidence, "wrote": sorted(wrote)}) if wrote else note


def _written_by(step: StepView, call: Call, before: list[Noted]) -> Draft | None:
    """Find the note of the step before whose values went into the weights of a module."""
    if call.op is not None or not before or step.narrowed(call.seq, "forward")[1] is not None:
        return None
    shapes, own = parameter_shapes(step, call.module), spoilt_weights(step, call)
    # What stands in a parameter is its module's; who wrote it there is not told by its values.
    taken = (t for t in taken_inside(step, call) if own is None or t.id != own[1].id)
    looks = _looks(taken)
    for noted in before:
        # Written to in place; or what was computed is the weight.
        if shapes.intersection(noted.note.evidence.get("wrote", ())):
            return noted.note
        if looks & _looks(noted.left) or fit_as_weights(step, call, noted.left):
            return noted.note
    return None


def _from_before(
    step: StepView, note: Draft, found: Draft | None, damage: str | None = None
) -> Draft:
    """Make an error of a note of the step before, whose values did harm in this one.

    With `found`, what this step says of the module whose weights they were written to.
    """
    message = f"{_without_ending(note)}; made at the end of step {step.number - 1}"
    if found is not None:
        message += f" and written to weights: {found.message}"
        damage = found.evidence["reached"]
    evidence = {**note.evidence, "reached": damage, "made_in_step": step.number - 1}
    return replace(
        note, message=message, severity="error",
        follows=step.blamed() or _by_hand(step, note) if found is None else found.follows,
        cause=note.cause if found is None else found.cause, seq=None, tensor=None,
        param=note.param if found is None else found.param, evidence=evidence,
        chain=_links_of(note),
    )  # fmt: skip


def _ending(step: StepView) -> str:
    """Say of values that did no harm what has become of the step."""
    if not (step.scaled() and step.reaches_parameter()):
        return HARMLESS
    return _SKIPPED if any(o.skipped for o in step.optimizers) else _UNDECIDED


def _without_ending(note: Draft | Finding) -> str:
    message = note.message
    for ending in _ENDINGS:
        message = message.removesuffix(ending)
    return message


def _weights_from(step: StepView, call: Call, origins: list[Origin]) -> Origin | None:
    """Find what spoilt weights that a module was given in this step, by no optimizer."""
    given = given_weights(step, call)
    reached = upstream(step, (tensor.id for tensor in given))[0] if given else set()
    before = (o for o in origins if o.call.seq < call.seq and o.call is not call)
    return next((o for o in before if o.tensor.id in reached), None)


def _with_weights(step: StepView, found: Draft, call: Call) -> Draft:
    """Add of which module the weights are that were made of what an op spoilt."""
    message = f"{found.message}; {_name(step, call)} got its weights from it"
    return replace(found, message=message, evidence={**found.evidence, "weights_of": call.module})


def _links_of(note: Draft | Finding) -> tuple[ChainLink, ...]:
    """The chain of a note of another step, whose seqs and tensor ids are none of this one."""
    return tuple(ChainLink(None, None, link.op, link.location) for link in note.chain)


def _made_earlier(step: StepView, damage: str) -> Finding | None:
    """Find the note of an earlier step whose values did the damage: kept in a list or a buffer."""
    notes = [f for f in step.findings if f.code == "TT101" and f.severity == "note"]
    if not notes or derivative_to_blame(step) is not None:
        return None
    if damage == "gradient":
        first = _first_made(step)
        took = [c for c in step.forward() if first is not None and _is_of(first, c)]
        bad = [t.id for c in took for t in step.hurt(c.inputs)]
    else:
        bad = _damaged(step, damage)
    reached = upstream(step, bad)[0]
    for call in step.forward():
        for tensor in step.hurt(call.inputs) if call.parent is None else ():
            for note in reversed(notes) if tensor.id in reached else ():
                if is_left_by(note, tensor):
                    return note
    return None


def _from_earlier(step: StepView, note: Finding, damage: str) -> Draft:
    """Make an error of a note of some earlier step, whose values did harm in this one."""
    return Draft(
        message=f"{_without_ending(note)}; made in step {note.step}",
        follows=step.blamed(), cause=f"earlier {note.id}", phase="forward", module=note.module,
        op=note.op, value=note.value, limit=0, location=note.location,
        explanation=note.explanation, fix=note.fix,
        evidence={**note.evidence, "reached": damage, "made_in_step": note.step}, param=note.param,
        chain=_links_of(note),
    )  # fmt: skip


def _origins(step: StepView) -> list[Origin]:
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


def _damaged(step: StepView, damage: str) -> list[int]:
    """The ids of the bad tensors that the damage shows in: losses, or what modules returned."""
    if damage == "loss":
        losses = (a.tensor for a in step.actions if a.action == "loss")
        return [id for id in losses if id is not None and id in step.tensors]
    return [t.id for c in step.calls if c.parent is None for t in step.hurt(c.outputs)]


def _first_made(step: StepView) -> Call | None:
    """The first backward call that made a bad gradient of finite ones."""
    backward = (c for c in step.calls if c.phase == "backward" and step.nonfinite(c.outputs))
    return next((c for c in backward if not step.nonfinite(c.inputs)), None)


def _is_of(backward: Call, call: Call) -> bool:
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


def _left_mask(step: StepView, call: Call, before: list[Noted]) -> Draft | None:
    """Find the note of the step before about -inf that went in: its end prepares data, too."""
    taken = {t.shape for t in step.nonfinite(call.inputs)
             if t.neginf and t.from_step == step.number - 1}  # fmt: skip
    masks = (n for n in before if n.tensor.neginf and n.tensor.shape in taken)
    return next((noted.note for noted in masks), None)


def _guilty(step: StepView, origins: list[Origin], damage: str) -> Origin | None:
    """Pick the origin whose values are found on the way back from the damage."""
    if damage == "gradient":
        first = _first_made(step)
        if first is None:
            return _after_backward(step, origins)
        # Values that a masked or sparse product leaves out do harm as factors of its gradient.
        took = [t.id for c in step.forward() if _is_of(first, c) for t in step.hurt(c.inputs)]
        behind = upstream(step, took)[0] if took else set()
        # An op may make something finite of NaN, and NaN of its gradient: fused attention does.
        backward = (c for c in step.calls if c.phase == "backward" and step.nonfinite(c.inputs))
        spoilt = {c.forward for c in backward} if first.op is None else set()
        own = [o for o in origins if _is_of(first, o.call)]
        taken = [o for o in origins if o.tensor.id in behind]
        hidden = [o for o in origins if o.call.seq in spoilt]
        return next(iter([*own, *taken, *hidden]), None)
    bad = _damaged(step, damage)
    reached, lost = upstream(step, bad)
    for origin in origins:
        if origin.tensor.id in reached:
            return _before_unmeasured(step, origins, bad) if _unknown(step, origin) else origin
    return origins[0] if (lost or not bad) and step.blamed() is None else None


def _unknown(step: StepView, origin: Origin) -> list[tuple[Call, str, Tensor]]:
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


def _draft(step: StepView, origin: Origin, damage: str | None, length: int) -> Draft:
    placed: str | None = "direct"
    # Named before it is narrowed: in a later step the same cause is not replayed again.
    found = origin.between or ()
    cause = " ".join(str(part) for part in (
        origin.call.module, origin.call.op, *(c.module if c else None for c in found)))  # fmt: skip
    if origin.call.op is None or origin.between:
        placed, op = step.narrowed(origin.call.seq, "forward")
        if op is not None:
            origin = Origin(op, step.nonfinite(op.outputs)[0])
        else:
            origin = _passed_over(step, origin)
    call, tensor = origin.call, origin.tensor
    weights = spoilt_weights(step, call) if call.op is None else None
    where = _name(step, call)
    inputs = [(n, step.tensors[i]) for n, i in call.inputs if i in step.tensors]
    facts = _facts(step, call)
    reason = _reason(call, facts)
    if damage == "gradient" and call.op:
        reason = _with_backward(step, call, facts, reason)
    unknown = _unknown(step, origin) if facts.stray is None else []
    went_in = _NOT_ALL if unknown else _went_in(facts)
    made = f"{where} made {count_text(tensor)} from {went_in}{first_text(tensor)}"
    if weights is not None:
        reason = WEIGHTS
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
    if call.replay and step.passed_over(call.module):
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
        cause=cause if damage else re.sub(r"\d+", "#", cause),
        phase="forward", module=call.module, op=call.op, seq=call.seq, tensor=tensor.id,
        param=weights[0] if weights else None,
        value=tensor.nonfinite, limit=0, location=location, explanation=reason.why,
        fix=reason.fix, evidence=evidence, chain=links,
    )  # fmt: skip
    return _with_hooks(step, origin, draft)


def _facts_of(step: StepView, links: Iterable[ChainLink]) -> list[Facts]:
    by_seq = {c.seq: c for c in (*step.calls, *step.replayed)}
    return [_facts(step, by_seq[link.seq]) for link in links if link.seq in by_seq]


def _with_hooks(step: StepView, origin: Origin, draft: Draft) -> Draft:
    """Name the forward hooks of the user's that a replay left out which has no op to blame."""
    hooks = _hooks_there(step, origin) if draft.op is None and draft.param is None else []
    if not hooks or (held_by(step, origin.call) and not _took_hooked(step, origin.call)):
        return draft
    names = ", ".join(f"{at.function} ({location_text(at)})" for at in hooks)
    return replace(
        draft,
        message=draft.message.replace(" made ", ", or a forward hook there, made ", 1),
        location=hooks[0] if len(hooks) == 1 else draft.location,
        explanation="run again without your hooks no op makes what is not finite, so one that "
        f"returns another value, or writes a weight, may have: {names}",
        fix="look at what the hook divides by, or takes the root or the logarithm of",
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
    """Where the forward hooks are defined that a replay left out and that ran at an origin.

    A hook runs inside of the call for which it is, but after its entry or exit was recorded.
    """
    call, after = origin.call, origin.between[0] if origin.between else None
    found: list[Location] = []
    for hook in _replay_of(step, call).get("forward_hooks", ()):
        before, behind = set(hook["before"]), set(hook["after"])
        unseen = (p for p in before | behind if is_below(p, call.module) and step.passed_over(p))
        entered = call.module in before and after is None
        if entered or any(unseen) or (after is not None and after.module in behind):
            found.append(msgspec.convert(hook["at"], Location))
    return found


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


def _grown(step: StepView, draft: Draft) -> str | None:
    """The finding whose values have grown since: an op on the way to its op is over the range now.

    Since then no loss has been finite.
    """
    for finding in reversed(step.findings):
        if finding.step <= step.healthy or finding.step == step.number:
            return None
        way = ((link.op, location_text(link.location)) for link in finding.chain)
        if is_damage(finding) and (draft.op, location_text(draft.location)) in way:
            return finding.id
    return None


def _by_hand(step: StepView, found: Draft) -> str | None:
    """The finding about gradients that weights follow from which no optimizer has moved since.

    A loss that is not finite has such gradients, too.
    """
    damage = [f for f in step.findings if is_damage(f)]
    spoils = damage and (damage[-1].code in ("TT102", "TT103")
                         or damage[-1].evidence.get("reached") in ("loss", "gradient"))  # fmt: skip
    # Where an optimizer does, a batch with such gradients may have been left out.
    moved = step.updated < 0 or found.param is not None or found.evidence["placed"] in MOVED
    if found.op is not None or not moved or not spoils:
        return None
    last, left_alone = damage[-1].step, max(step.updated, step.skipped)
    return damage[-1].id if left_alone < last < step.number and step.healthy <= last else None


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
