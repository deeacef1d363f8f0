"""TT402: weights that move too far or hardly at all in each step."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from statistics import median
from typing import Any

from tensortrace.checks import Draft, StepView, check, has_matrix, rates_rise
from tensortrace.records import Step, Tensor
from tensortrace.text import number_text

_LOWER = "a learning rate 10 to 100 times lower (1e-3 is Adam's default), or a warm-up"


@check("TT402", "update-ratio")
def update_ratio(
    step: StepView,
    memory: dict[str, Any],
    *,
    high: float = 0.3,
    sustain: int = 8,
    rewritten: float = 1.0,
    least: int = 3,
    low: float = 1e-6,
    idle: int = 20,
    young: int = 16,
    small: float = 0.01,
) -> Iterator[Draft]:
    """The optimizer rewrites weights in each step, or hardly moves any.

    Symptom:    the loss jumps about or is stuck high from the start; or it stays where it began
    Threshold:  norm of the update over norm of the weights (of two dims or more) > high in
                `sustain` optimizer steps running of a module. Or, embeddings aside: its median over
                at least `least` modules > rewritten in a single step; or that of all modules < low,
                and above 0 in one of them, in each of the first `idle` optimizer steps, or of the
                first since the last in which a learning rate rises. Neither of the first two counts
                a module of which a weight is all 0, or less than `small` of 1 / sqrt(fan-in) in the
                mean square, and in `young` optimizer steps after that one, but until it is <= high
                once
    Source:     about 1e-3 is usual (A. Karpathy, "Makemore 3"); outside 1e-5 to 1e-1 DeepDiagnosis
                speaks up, outside 1e-8 to 10 SageMaker Debugger. A step longer than the weights
                leaves nothing of their initialisation. `high` and `sustain` so that what starts
                near zero is silent: with Adam its k-th step has about 1/k (measured on
                tests/healthy: at most 3 steps running above 0.3, a median of at most 0.38);
                `young` as from zero it has 2/(k - 1) while the rate rises evenly from 0, and with a
                momentum of 0.9 about 3/k: 1.9 in the second step even where no rate rises; `small`
                chosen here, 58 times below the default of torch.nn.Linear
    Fix:        too far: a learning rate 10 to 100 times lower (1e-3 is Adam's default), warm-up;
                hardly at all: a higher one, and a loss that is not scaled down twice
    Misses:     weights of one dim; LBFGS, whose step is a search of many; updates of exactly 0
                (TT401); single layers that hardly move beside others that do, as zero-initialised
                branches make such; embeddings, of which a step moves a few rows
    Example:    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)  # as SGD had
    Fixed:      optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    """
    if step.summary is None or not step.taken:
        return
    running: dict[str, int] = memory.setdefault("running", {})
    # In nearly all steps the largest is below all limits, and nothing runs that it would end.
    quiet = "moves" in memory and not running and not memory["left"] and not step.summary.full
    if quiet and step.span("update_ratio")[1] <= min(high, rewritten):
        return
    if any(o.cls == "LBFGS" for o in step.taken):
        return
    ratios = _ratios(step, step.summary)
    fresh = _fresh(step, small)
    left = _left(memory, ratios, high, dict.fromkeys(fresh, young))
    if not ratios:
        return
    for path, ratio in ratios.items():
        if ratio > high and path not in left:
            running[path] = running.get(path, 0) + 1
        else:
            running.pop(path, None)
    far = [path for path in ratios if running.get(path, 0) >= sustain]
    if far:
        worst = max(far, key=lambda path: ratios[path])
        yield Draft(
            message=f"one step changes the weights by {number_text(ratios[worst])} of their norm, "
            f"{running[worst]} optimizer steps running (limit {high:g} in {sustain}), in {len(far)}"
            f" of {len(ratios)} modules",
            cause="far", phase="optimizer", module=worst, value=ratios[worst], limit=high,
            evidence={"modules": {path: ratios[path] for path in far[:20]}}, fix=_LOWER,
        )  # fmt: skip
    compared = {p: r for p, r in ratios.items() if "Embedding" not in step.modules[p].cls}
    grown = {path: ratio for path, ratio in compared.items() if path not in left}
    middle = median(grown.values()) if len(grown) >= least else 0.0
    if middle > rewritten and not far:
        worst = max(grown, key=lambda path: grown[path])
        yield Draft(
            message=f"one step changes the weights by {number_text(middle)} times their norm, the "
            f"median of {len(grown)} modules (limit {rewritten:g}): nothing is left of what "
            "they were",
            cause="far", phase="optimizer", module=worst, value=middle, limit=rewritten, fix=_LOWER,
            evidence={"modules": dict(list(grown.items())[:20])},
        )  # fmt: skip
    yield from _hardly(step, memory, compared, low, idle)


def _ratios(step: StepView, summary: Step) -> dict[str, float]:
    """The update ratio of each module with weights of two dims or more, by path."""
    found: dict[str, float] = {}
    columns = summary.modules
    for path, ratio in zip(columns.path, columns.update_ratio, strict=False):
        module = step.modules.get(path) if ratio is not None else None
        if ratio is not None and module is not None and has_matrix(module):
            found[path] = ratio
    return found


def _left(
    memory: dict[str, Any], ratios: dict[str, float], high: float, fresh: dict[str, int]
) -> dict[str, int]:
    """Count for how many more steps each module is let grow; `fresh` ones begin to do so."""
    left: dict[str, int] = memory.setdefault("left", {})
    for path, ratio in ratios.items():
        if path in left:
            left[path] -= 1
            if ratio <= high or left[path] < 0:
                del left[path]
    left.update(fresh)
    return left


def _fresh(step: StepView, small: float) -> set[str]:
    """The modules of a full step that have a weight near 0."""
    if step.summary is None or not step.summary.full:
        return set()
    return {p.module for p in step.params if p.module is not None
            and len(p.value.shape or ()) > 1 and _is_small(p.value, small)}  # fmt: skip


def _is_small(weight: Tensor, small: float) -> bool:
    """Whether a weight has yet to grow: it is 0, or far below the scale of its fan-in."""
    if weight.zeros == weight.numel:
        return weight.numel > 0
    rows = (weight.shape or (0,))[0]
    # Of `numel` elements with a fan-in of numel / rows: the numel goes.
    return rows > 0 and weight.norm is not None and weight.norm < small * sqrt(rows)


def _hardly(
    step: StepView, memory: dict[str, Any], compared: dict[str, float], low: float, idle: int
) -> Iterator[Draft]:
    if "moves" in memory:
        return
    rising = rates_rise(step, memory)
    if rising:
        memory["count"], memory["since"] = 0, " since a learning rate rose"
    if not compared:
        return
    if max(compared.values()) >= low:
        memory["moves"] = True
        return
    memory["count"] = memory.get("count", 0) + (not rising and any(compared.values()))
    if memory["count"] >= idle:
        most = max(compared, key=lambda path: compared[path])
        yield Draft(
            message=f"one step changes the weights by {number_text(compared[most])} of their norm "
            f"at most, in {len(compared)} modules and each of the first {memory['count']} optimizer"
            f" steps{memory.get('since', '')} (limit {low:g}): a million steps would be needed to "
            "train them",
            cause="hardly", phase="optimizer", module=most, value=compared[most], limit=low,
            fix="a learning rate 10 to 1000 times higher, and a loss that is not scaled down twice",
            evidence={"modules": dict(list(compared.items())[:20])},
        )  # fmt: skip
