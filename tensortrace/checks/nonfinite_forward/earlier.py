"""Values that an earlier step left: harmless there, and the cause of what this one has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tensortrace.causes.derivatives import (
    Trails,
    derivative_to_blame,
    parameter_shapes,
    upstream,
)
from tensortrace.causes.held import fit_as_weights, spoilt_weights, taken_inside, unhealed
from tensortrace.checks import MOVED, Draft, StepView, is_damage, is_left_by
from tensortrace.checks.nonfinite_forward.origins import (
    Origin,
    damaged_by,
    first_made,
    is_backward_of,
)
from tensortrace.checks.nonfinite_forward.told import draft_of, without_ending
from tensortrace.records import Call, ChainLink, Finding, Tensor
from tensortrace.text import location_text, number_text


@dataclass(frozen=True, slots=True)
class Noted:
    """A note about values that did no harm in their step, and what was there of them at its end."""

    note: Draft
    tensor: Tensor
    left: list[Tensor]


def about(taken: list[Tensor], before: list[Noted]) -> Draft:
    """The note about what came in; where that was computed on from it, one that looks like it."""
    known, shapes = looks_of(taken), {t.shape for t in taken}
    same = [noted.note for noted in before if known & looks_of([noted.tensor])]
    alike = [noted.note for noted in before if noted.tensor.shape in shapes]
    return [*same, *alike, before[0].note][0]


def looks_of(tensors: Iterable[Tensor]) -> set[tuple[Any, ...]]:
    """What tensors are known again by when their ids are others: shape and counts."""
    return {(t.shape, t.nan, t.posinf, t.neginf) for t in tensors}


def notes_of(step: StepView, origins: list[Origin], length: int) -> list[Noted]:
    """Tell of harmless values, and keep what the next step may have to know of them."""
    trails = Trails(step)
    forward = step.forward()
    left = unhealed(step, (c for c in forward if c.parent is None))
    changed = [t for c in forward for t in step.hurt(c.outputs) if t.previous is not None]
    notes = []
    for origin in origins:
        note = draft_of(step, origin, None, length)
        reached = trails.downstream(origin.tensor.id)
        # The shapes of what they were written to in place.
        wrote = sorted({t.shape for t in changed if t.id in reached and t.shape is not None})
        note = replace(note, evidence={**note.evidence, "wrote": wrote}) if wrote else note
        notes.append(Noted(note, origin.tensor, [t for t in left if t.id in reached]))
    return notes


def written_by(step: StepView, call: Call, before: list[Noted]) -> Draft | None:
    """Find the note of the step before whose values went into the weights of a module."""
    if call.op is not None or not before or step.narrowed(call.seq, "forward")[1] is not None:
        return None
    shapes, own = parameter_shapes(step, call.module), spoilt_weights(step, call)
    # What stands in a parameter is its module's; who wrote it there is not told by its values.
    taken = (t for t in taken_inside(step, call) if own is None or t.id != own[1].id)
    looks = looks_of(taken)
    for noted in before:
        # Written to in place; or what was computed is the weight.
        if shapes.intersection(noted.note.evidence.get("wrote", ())):
            return noted.note
        if looks & looks_of(noted.left) or fit_as_weights(step, call, noted.left):
            return noted.note
    return None


def from_before(
    step: StepView, note: Draft, found: Draft | None, damage: str | None = None
) -> Draft:
    """Make an error of a note of the step before, whose values did harm in this one.

    With `found`, what this step says of the module whose weights they were written to.
    """
    message = f"{without_ending(note)}; made at the end of step {step.number - 1}"
    if found is not None:
        message += f" and written to weights: {found.message}"
        damage = found.evidence["reached"]
    evidence = {**note.evidence, "reached": damage, "made_in_step": step.number - 1}
    return replace(
        note, message=message, severity="error",
        follows=step.blamed() or moved_by_hand(step, note) if found is None else found.follows,
        cause=note.cause if found is None else found.cause, seq=None, tensor=None,
        param=note.param if found is None else found.param, evidence=evidence,
        chain=_links_of(note),
    )  # fmt: skip


def _links_of(note: Draft | Finding) -> tuple[ChainLink, ...]:
    """The chain of a note of another step, whose seqs and tensor ids are none of this one."""
    return tuple(ChainLink(None, None, link.op, link.location) for link in note.chain)


def made_earlier(step: StepView, damage: str) -> Finding | None:
    """Find the note of an earlier step whose values did the damage: kept in a list or a buffer."""
    notes = [f for f in step.findings if f.code == "TT101" and f.severity == "note"]
    if not notes or derivative_to_blame(step) is not None:
        return None
    if damage == "gradient":
        first = first_made(step)
        took = [c for c in step.forward() if first is not None and is_backward_of(first, c)]
        bad = [t.id for c in took for t in step.hurt(c.inputs)]
    else:
        bad = damaged_by(step, damage)
    reached = upstream(step, bad)[0]
    for call in step.forward():
        for tensor in step.hurt(call.inputs) if call.parent is None else ():
            for note in reversed(notes) if tensor.id in reached else ():
                if is_left_by(note, tensor):
                    return note
    return None


def from_earlier(step: StepView, note: Finding, damage: str) -> Draft:
    """Make an error of a note of some earlier step, whose values did harm in this one."""
    return Draft(
        message=f"{without_ending(note)}; made in step {note.step}",
        follows=step.blamed(), cause=f"earlier {note.id}", phase="forward", module=note.module,
        op=note.op, value=note.value, limit=0, location=note.location,
        explanation=note.explanation, fix=note.fix,
        evidence={**note.evidence, "reached": damage, "made_in_step": note.step}, param=note.param,
        chain=_links_of(note),
    )  # fmt: skip


def left_mask(step: StepView, call: Call, before: list[Noted]) -> Draft | None:
    """Find the note of the step before about -inf that went in: its end prepares data, too."""
    taken = {t.shape for t in step.nonfinite(call.inputs)
             if t.neginf and t.from_step == step.number - 1}  # fmt: skip
    masks = (n for n in before if n.tensor.neginf and n.tensor.shape in taken)
    return next((noted.note for noted in masks), None)


def grown_from(step: StepView, draft: Draft) -> str | None:
    """The finding whose values have grown since: an op on the way to its op is over the range now.

    Or one inside a module on that way, which was not seen. Since then no loss has been finite.
    """
    inside = f"{draft.module}."
    for finding in reversed(step.findings):
        if finding.step <= step.healthy or finding.step == step.number:
            return None
        # Its own op in another module, a block of the same class, is another cause.
        way = ((link.op, location_text(link.location)) for link in finding.chain
               if link.seq != finding.seq or draft.module == finding.module)  # fmt: skip
        if not is_damage(finding):
            continue
        through = any(link.op and link.seq != finding.seq and inside.startswith(f"{link.op}.")
                      for link in finding.chain)  # fmt: skip
        if through or (draft.op, location_text(draft.location)) in way:
            return finding.id
    return None


def after_leap(step: StepView, draft: Draft, leap: float) -> Draft:
    """Add that the update before moved all weights much further than they were long."""
    ratios = [r for r in step.before.modules.update_ratio if r] if step.before is not None else []
    if draft.follows is not None or not ratios or min(ratios) <= leap:
        return draft
    told = (f"the update before moved all weights by {number_text(min(ratios))} times their norm "
            f"or more (limit {leap:g})")  # fmt: skip
    fix = "a lower learning rate, warm-up, clip_grad_norm_"
    return replace(
        draft, explanation="; ".join(filter(None, (told, draft.explanation))),
        fix="; if that is not it: ".join(filter(None, (fix, draft.fix))),
    )  # fmt: skip


def moved_by_hand(step: StepView, found: Draft) -> str | None:
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
