"""TT211: a term of the loss that is made of a model's output and cut off from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tensortrace.causes.terms import behind, hands_on, is_linear, makers, sum_of
from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.records import DERIVATIVE, Action, Call, ChainLink, Tensor
from tensortrace.text import location_text, module_text

_FIXES = {
    "op": "leave it out of the loss, or use a form that can be differentiated: softmax in place of "
    "argmax, sigmoid in place of a comparison; what only informs is not added to the loss",
    "detached": "make the term of what is not detached; what only informs is not added to the loss",
    "no grad": "make the term of what the model that learns returned, with gradients on; what only "
    "informs is not added to the loss",
}


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a term loses its graph: the call that does so, or that takes what is detached.

    A number that is detached and only added, a `value`, says that the term is put together on
    purpose.
    `id` is that of the tensor before the cut, which another term may come from as well.
    """

    how: str
    call: Call
    id: int


@check("TT211", "term-cut-off", when="full", of=("calls",))
def term_cut_off(step: StepView, memory: dict[str, Any], *, sustain: int = 8) -> Iterator[Draft]:
    """A term of the loss comes from a model and has no graph, so that it moves no weight.

    Symptom:    what this term asks for is never learnt (predictions that agree, a discriminator
                that is deceived), while the loss goes down by its other terms
    Threshold:  in `sustain` full steps the loss is a sum, weighted by numbers, of which one term
                requires a gradient and another, a single number other than 0, does not, though it
                is made with gradients on. That one comes, by an op or a module that returns what
                does not, from what requires a gradient; or, by more than sums, means and numbers,
                from what is detached, or (a note) from what a module with parameters to train has
                made with gradients off. No term with a graph comes from the same place, none has
                been made by the same line, and no term is detached itself
    Source:     definition; `sustain` chosen here. A constant that completes a value (the entropy
                of a teacher in a divergence, hard - soft.detach() + soft) shares what it is made
                of, or is a sum of it; a term that is off is 0; the loss of a reference, which is
                subtracted, is made with gradients off
    Fix:        make the term of what the model that learns has returned, without argmax,
                comparisons, detach() and no_grad; what only informs is not added to the loss
    Misses:     what becomes a number on the way (.item(), float, NumPy) or a new tensor
                (torch.tensor); a mean of what is detached; a term made inside a module together
                with others, or in a loop whose ops are passed over; a term that is switched on
                after the first steps, in a long run; one that is detached in the first steps only
                is reported
    Example:    coarse, fine = model(x)
                wrong = parent[fine.argmax(1)] != coarse.argmax(1)
                loss = cross_entropy(fine, y) + wrong.float().mean()
    Fixed:      coarse, fine = model(x)
                expected = fine.softmax(1) @ belongs_to
                loss = cross_entropy(fine, y) + kl_div(coarse.log_softmax(1), expected)
    """
    terms, bare = _terms(step)
    known: set[Any] = memory.setdefault("known", set())
    known.update(set(map(_place, terms.values())) - {_place(call) for _, _, call in bare})
    bare = [one for one in bare if _place(one[2]) not in known]
    if not bare:
        return
    made = makers(step.forward())
    used = _Used(step, terms, made)
    found: dict[Any, Draft] = {}
    for loss, id, call in bare:
        cuts = list(_cuts(step, id, made))
        if cuts and not any(cut.how == "value" or used.shares(cut) for cut in cuts):
            last = max(cuts, key=lambda cut: cut.call.seq)
            found[_place(call)] = _draft(loss, call, last, sustain)
    counts: dict[Any, int] = memory.setdefault("counts", {})
    for place, draft in found.items():
        counts[place] = counts.get(place, 0) + 1
        if counts[place] >= sustain:
            yield draft


def _terms(step: StepView) -> tuple[dict[int, Call], list[tuple[Action, int, Call]]]:
    """The terms with a graph of all losses, by id; those without, which are worth a look."""
    terms: dict[int, Call] = {}
    bare: list[tuple[Action, int, Call]] = []
    for loss in step.losses:
        if loss.tensor is None:
            continue
        parts = sum_of(loss.tensor, step.forward(), step.tensors)
        terms.update((id, call) for id, call in parts.terms if step.tensors[id].requires_grad)
        # Whoever adds what he has detached puts a value together: hard - soft.detach() + soft.
        if not any(_detached_from(step, id) for id in parts.given):
            bare += [(loss, id, call) for id, call in parts.terms if _is_bare(step, id, call)]
    return terms, bare


