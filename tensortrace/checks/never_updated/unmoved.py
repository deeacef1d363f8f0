"""Layers that optimizers hold and that stay what they were, though they get gradients."""

from __future__ import annotations

from collections.abc import Container
from itertools import compress
from typing import Any

from tensortrace.checks import StepView, held_by
from tensortrace.records import Param, Tensor, from_scalar

# Of float32 half the distance between two numbers is 6e-8 of them; momentum adds up to ten times.
_ROUNDING = 6e-9


def unmoved_since(step: StepView, memory: dict[str, Any], updates: int) -> list[str]:
    """The names of those that no update has changed in so many steps running, and never before."""
    assert step.summary is not None
    columns = step.summary.modules
    ever: set[str] = memory.setdefault("moved", set())
    ever.update(compress(columns.path, columns.update_ratio))
    if not step.params and ever.issuperset(compress(columns.path, columns.param_grad_rms)):
        return []
    taken, held = step.taken, held_by(step)
    moving = all((from_scalar(rate) or 0) > 0 for o in taken for rate in o.lr)
    stepping: set[str] | None = None
    streaks: dict[str, int] = memory.setdefault("streaks", {})
    found: list[str] = []
    # The rms is that of the whole layer: the gradient of a bias hides one of zeros beside it.
    idle: set[str] = memory.setdefault("idle", set())
    faint: set[str] = memory.setdefault("faint", set())
    for param in step.params:
        if param.grad is not None:
            (idle.add if _is_zero(param.grad) else idle.discard)(param.name)
            (faint.add if _rounds_away(step, param) else faint.discard)(param.name)
    for path, rms, moved in zip(
        columns.path, columns.param_grad_rms, columns.update_ratio, strict=False
    ):
        if path in ever:
            continue
        if not rms or not step.trains(path):
            continue
        names = step.trainable(path) if moving and moved == 0 else []
        if any(name in held.get(o.index, ()) for o in taken if o.cls == "LBFGS" for name in names):
            continue
        if names and stepping is None:
            stepping = set().union(*(held.get(o.index, set()) for o in taken))
        # The ratio is that of the weights, where there are any: a bias beside them may move.
        told = [name for name in step.trainable(path, dims=2) or names if name not in idle]
        unmoved = bool(names and told) and stepping is not None and stepping.issuperset(names)
        streaks[path] = streaks.get(path, 0) + 1 if unmoved else 0
        if streaks[path] >= updates:
            found += told
    return found


def faint_ones(memory: dict[str, Any]) -> Container[str]:
    """Of `unmoved_since` those whose gradient was last so small that SGD rounds it away."""
    faint: set[str] = memory.get("faint", set())
    return faint


def _rounds_away(step: StepView, param: Param) -> bool:
    """Whether what SGD takes off a parameter is too little to be seen in it."""
    wrote, grad = step.step_of(param), param.grad
    norm, value = grad.norm if grad is not None else None, param.value.norm
    if wrote is None or wrote.cls != "SGD" or norm is None or value is None:
        return False
    return wrote.highest_lr * norm < _ROUNDING * value


def _is_zero(grad: Tensor) -> bool:
    return grad.numel > 0 and grad.zeros == grad.numel
