"""TT101: the forward call that made the first NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tensortrace.causes.derivatives import derivative_to_blame, first_maker, is_placed, leaked
from tensortrace.checks import Draft, StepView, check
from tensortrace.checks.nonfinite_forward.earlier import (
    about,
    after_leap,
    from_before,
    from_earlier,
    grown_from,
    left_mask,
    looks_of,
    made_earlier,
    moved_by_hand,
    notes_of,
    written_by,
)
from tensortrace.checks.nonfinite_forward.origins import Origin, guilty_of, origins_of, weights_from
from tensortrace.checks.nonfinite_forward.told import draft_of, with_weights
from tensortrace.records import DERIVATIVE, Call, Location, Tensor

# Origins kept of one step: the first is what counts, the rest help to find which one did harm.
KEPT = 16


@check(
    "TT101", "nonfinite-forward", severity="error", when="gate", after=("TT104", "TT105"),
    of=("calls",),
)  # fmt: skip
def nonfinite_forward(
    step: StepView, memory: dict[str, Any], *, chain: int = 8, leap: float = 10.0
) -> Iterator[Draft]:
    """A forward call makes NaN or infinity out of finite inputs.

    Symptom:    the loss turns NaN or infinite; every value after this call is spoilt
    Threshold:  the first call in completion order with NaN or +inf among its outputs (or -inf
                where no input had it and the op is no fill) and neither among its inputs, whose
                damage reaches the loss, a gradient, or the output of an outermost module; a note
                where it reaches none of them. Up to `chain` links of what made its values are told,
                and an update just before that moved all weights by > leap * their norm
    Source:     origin rule as msprobe's overflow_check (input normal, output anomalous); fills and
                -inf masks as in TorchLens; measured on torch's op_db, where fills with -inf are
                the only false origins; `leap` as WeightUpdateRatio of SageMaker Debugger
    Fix:        keep the argument of the named op inside its domain (clamp, eps), or compute the
                named module in float32; a lower learning rate after such an update
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
        origins += origins_of(step)[: KEPT - len(origins)]
    raised = _raised(step)
    if raised is not None:
        origins[:] = [raised]
    if memory["told"] or not (step.bad or origins):
        return
    damage = step.damage()
    guilty = guilty_of(step, origins, damage) if damage and origins else None
    if guilty and _is_backward(step, guilty.call):
        return  # TT102 has the place in the pass that made it
    left = left_mask(step, guilty.call, memory["before"]) if guilty else None
    if left is not None:
        memory["told"] = True
        yield from_before(step, left, None, damage)
    elif guilty:
        memory["told"] = True
        maker = weights_from(step, guilty.call, origins)
        found = draft_of(step, maker or guilty, damage, chain)
        if maker is not None:
            found = with_weights(step, found, guilty.call)
        follows = found.follows or moved_by_hand(step, found) or grown_from(step, found)
        found = after_leap(step, replace(found, follows=follows), leap)
        note = written_by(step, guilty.call, memory["before"])
        yield from_before(step, note, found) if note else found
    elif damage == "loss" and (leak := _leak(step, memory, chain)) is not None:
        memory["told"] = True
        yield leak
    elif damage and memory["before"] and (taken := step.inherited()):
        memory["told"] = True
        yield from_before(step, about(taken, memory["before"]), None, damage)
    elif damage and not guilty and (earlier := made_earlier(step, damage)) is not None:
        memory["told"] = True
        yield from_earlier(step, earlier, damage)
    elif step.summary is not None and not step.poisoned and step.blamed() is None:
        # 0 * -inf of a value that is a note already is no second one.
        own = [origin for origin in origins if not step.nonfinite(origin.call.inputs)]
        memory["notes"] = notes = notes_of(step, own, chain)
        yield from (noted.note for noted, origin in zip(notes, own, strict=True)
                    if not _is_backward(step, origin.call))  # fmt: skip


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
        known[line] = draft_of(step, origin, "loss", chain)
    return known.get(line)


def _leaked(step: StepView, left: list[Tensor]) -> Origin | None:
    """The op inside a module that made what left it unseen, as a replay has met it."""
    looks = looks_of(left)
    same = [t for c in step.replayed for t in step.hurt(c.outputs) if looks & looks_of([t])]
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