class _Used:
    """What the terms with a graph come from."""

    def __init__(self, step: StepView, terms: Iterable[int], made: dict[int, Call]) -> None:
        self.ids = {one for id in terms for one in behind(id, made, step.tensors)}
        self.sources = {step.tensors[id].view_of for id in self.ids
                        if id not in made and id in step.tensors}  # fmt: skip
        self.done = {_what(made[id]) for id in self.ids if id in made}

    def shares(self, cut: _Cut) -> bool:
        """Whether one of them comes from where a graph is cut off, or from the same done again."""
        ids = self.sources if cut.how == "detached" else self.ids
        return cut.id in ids or _what(cut.call) in self.done


def _is_bare(step: StepView, id: int, call: Call) -> bool:
    tensor = step.tensors[id]
    off = tensor.min == 0 == tensor.max
    return (
        not tensor.requires_grad and tensor.numel == 1 and call.grad_enabled
        and step.is_float(id) and not off
    )  # fmt: skip


def _detached_from(step: StepView, id: int) -> Tensor | None:
    """The tensor with a graph that one without is detached from."""
    tensor = step.tensors.get(id)
    if tensor is None or tensor.requires_grad or tensor.view_of is None:
        return None
    source = step.tensors.get(tensor.view_of)
    return source if source is not None and source.requires_grad else None


def _what(call: Call) -> tuple[Any, ...]:
    """What a call does, and with what: twice the same is one thing."""
    return call.op, call.module, *(id for _, id in call.inputs)


def _place(call: Call) -> tuple[Any, ...]:
    at = call.location
    return (call.op, call.module, at.file, at.line) if at is not None else (call.op, call.module)


def _cuts(step: StepView, id: int, made: dict[int, Call]) -> Iterator[_Cut]:
    """List where what a term comes from loses its graph."""
    todo, seen = [(id, made[id], True)], {(id, True)}
    while todo:
        id, taker, linear = todo.pop()
        call = made.get(id)
        given: list[int] = []
        if call is not None:
            how = _how(step, call)
            if how == "op" or (how is not None and not linear):
                yield _Cut(how, call, id)
            elif how is None and not _is_apart(call):
                given = [id for _, id in call.inputs]
                taker, linear = call, linear and (is_linear(call) or hands_on(call))
        elif (source := _detached_from(step, id)) is not None:
            if not linear or source.numel == 1:
                yield _Cut("value" if linear else "detached", taker, source.id)
        elif id in step.tensors and (view_of := step.tensors[id].view_of) is not None:
            given = [view_of]
        todo += [(id, taker, linear) for id in given if (id, linear) not in seen]
        seen |= {(id, linear) for id in given}


def _how(step: StepView, call: Call) -> str | None:
    """How a call makes something without a graph of what has one, or would have."""
    given = [step.tensors[id] for _, id in call.inputs if id in step.tensors]
    if any(tensor.requires_grad for tensor in given) and not _is_apart(call):
        made = (step.tensors[id] for _, id in call.outputs if id in step.tensors)
        if call.op is None and any(tensor.requires_grad for tensor in made):
            return None  # a count beside what is learnt
        return "op" if call.grad_enabled else "no grad"
    if call.op is None and not call.grad_enabled and step.learns(call.module or ""):
        return "no grad"
    return None


def _is_apart(call: Call) -> bool:
    """Whether the values of the inputs do not matter to the term, or TT209 judges them."""
    word = plain_op(call.op)
    return word.endswith("like") or word.startswith("new") or call.op == DERIVATIVE


def _draft(loss: Action, term: Call, cut: _Cut, sustain: int) -> Draft:
    call, at = cut.call, location_text(cut.call.location)
    name = call.op or module_text(call.module or "")
    why = {
        "op": f"{name} at {at} has inputs with a gradient and an output without",
        "detached": f"{name} at {at} takes what is detached",
        "no grad": f"{name} at {at} ran with gradients off",
    }[cut.how]
    links = [ChainLink(call.seq, cut.id, call.op or call.module, call.location)]
    if term is not call:
        made = term.outputs[0][1]
        links.append(ChainLink(term.seq, made, term.op or term.module, term.location))
    links.append(ChainLink(loss.seq, loss.tensor, "loss", loss.location))
    return Draft(
        message=f"a term of the loss has no graph in {sustain} full steps, so that it moves "
        f"no weight: {why}",
        severity="note" if cut.how == "no grad" else None, cause=at, phase="forward",
        module=call.module, op=call.op, seq=call.seq, tensor=loss.tensor, location=call.location,
        chain=tuple(links), fix=_FIXES[cut.how],
        evidence={"placed": "direct", "term": term.seq, "loss": loss.seq},
    )  # fmt: skip
