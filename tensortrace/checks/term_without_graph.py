"""TT209: a gradient penalty whose own gradient nobody can take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.causes.terms import behind, makers, sum_of
from tensortrace.checks import Draft, StepView, check
from tensortrace.records import DERIVATIVE, Action, Call, ChainLink
from tensortrace.text import location_text


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
    if not step.losses or not any(_is_without_graph(call) for call in step.calls):
        return
    made = makers(step.forward())
    for loss in step.losses:
        if loss.tensor is None:
            continue
        terms = dict(sum_of(loss.tensor, step.forward(), step.tensors).terms)
        used = {c.seq for id in terms if step.tensors[id].requires_grad
                for c in _behind(id, made, step)}  # fmt: skip
        for id, term in terms.items():
            found = () if step.tensors[id].requires_grad else _behind(id, made, step)
            found = [c for c in found if _is_without_graph(c) and c.seq not in used]
            derivative = max(found, key=lambda call: call.seq, default=None)
            if derivative is not None and _is_of_weights(step, derivative, made):
                yield _draft(loss, derivative, term)


def _is_without_graph(call: Call) -> bool:
    asked = call.arguments.get("create_graph")
    return call.op == DERIVATIVE and call.phase == "forward" and not asked


def _behind(id: int, made: dict[int, Call], step: StepView) -> list[Call]:
    """List the calls that a tensor comes from."""
    return [made[one] for one in behind(id, made, step.tensors) if one in made]


def _is_of_weights(step: StepView, derivative: Call, made: dict[int, Call]) -> bool:
    """Whether what was differentiated comes from a module with parameters to train."""
    calls = (call for _, id in derivative.inputs for call in _behind(id, made, step))
    return any(step.learns(call.module or "") for call in calls if call.op is None)


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
