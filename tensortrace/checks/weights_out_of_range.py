"""TT404: weights that training has driven to zero, or far up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Param
from tensortrace.text import number_text


@dataclass(slots=True)
class Start:
    """A weight as it was first seen, and in how many full steps running it was beyond a limit."""

    zero_frac: float
    norm: float
    running: dict[str, int] = field(default_factory=dict)


@check("TT404", "weights-out-of-range", when="full", after=("TT402",))
def weights_out_of_range(
    step: StepView,
    memory: dict[str, Any],
    *,
    zeros: float = 0.5,
    large: float = 50.0,
    growth: float = 10.0,
    sustain: int = 3,
) -> Iterator[Draft]:
    """Training has made weights exactly zero, or far larger than they were.

    Symptom:    a layer gives the same output, whatever it gets; or outputs and loss grow slowly
                beyond all measure, and the learning rate seems to have no effect any more
    Threshold:  a weight of two dims or more that was none of this when first seen, in `sustain`
                full steps running in which its optimizer steps: all of it is exactly 0; or (a
                note, but a warning in float16, where it is underflow) a share > zeros of it is,
                embeddings aside. Or: rms * sqrt(fan-in) > large, the fan-in of an embedding being
                1, and norm > growth * what it was at first, LBFGS aside
    Source:     the outputs of a layer are about rms * sqrt(fan-in) times its inputs (Glorot and
                Bengio 2010); `large` and `growth` chosen here (measured on tests/healthy: at most
                5, and 24 with LBFGS, which fits separable data without end). AutoTrainer speaks
                up at a single weight > 5
    Fix:        zero: a lower weight decay, L1 term or pruning threshold; float32 weights under
                autocast in place of model.half(). Large: a lower learning rate, weight decay
                (AdamW, 0.01) with the right sign, a norm layer, clipping of the weights of a critic
    Misses:     pruning in place by hand gives a note, and a warning if it takes a whole layer; what
                was zero or large before the trace began; biases and norms; weights that grow in
                front of a norm layer are told although the norm takes their scale away

    Example:
        loss = criterion(model(x), y) - 1e-2 * sum(p.pow(2).sum() for p in model.parameters())

    Fixed:
        loss = criterion(model(x), y) + 1e-2 * sum(p.pow(2).sum() for p in model.parameters())
    """
    first: dict[str, Start] = memory.setdefault("first", {})
    if any(action.action == "load_state_dict" for action in step.actions):
        first.clear()
    steps = {o.index: o.cls for o in step.optimizers if not o.skipped}
    found: dict[str, list[Param]] = {"zero": [], "sparse": [], "large": []}
    for param in step.params:
        value = param.value
        if len(value.shape or ()) < 2 or value.norm is None or param.optimizer not in steps:
            continue
        if not value.numel:
            continue
        zero_frac = value.zeros / value.numel
        was = first.setdefault(param.name, Start(zero_frac, value.norm))
        module = step.modules.get(param.module) if param.module is not None else None
        embeds = module is not None and "Embedding" in module.cls
        grown = value.norm > growth * was.norm > 0 and steps[param.optimizer] != "LBFGS"
        states = {
            "zero": zero_frac == 1 > was.zero_frac,
            "sparse": 1 > zero_frac > zeros >= was.zero_frac and not embeds,
            "large": grown and _gain(param, embeds) > large,
        }
        for state, holds in states.items():
            was.running[state] = was.running.get(state, 0) + 1 if holds else 0
            if was.running[state] >= sustain:
                found[state].append(param)
    yield from _zero(found["zero"])
    yield from _sparse(found["sparse"], zeros)
    if found["large"]:
        yield _large(step, found["large"], first, large)


def _gain(param: Param, embeds: bool) -> float:
    """rms * sqrt(fan-in)."""
    shape, norm = param.value.shape or (1,), param.value.norm or 0.0
    return norm / math.sqrt(param.value.numel if embeds else shape[0])


def _zero(params: list[Param]) -> Iterator[Draft]:
    if params:
        one = params[0]
        yield Draft(
            message=f"all {one.value.numel} elements of {one.name} have become exactly 0, as in "
            f"{len(params)} weights: nothing passes",
            cause="zero", phase="optimizer", module=one.module, param=one.name, value=1.0,
            evidence={"weights": [param.name for param in params[:20]]},
        )  # fmt: skip


def _sparse(params: list[Param], limit: float) -> Iterator[Draft]:
    # What underflows is told for itself: others may be pruned on purpose.
    for half in (True, False):
        group = [param for param in params if (param.value.dtype == "float16") == half]
        if group:
            worst = max(group, key=lambda param: param.value.zeros / param.value.numel)
            share = worst.value.zeros / worst.value.numel
            yield Draft(
                message=f"{share:.0%} of {worst.name} have become exactly 0 (limit {limit:.0%}), "
                f"as in {len(group)} weights"
                + (": float16 holds nothing below 6e-8" if half else ""),
                cause="underflow" if half else "sparse",
                severity="warning" if half else "note",
                phase="optimizer", module=worst.module, param=worst.name, value=share, limit=limit,
                evidence={"weights": [param.name for param in group[:20]]},
            )  # fmt: skip


def _large(step: StepView, params: list[Param], first: dict[str, Start], limit: float) -> Draft:
    def gain(param: Param) -> float:
        module = step.modules.get(param.module) if param.module is not None else None
        return _gain(param, module is not None and "Embedding" in module.cls)

    worst = max(params, key=gain)
    times = (worst.value.norm or 0.0) / first[worst.name].norm
    # One cause: what each step moves too far grows.
    far = [f.id for f in step.findings if f.code == "TT402" and f.severity != "note"]
    return Draft(
        message=f"{worst.name} has grown to {number_text(times)} times its first norm: rms * "
        f"sqrt(fan-in) is {number_text(gain(worst))} (limit {limit:g}), in {len(params)} weights",
        cause="large", follows=far[0] if far else None, phase="optimizer", module=worst.module,
        param=worst.name, value=gain(worst), limit=limit,
        evidence={"weights": {param.name: gain(param) for param in params[:20]}},
    )  # fmt: skip
