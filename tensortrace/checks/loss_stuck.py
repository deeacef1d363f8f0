"""TT608: a loss that does not move, leaps up and stays there, or is negative where it cannot be."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action, Call, from_scalar
from tensortrace.text import location_text, number_text

_CLASSES = frozenset(("cross_entropy", "CrossEntropyLoss"))
_SQUARES = frozenset(("mse_loss", "MSELoss"))
_TARGETS = "its targets are outside 0 to 1"
_LOGARITHMS = "its input holds no logarithms of probabilities"
_NEVER_NEGATIVE = {
    "cross_entropy": "its targets or class weights are negative",
    "CrossEntropyLoss": "its targets or class weights are negative", "nll_loss": _LOGARITHMS,
    "NLLLoss": _LOGARITHMS, "binary_cross_entropy": _TARGETS, "BCELoss": _TARGETS,
    "binary_cross_entropy_with_logits": _TARGETS, "BCEWithLogitsLoss": _TARGETS,
}  # fmt: skip
_HALF = frozenset(("float16", "bfloat16"))


@dataclass(slots=True)
class Series:
    """The losses that one line gives to backward(); `top` is the largest before the window.

    `moves` is how often parameters had moved when the last one came.
    """

    first: float
    last: deque[float]
    running: int = 1
    moves: int = 0
    top: float = -math.inf
    count: int = 0
    negative: bool = False


@check("TT608", "loss-stuck", until=("threads",))
def loss_stuck(
    step: StepView,
    memory: dict[str, Any],
    *,
    constant: int = 10,
    jump: float = 3.0,
    stay: int = 10,
    near: float = 0.01,
    sustain: int = 20,
    patience: int = 500,
    negative: float = 1e-3,
    moving: float = 1e-6,
) -> Iterator[Draft]:
    """The loss is constant or at the level of guessing, leaps up for good, or is below its bound.

    Symptom:    the curve is a flat line; or it falls, leaps above where it began and stays there;
                or it goes below 0 and never stops
    Threshold:  while parameters move (norm of the update > moving * norm), the loss that one line
                gives to backward() is the same to the last bit in `constant` steps running (4 times
                as many in half precision), and more than nine tenths of what it was at first. Or,
                with one optimizer: its last `stay` values are all > jump * the largest before them,
                and none was ever negative. Or: cross entropy over 3 classes or more is within
                `near` of ln(classes), or mean squared error of the variance of its targets, as the
                median of the last `sustain` full steps and all through `patience` optimizer steps:
                what one gets without a look at the input. Or: the result of cross_entropy, nll_loss
                or binary_cross_entropy is < -negative
    Source:     a uniform guess among C classes costs ln C, the best constant the variance;
                SageMaker Debugger LossNotDecreasing (10 steps); the rest chosen here (measured on
                tests/healthy: no two equal losses running at the level of the first, 4 in a row
                at most 1.2 times the largest before)
    Fix:        constant: look for dead activations, a detached loss, one batch of one class; at
                the level of guessing: a larger or smaller learning rate, labels that are in the
                order of their inputs, inputs that are normalised; leaps: a lower learning rate,
                warm-up, clipping; negative: targets in the range that the loss wants
    Misses:     what cannot be learnt (frozen random features under a small adapter) looks the same
                and is told after `patience` optimizer steps; losses that only `autograd.grad` sees;
                chance with unequal classes, which lies below ln C; two classes, since a
                discriminator in balance guesses; likelihoods of densities (flows, mixtures) and
                losses of your own may be negative
    Example:    for x, y in loader:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y[torch.randperm(len(y))])
                    loss.backward()
                    optimizer.step()
    Fixed:      for x, y in loader:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    optimizer.step()
    """
    if step.summary is None:
        return
    if step.calls:
        yield from _negative(step, negative)
    stepping: set[int] = memory.setdefault("optimizers", set())
    for optimizer in step.optimizers:
        stepping.add(optimizer.index)
    moves: int = memory.setdefault("moves", 0)
    known: dict[tuple[str, int] | None, Series] = memory.setdefault("series", {})
    for action in step.losses:
        value = from_scalar(action.detail.get("value"))
        if value is None or not math.isfinite(value):
            continue
        at = action.location
        place = None if at is None else (at.file, at.line)
        series = known.get(place)
        if series is None:
            series = known[place] = Series(value, deque(maxlen=stay))
        last = series.last
        if not last or last[-1] != value or value < 0.9 * series.first or value <= 0:
            series.running = 1
        elif moves > series.moves:
            series.running += 1
        if series.running >= constant:
            yield from _flat(action, series, value, constant)
        _remember(series, value, moves)
        # The losses of two networks against each other rise by nature.
        if value > jump * series.top and len(stepping) == 1:
            yield from _leap(action, series, jump)
    if step.span("update_ratio")[1] > moving:
        memory["moves"] = moves + 1
    if moves and step.summary.full and step.taken:
        yield from _guessing(step, memory, near, sustain, patience)


def _flat(action: Action, series: Series, value: float, constant: int) -> Iterator[Draft]:
    limit = 4 * constant if action.detail.get("dtype") in _HALF else constant
    if series.running >= limit:
        yield _draft(
            action, "constant", f"the loss is {number_text(value)} in {series.running} steps "
            f"running (limit {limit}), to the last bit, though parameters move",
            limit=limit, fix="look for dead activations, a loss that depends on nothing trained",
        )  # fmt: skip


def _remember(series: Series, value: float, moves: int) -> None:
    last = series.last
    if len(last) == last.maxlen:
        series.top = max(series.top, last[0])
        series.count += 1
    last.append(value)
    series.moves = moves
    if value < 0:
        series.negative = True


def _leap(action: Action, series: Series, jump: float) -> Iterator[Draft]:
    if series.count < 3 or series.negative or series.top <= 0:
        return
    if min(series.last) > jump * series.top:
        yield _draft(
            action, "leap", f"the loss is {number_text(median(series.last))} for "
            f"{len(series.last)} steps, {number_text(min(series.last) / series.top)} times or more "
            f"what it ever was before ({number_text(series.top)}, limit {jump:g} times)",
            limit=jump * series.top, fix="a lower learning rate, warm-up, clip_grad_norm_",
        )  # fmt: skip


def _guessing(
    step: StepView, memory: dict[str, Any], near: float, sustain: int, patience: int
) -> Iterator[Draft]:
    known: dict[str, deque[float]] = memory.setdefault("known", {})
    since: dict[str, int] = memory.setdefault("since", {})
    for call in step.forward():
        level = _level(step, call)
        if level is None or not call.outputs:
            continue
        made = step.tensors.get(call.outputs[0][1])
        if made is None or made.numel != 1 or made.mean is None or not made.requires_grad:
            continue
        place = location_text(call.location)
        seen = known.setdefault(place, deque(maxlen=sustain))
        seen.append(made.mean / level)
        middle = median(seen)
        if len(seen) < sustain or abs(middle - 1) >= near:
            since.pop(place, None)
            continue
        span = step.update - since.setdefault(place, step.update)
        if span >= patience:
            yield Draft(
                message=f"{call.op or call.module} gives {number_text(made.mean)} after "
                f"{step.update} optimizer steps, {number_text(middle)} of the "
                f"{number_text(level)} that guessing gives (limit {near:g} around it, over {span} "
                "optimizer steps)",
                fix="a larger or smaller learning rate; labels in the order of their inputs; "
                "inputs that are normalised; more than the head unfrozen",
                cause=f"guessing {place}", phase="forward", module=call.module, op=call.op,
                seq=call.seq, tensor=made.id, value=middle, limit=1 + near, location=call.location,
                evidence={"placed": "direct", "guess": level},
            )  # fmt: skip


def _level(step: StepView, call: Call) -> float | None:
    """What a network that ignores its input gets from a loss at best, None if that is not known."""
    if len(call.inputs) < 2:
        return None
    kind = step.kind_of(call)
    if kind not in _CLASSES and kind not in _SQUARES:
        return None
    made, target = (step.tensors.get(id) for _, id in call.inputs[:2])
    if made is None or target is None or not made.shape or not made.requires_grad:
        return None
    if kind in _CLASSES and call.arguments.get("reduction") in (None, "mean"):
        classes = made.shape[1] if len(made.shape) > 1 else made.shape[0]
        return math.log(classes) if classes > 2 else None
    if kind in _SQUARES and target.std and target.numel > 16 and not target.requires_grad:
        return target.std**2
    return None


def _negative(step: StepView, negative: float) -> Iterator[Draft]:
    if any(f.code in ("TT603", "TT605") for f in step.findings):
        return  # says the same, and why
    for call in step.forward():
        why = _NEVER_NEGATIVE.get(step.kind_of(call))
        made = step.tensors.get(call.outputs[0][1]) if why and call.outputs else None
        if made is not None and made.min is not None and made.min < -negative:
            yield Draft(
                message=f"{call.op or call.module} gives {number_text(made.min)} and cannot be "
                f"below 0 (limit {-negative:g}): {why}",
                fix="F.cross_entropy(logits, y), or F.nll_loss(logits.log_softmax(-1), y); "
                "targets in the range that the loss wants",
                cause=f"negative {location_text(call.location)}", phase="forward",
                module=call.module, op=call.op, seq=call.seq, tensor=made.id, value=made.min,
                limit=-negative, location=call.location, evidence={"placed": "direct"},
            )  # fmt: skip


def _draft(action: Action, what: str, message: str, *, limit: float, fix: str) -> Draft:
    return Draft(
        message=message, cause=f"{what} {location_text(action.location)}",
        value=action.detail["value"], limit=limit, tensor=action.tensor,
        location=action.location, fix=fix, evidence={"placed": "direct"},
    )  # fmt: skip
