"""Gradients that a loss is made of: what torch.autograd.grad returned, and the pass that made it.

A penalty on gradients, forces as the slope of an energy, the inner step of meta-learning: there a
backward pass comes before the loss, and may make the first value that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator

from tensortrace.records import DERIVATIVE, Call, Tensor
from tensortrace.step_view import StepView, finite


class Trails:
    """Which bad tensors each tensor of a step was made of, gathered once for many questions.

    Args:
        step: the step.
        calls: those that a trail goes through; by default all of the step that are no replay.
        past: ids of tensors that it goes on through although nobody knows whether they are bad.
    """

    def __init__(
        self,
        step: StepView,
        calls: Iterable[Call] | None = None,
        *,
        past: Container[int] = (),
    ) -> None:
        self._step, self._past = step, past
        self._makers: dict[int, list[Call]] = {}
        # By seq of a module call: what its children touched.
        self._inside: dict[int | None, list[int]] = {}
        for call in step.calls if calls is None else calls:
            if call.phase == "forward":
                touched = [*call.inputs, *call.outputs]
                inside = self._inside.setdefault(call.parent, [])
                inside.extend(t.id for t in step.hurt(touched))
                inside += [id for _, id in touched if id in past]
                for _, id in call.outputs:
                    self._makers.setdefault(id, []).append(call)
        self._after: dict[int, list[int]] | None = None

    def behind(self, id: int) -> list[int]:
        """What one tensor was made of."""
        tensor = self._step.tensors.get(id)
        links = (tensor.previous, tensor.view_of) if tensor else ()
        behind = [i for i in links if i is not None]
        for call in self._makers.get(id, []):
            behind += [*(i for _, i in call.inputs), *self._inside.get(call.seq, ())]
        return [i for i in behind if i in self._past or self._is_bad(i)]

    def upstream(self, bad: Iterable[int]) -> tuple[set[int], bool]:
        """Collect what is behind some, and whether a trail ended at one that nobody made."""
        reached: set[int] = set()
        stack = list(bad)
        lost = not stack
        while stack:
            id = stack.pop()
            if id in reached:
                continue
            reached.add(id)
            spoilt = self.behind(id)
            stack += spoilt
            lost = lost or (not spoilt and not any(c.op for c in self._makers.get(id, [])))
        return reached, lost

    def downstream(self, id: int) -> set[int]:
        """Collect the bad tensors that one is behind, and it."""
        if self._after is None:
            self._after = {}
            for each in self._step.tensors:
                for i in self.behind(each) if self._is_bad(each) else ():
                    self._after.setdefault(i, []).append(each)
        reached: set[int] = set()
        stack = [id]
        while stack:
            id = stack.pop()
            if id not in reached:
                reached.add(id)
                stack += self._after.get(id, ())
        return reached

    def _is_bad(self, id: int) -> bool:
        return id in self._step.tensors and self._step.tensors[id].nonfinite > 0


def upstream(
    step: StepView,
    bad: Iterable[int],
    calls: Iterable[Call] | None = None,
    *,
    past: Container[int] = (),
) -> tuple[set[int], bool]:
    """Collect the bad tensors behind these, as `Trails` does."""
    return Trails(step, calls, past=past).upstream(bad)


def leaked(step: StepView) -> list[tuple[Call, Tensor]]:
    """List what spoilt the loss and was returned by no call, and the ops that took it.

    A module that keeps a tensor in an attribute (an auxiliary loss) hands it out unseen: it has a
    graph, and nobody was seen to make it.
    """
    losses = [a for a in step.actions if a.action == "loss" and not finite(a.detail.get("value"))]
    reached, _ = upstream(step, (a.tensor for a in losses if a.tensor is not None))
    forward = step.forward()
    made = {id for call in forward for _, id in call.outputs}
    outside = (call for call in forward if call.parent is None and call.op is not None)
    return [(call, tensor) for call in outside for tensor in step.hurt(call.inputs)
            if tensor.id in reached - made and tensor.grad_fn is not None]  # fmt: skip


def first_maker(step: StepView, bad: Iterable[Tensor], ops: Iterable[Call]) -> Call | None:
    """The first of some ops that made what is not finite of what is, and that these came from."""
    ops = sorted((c for c in ops if c.op is not None and c.phase == "forward"), key=_seq)
    reached = upstream(step, [tensor.id for tensor in bad], ops)[0]
    makers = (c for c in ops if not step.hurt(c.inputs)
              and any(t.id in reached for t in step.hurt(c.outputs)))  # fmt: skip
    return next(makers, None)


def derivative_to_blame(step: StepView) -> Call | None:
    """The call of autograd.grad that spoilt the loss: as a part of it, or of weights it came from.

    None if the loss is finite, or no such call made what is not finite out of finite values.
    """
    made = list(spoilt_derivatives(step, (*step.forward(), *step.replayed)))
    losses = [a for a in step.actions if a.action == "loss" and not finite(a.detail.get("value"))]
    if not made or not losses:
        return None
    reached, _ = upstream(step, (a.tensor for a in losses if a.tensor is not None))
    for derivative in made:
        if derivative.replay:  # of a module that computes a gradient in its own forward
            if step.narrowed(derivative.parent, "forward")[1] is derivative:
                return derivative
            continue
        if any(gradient.id in reached for gradient in step.nonfinite(derivative.outputs)):
            return derivative
        # Weights that a functional call is given are no input of the module.
        spoilt = made_of(step, step.nonfinite(derivative.outputs))
        for call in step.forward():
            if call.seq < derivative.seq or call.op is not None or step.hurt(call.inputs):
                continue
            spoils = any(t.id in reached for t in step.hurt(call.outputs))
            if spoils and spoilt & parameter_shapes(step, call.module):
                return derivative
    return None


def spoilt_derivatives(step: StepView, calls: Iterable[Call]) -> Iterator[Call]:
    """List the calls of autograd.grad that made what is not finite out of finite values."""
    for call in calls:
        if call.op == DERIVATIVE and call.phase == "forward" and _is_origin(step, call):
            yield call


def backward_pass(step: StepView, derivative: Call | None) -> list[Call]:
    """The backward calls of one call of autograd.grad, or since the last gate, in their order."""
    if derivative is None:
        fresh = step.calls[step.fresh :]
        return sorted((c for c in fresh if c.phase == "backward" and not c.replay), key=_seq)
    calls = step.replayed if derivative.replay else (c for c in step.calls if not c.replay)
    later = [c for c in calls if c.seq > derivative.seq]
    after = (c.seq for c in later if c.phase == "forward" and not c.recompute)
    until = min(after, default=math.inf)
    return sorted((c for c in later if c.phase == "backward" and c.seq < until), key=_seq)


def is_placed(step: StepView, derivative: Call) -> bool:
    """Whether it is known where in its backward pass a gradient was spoilt."""
    if first_bad(step, derivative) is not None:
        return True
    # Of a leaf that goes straight into a module nobody sees the gradient: a replay does.
    return not derivative.replay and step.narrowed(None, "backward")[1] is not None


def first_bad(step: StepView, derivative: Call | None) -> Call | None:
    """The first backward call that met a bad gradient: in a pass, or since the last gate."""
    calls = backward_pass(step, derivative)
    return next((c for c in calls if step.nonfinite(c.inputs) or step.nonfinite(c.outputs)), None)


def _seq(call: Call) -> int:
    return call.seq


def _is_origin(step: StepView, call: Call) -> bool:
    return bool(step.nonfinite(call.outputs)) and not step.nonfinite(call.inputs)


def made_of(
    step: StepView, bad: Iterable[Tensor], *, since: int = -1
) -> set[tuple[int, ...] | None]:
    """The shapes of what ops after the call `since` made of bad tensors, and that is bad still."""
    ids = {tensor.id for tensor in bad}
    shapes: set[tuple[int, ...] | None] = set()
    for call in step.forward():
        if call.op is not None and any(id in ids for _, id in call.inputs):
            spoilt = step.nonfinite(call.outputs)
            ids.update(tensor.id for tensor in spoilt)
            shapes.update(tensor.shape for tensor in spoilt if call.seq > since)
    return shapes


def parameter_shapes(step: StepView, path: str | None) -> set[tuple[int, ...] | None]:
    """The shapes of the parameters of a module and of all inside it; None takes every module."""
    inside = (m for p, m in step.modules.items()
              if not path or f"{p}.".startswith(f"{path}."))  # fmt: skip
    return {parameter.shape for module in inside for parameter in module.parameters}
