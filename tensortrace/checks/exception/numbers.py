"""Values that an op or a distribution refuses, and gradients that cannot be asked for."""

from __future__ import annotations

import re
from typing import Any

from tensortrace.causes import jitter_text
from tensortrace.checks.exception.facts import (
    Facts,
    Match,
    Told,
    code_name,
    first_line,
    operands_text,
    shape_of,
)
from tensortrace.records import Tensor
from tensortrace.step_view import is_damage
from tensortrace.text import number_text, shape_text

_NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?|nan|inf")


def matrix(facts: Facts, found: Match) -> Told | None:
    """A matrix that is singular or not positive definite."""
    if _spoilt(facts):
        return None  # of NaN they say the same
    singular = "singular" in found[0]
    seen = operands_text(facts)
    why = (
        "columns that depend on each other, or fewer samples than columns"
        if singular
        else "equal points in a covariance, or rounding: its smallest eigenvalue is not above 0"
    )
    fix = jitter_text(_given(facts)) + (", or torch.linalg.lstsq / pinv" if singular else
                                        "; float64 for a large one")  # fmt: skip
    return Told(f"{facts.type}: {first_line(facts.text)}" + (f" ({seen})" if seen else ""),
                why, fix)  # fmt: skip


def distribution(facts: Facts, found: Match) -> Told | None:
    """A parameter of a distribution outside of its range."""
    name, limit = found["name"], found["limit"]
    held = _NUMBER.findall(facts.text.partition("invalid values:")[2].partition("tensor")[2])
    if _spoilt(facts) or "nan" in held:
        return None
    numbers = [float(number) for number in held]
    low = min(numbers) if numbers and "..." not in facts.text else None
    holds = f" holds {number_text(low)}" if low is not None and limit == "0.0" else (
        " holds values outside of its range")  # fmt: skip
    fix = (
        f"F.softplus({name}) + 1e-6, or {name}.exp(), of a parameter that may have any value"
        if limit == "0.0"
        else f"keep {name} inside {found['constraint']}"
    )
    return Told(
        f"{name} of {found['kind']}{holds}: it must satisfy {found['constraint']}",
        "an optimizer moves a parameter past any bound that nothing keeps it from", fix,
    )  # fmt: skip


def complex_loss(facts: Facts, found: Match) -> Told:
    """backward() on a complex number."""
    one = next((one for one in facts.operands if "complex" in str(one.get("dtype"))), None)
    name = code_name(one, "loss")
    return Told(
        f"`{name}` is complex: backward() starts from one real number",
        "there is no smallest among complex numbers: e ** 2 of a complex e is complex too",
        "e.abs().square().mean() for (e ** 2).mean(), or loss.real",
    )


def unused(facts: Facts, found: Match) -> Told:
    """autograd.grad in something that the output was not computed from."""
    what = _asked_for(facts)
    return Told(
        f"{what} was not used to compute what torch.autograd.grad differentiates",
        "the graph leads to the very tensor that went into the model, not to a copy, a slice or a "
        "detach() of it",
        "pass the same tensor to the model and to torch.autograd.grad; allow_unused=True if it "
        "may be left out",
    )


def no_gradient_asked(facts: Facts, found: Match) -> Told:
    """autograd.grad in something that records no gradient."""
    name = code_name(_inputs(facts), "x")
    return Told(
        f"{_asked_for(facts)} does not require grad: torch.autograd.grad has nothing to follow "
        "to it", "data records no gradient unless it is asked to, before the model runs",
        f"{name}.requires_grad_(True) before it goes into the model",
    )  # fmt: skip


def _asked_for(facts: Facts) -> str:
    one = _inputs(facts)
    return f"`{one['name']}` {shape_text(shape_of(one))}" if one else "a tensor"


def _inputs(facts: Facts) -> dict[str, Any] | None:
    """What comes second in the line, after what is differentiated."""
    tensors = [one for one in facts.operands if "dtype" in one]
    return tensors[1] if len(tensors) > 1 else None


def _given(facts: Facts) -> Tensor:
    step = facts.step
    failed = next((c for c in reversed(step.calls) if c.exception and c.op and c.inputs), None)
    known = step.tensors.get(failed.inputs[0][1]) if failed is not None else None
    return known or Tensor(-1, ())


def _spoilt(facts: Facts) -> bool:
    step = facts.step
    return bool(step.poisoned) or any(is_damage(f) and f.step == step.number for f in step.findings)
