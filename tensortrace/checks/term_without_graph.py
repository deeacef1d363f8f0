"""TT209: a gradient penalty whose own gradient nobody can take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.records import DERIVATIVE, Action, Call, ChainLink
from tensortrace.text import location_text

# What a sum of losses is made with, weighted or not.
_SUMS = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub", "neg", "sum", "mean", "stack"))
_WEIGHTS = frozenset(("mul", "imul", "rmul", "div", "truediv", "idiv", "itruediv"))


@check("TT209", "term-without-graph", of=("calls",))
def term_without_graph(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A term of the loss is made of a gradient that was taken without create_graph.

    Symptom:    a gradient penalty, or an equation that a network should obey, has no effect: the
                weights move as if its factor were 0, and nothing is raised, since the other terms
                of the loss have a graph
    Threshold:  the loss is a sum, weighted by numbers, of which one term requires a gradient and
                another does not; that one is made of what torch.autograd.grad returned without
                create_graph=True, of what a module with parameters to train has made; and no other
                term is made of it
    Source:     torch.autograd.grad ("If True, graph of the derivative will be constructed, allowing
                to compute higher order derivative products")
    Fix:        torch.autograd.grad(..., create_graph=True)
    Misses:     weights that are mere tensors; a term that is divided by, or multiplied with, one
                that has a graph, as adaptive weights are; one made before a call of a module, where
                that begins the next step; one made inside a module, at module level
    Example:    slope, = torch.autograd.grad(critic(x).sum(), x)
                loss = critic(fake).mean() - critic(real).mean()
                loss = loss + 10 * (slope.norm(dim=1) - 1).square().mean()
    Fixed:      slope, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
                loss = critic(fake).mean() - critic(real).mean()
                loss = loss + 10 * (slope.norm(dim=1) - 1).square().mean()
    """
    if step.summary is None:
        return
    losses = [a for a in step.actions if a.action == "loss" and a.tensor is not None]
    if not losses or not any(_is_without_graph(call) for call in step.calls):
        return
    made = {id: call for call in step.forward() if call.parent is None and not call.recompute
            for _, id in call.outputs if all(id != given for _, given in call.inputs)}  # fmt: skip
    for loss in losses:
        terms = _terms(step, loss, made)
        used = {c.seq for id, has_graph in terms.items() if has_graph for c in _behind(id, made)}
        for id, has_graph in terms.items():
            behind = () if has_graph else _behind(id, made)
            found = [c for c in behind if _is_without_graph(c) and c.seq not in used]
            derivative = max(found, key=lambda call: call.seq, default=None)
            if derivative is not None and _is_of_weights(step, derivative, made):
                yield _draft(loss, derivative, made[id])


def _is_without_graph(call: Call) -> bool:
    asked = call.arguments.get("create_graph")
    return call.op == DERIVATIVE and call.phase == "forward" and not asked


def _terms(step: StepView, loss: Action, made: dict[int, Call]) -> dict[int, bool]:
    """List the ids of the terms of a loss, and whether each requires a gradient."""
    todo, seen = [loss.tensor], set[int]()
    terms: dict[int, bool] = {}
    while todo:
        id = todo.pop()
        tensor = step.tensors.get(id) if id is not None else None
        if id is None or tensor is None or id in seen:
            continue
        seen.add(id)
        call = made.get(id)
        word = plain_op(call.op) if call is not None else ""
        if (
            call is not None
            and tensor.requires_grad
            and (
                word in _SUMS
                or (word in _WEIGHTS and len({given for _, given in call.inputs}) == 1)
            )
        ):
            todo += [given for _, given in call.inputs]
        elif call is not None and id != loss.tensor:
            terms[id] = tensor.requires_grad
    return terms


def _behind(id: int, made: dict[int, Call]) -> Iterator[Call]:
    """List the calls that a tensor comes from."""
    todo, seen = [id], {id}
    while todo:
        call = made.get(todo.pop())
        if call is None:
            continue
        yield call
        new = {given for _, given in call.inputs} - seen
        seen |= new
        todo += new


def _is_of_weights(step: StepView, derivative: Call, made: dict[int, Call]) -> bool:
    """Whether what was differentiated comes from a module with parameters to train."""
    calls = (call for _, id in derivative.inputs for call in _behind(id, made))
    ran = [call.module or "" for call in calls if call.op is None]
    return any(
        (not path or f"{each}.".startswith(f"{path}.")) and step.trainable(each)
        for path in ran for each in step.modules
    )  # fmt: skip


def _draft(loss: Action, derivative: Call, term: Call) -> Draft:
    links = (
        ChainLink(term.seq, term.outputs[0][1], term.op or term.module, term.location),
        ChainLink(loss.seq, loss.tensor, "loss", loss.location),
    )
    return Draft(
        message="a term of the loss is made of what torch.autograd.grad returned at "
        f"{location_text(derivative.location)} without create_graph=True: it has no graph, so "
        "that it moves no weight",
        cause=location_text(derivative.location), phase="forward", op=DERIVATIVE,
        seq=derivative.seq, tensor=loss.tensor, location=derivative.location, chain=links,
        evidence={"placed": "direct", "term": term.seq, "loss": loss.seq},
    )  # fmt: skip
