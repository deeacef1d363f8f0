"""Records in the making: all is known but the statistics, which are still on their device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import msgspec

from tensortrace.capture import compiled
from tensortrace.capture.compiled import untracked
from tensortrace.capture.stats.gather import Ticket
from tensortrace.capture.stats.queue import Stats, stats_of
from tensortrace.capture.tensors import TensorDraft
from tensortrace.records import (
    Action,
    Call,
    Location,
    Optimizer,
    Param,
    Record,
    Scalar,
    Tensor,
    to_scalar,
)


class Draft(Protocol):
    """Something that becomes a record once statistics are known."""

    step: int
    seq: int

    def record(self) -> Record:
        """The finished record."""


class Unfinished(msgspec.Struct, gc=False):
    """What a thin step need not finish, as long as nobody looks at it."""

    step: int
    seq: int

    def record(self) -> Call | Param:
        """The finished record."""
        raise NotImplementedError

    def is_quiet(self) -> bool:
        """As `engine.is_quiet` of the finished record, at less than its cost. Hot."""
        raise NotImplementedError


class CallDraft(Unfinished, gc=False):
    """One call; `fields` as in `records.Call`."""

    fields: dict[str, Any]
    tensors: list[TensorDraft] = []

    def record(self) -> Call:
        """The finished call."""
        return Call(
            step=self.step,
            seq=self.seq,
            tensors=untracked([draft.record() for draft in self.tensors]),
            **self.fields,
        )

    def is_quiet(self) -> bool:
        """Whether it raised nothing and all that it describes is finite."""
        if "exception" in self.fields:
            return False
        for tensor in self.tensors:  # noqa: SIM110 any() takes twice as long
            if not tensor.is_finite():
                return False
        return True


class GradientDraft(Unfinished, gc=False):
    """The backward of one module call: a gradient has arrived at what it returned.

    `tensor` is the gradient's id, `name` that of the output. Of the calls that returned the same
    tensor one describes the gradient.
    """

    update: int
    forward: int | None
    module: str
    nth: int
    name: str
    tensor: int
    grad: TensorDraft | None = None

    def record(self) -> Call:
        """The finished call."""
        return Call(
            step=self.step,
            seq=self.seq,
            update=self.update,
            phase="backward",
            forward=self.forward,
            module=self.module,
            nth=self.nth,
            inputs=untracked([(self.name, self.tensor)]),
            outputs=untracked([]),
            tensors=untracked([self.grad.record()] if self.grad is not None else []),
        )

    def is_quiet(self) -> bool:
        """Whether the gradient is finite."""
        return self.grad is None or self.grad.is_finite()


class ParameterGradientDraft(Unfinished, gc=False):
    """A backward pass has made a gradient for a parameter, `name` of a module."""

    update: int
    module: str
    name: str
    grad: TensorDraft

    def record(self) -> Call:
        """The finished call."""
        return Call(
            step=self.step,
            seq=self.seq,
            update=self.update,
            phase="backward",
            module=self.module,
            inputs=untracked([]),
            outputs=untracked([(self.name, self.grad.id)]),
            tensors=untracked([self.grad.record()]),
        )

    def is_quiet(self) -> bool:
        """Whether the gradient is finite."""
        return self.grad.is_finite()


class NodeSite(msgspec.Struct, gc=False):
    """What the backward of the nodes that one call of an op has made has in common.

    `forward` is the seq of that call, `serial` and `step` say whose and when it was.
    """

    serial: int
    step: int
    op: str
    module: str | None
    forward: int | None
    location: Location | None


class NodeDraft(Unfinished, gc=False):
    """The backward of one node of an op: the first `arrived` of `grads` came, the rest it made."""

    update: int
    site: NodeSite
    node: str
    arrived: int
    grads: tuple[Tensor | TensorDraft | None, ...]

    def record(self) -> Call:
        """The finished call. Hot."""
        site = self.site
        inputs, outputs, tensors = self._lists()
        return Call(
            step=self.step,
            seq=self.seq,
            update=self.update,
            phase="backward",
            forward=site.forward if site.step == self.step else None,
            module=site.module,
            op=site.op,
            node=self.node,
            location=site.location,
            inputs=inputs,
            outputs=outputs,
            tensors=tensors,
        )

    def _lists(self) -> _Lists:
        """Inputs, outputs and tensors."""
        grads, arrived = self.grads, self.arrived
        came, went = _names("output", arrived), _names("input", len(grads) - arrived)
        if compiled.kernel is not None:
            found: _Lists | None = compiled.kernel.name_all(Tensor, came, went, grads)
            if found is not None:
                return found
        given, made = grads[:arrived], grads[arrived:]
        tensors = [g.record() if isinstance(g, TensorDraft) else g for g in grads if g is not None]
        return (
            untracked([(n, g.id) for n, g in zip(came, given, strict=True) if g is not None]),
            untracked([(n, g.id) for n, g in zip(went, made, strict=True) if g is not None]),
            untracked(tensors),
        )

    def is_quiet(self) -> bool:
        """Whether all gradients are finite."""
        for grad in self.grads:
            if grad is None:
                continue
            if grad.nonfinite if isinstance(grad, Tensor) else not grad.is_finite():
                return False
        return True


_Lists: TypeAlias = "tuple[list[tuple[str, int]], list[tuple[str, int]], list[Tensor]]"


@functools.lru_cache(256)
def _names(what: str, n: int) -> tuple[str, ...]:
    return tuple(f"{what}[{i}]" for i in range(n))


class ActionDraft:
    """One action; the values of `scalars` are put into its detail under their keys."""

    __slots__ = ("fields", "scalars", "seq", "step")

    def __init__(self, step: int, seq: int, fields: dict[str, Any]) -> None:
        self.step, self.seq, self.fields = step, seq, fields
        self.scalars: dict[str, Ticket] = {}

    def record(self) -> Action:
        """The finished action."""
        detail = dict(self.fields.pop("detail", {}))
        for key, ticket in self.scalars.items():
            detail[key] = scalar_of(stats_of(ticket))
        return Action(step=self.step, seq=self.seq, detail=detail, **self.fields)


class ParamDraft(Unfinished, gc=False):
    """One parameter at an optimizer step; the tickets of its change come after the step.

    `moved` are the norms of the sampled change and of the sampled value: themselves, or else their
    tickets in `change` and `weight`.
    """

    fields: dict[str, Any]
    value: TensorDraft
    grad: TensorDraft
    changed: bool = True
    numel: int = 0
    moved: tuple[float, float] | None = None
    change: Ticket | None = None
    weight: Ticket | None = None

    def is_quiet(self) -> bool:
        """Whether value, gradient and update are finite."""
        if not (self.value.is_finite() and self.grad.is_finite()):
            return False
        change, weight = self.norms()
        return (change is None or math.isfinite(change)) and (
            weight is None or math.isfinite(weight)
        )

    def norms(self) -> tuple[float | None, float | None]:
        """Norms of the sampled change and of the sampled value; None where they are not known."""
        if self.change is not None and self.weight is not None:
            return _value(stats_of(self.change)), _value(stats_of(self.weight))
        return self.moved or (None, None)

    def record(self) -> Param:
        """The finished parameter; the update norm is scaled from the sample to all elements."""
        norm = ratio = None
        change, weight = self.norms()
        if change is not None and weight is not None:
            sampled = max(1, int(self.fields.get("sampled", 1)))
            norm = to_scalar(change * math.sqrt(self.numel / sampled))
            ratio = to_scalar(change / weight) if weight else None
        return Param(
            step=self.step,
            seq=self.seq,
            value=self.value.record(),
            grad=self.grad.record(),
            update_norm=norm,
            update_ratio=ratio,
            changed=self.changed,
            **self.fields,
        )


# Of the calls of a step the checks decide at its gate.
CALLS = frozenset[type]({CallDraft, GradientDraft, NodeDraft, ParameterGradientDraft})


class OptimizerDraft:
    """One optimizer step: the gate. Its gradient norm is over all gradients that it holds.

    The parameters' own records follow when the step is over.
    """

    __slots__ = ("fields", "grads", "seq", "step")

    def __init__(
        self, step: int, seq: int, fields: dict[str, Any], grads: list[TensorDraft]
    ) -> None:
        self.step, self.seq, self.fields, self.grads = step, seq, fields, grads

    def record(self) -> Optimizer:
        """The finished optimizer record."""
        norm = total_norm([draft.stats() for draft in self.grads])
        return Optimizer(step=self.step, seq=self.seq, grad_norm=norm, **self.fields)


def total_norm(grads: list[Any]) -> Scalar | None:
    """The L2 norm over several tensors, given their `Stats`; None unless each was measured."""
    norms: list[float] = []
    worst: Scalar | None = None
    for nan, posinf, neginf, _, _, _, _, _, norm, unmeasured, _, _ in grads:
        if unmeasured:
            return None
        if nan:
            worst = "NaN"
        elif posinf or neginf:
            worst = worst or "Infinity"
        norms.append(norm or 0.0)
    return worst or (to_scalar(math.hypot(*norms)) if norms else None)


def scalar_of(s: Stats) -> Scalar | None:
    """The value of a tensor of one element, as the log writes it."""
    value = _value(s)
    return None if value is None else to_scalar(value)


def _value(s: Stats) -> float | None:
    if s.nan:
        return math.nan
    if s.posinf:
        return math.inf
    return -math.inf if s.neginf else s.min


@dataclass(slots=True)
class Ready:
    """A record that needs no statistics."""

    step: int
    seq: int
    finished: Record

    def record(self) -> Record:
        """The record."""
        return self.finished


@dataclass(slots=True)
class StepMark:
    """Where a step ends among the drafts."""

    step: int
    seq: int
    update: int
    host_ns: int
    passed_over: int
    rested: bool
