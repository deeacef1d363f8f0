"""TT201: gradients that explode, over time or with depth."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tensortrace.checks import Draft, StepView, check, depth_profile, steadiness
from tensortrace.records import Step, from_scalar
from tensortrace.text import module_text, number_text


@dataclass(slots=True)
class Series:
    """The gradient norms of the steps of one set of optimizers; bounded by the window.

    `later` are the paths and numbers of steps that are still to be sorted into `modules`.
    """

    norms: deque[float]
    losses: deque[float]
    modules: dict[str, deque[float]] = field(default_factory=dict)
    later: list[tuple[list[str], list[float | None]]] = field(default_factory=list)
    running: int = 0
    first: list[float] = field(default_factory=list)


@check("TT201", "exploding-gradient")
def exploding_gradient(
    step: StepView,
    memory: dict[str, Any],
    *,
    ratio: float = 20.0,
    window: int = 20,
    sustain: int = 3,
    least: int = 5,
    converged: float = 0.1,
    depth_ratio: float = 1000.0,
    depth: int = 5,
) -> Iterator[Draft]:
    """The gradient grows far above its own recent median, or layer by layer toward the input.

    Symptom:    the loss jumps up or oscillates, soon it is NaN; clipping hides it and training
                crawls
    Threshold:  total norm before clipping > ratio * median of up to `window` earlier norms (at
                least `least` of them, of steps of the same optimizers) and above the largest of
                them in `sustain` steps running, while the loss is not below its own median and the
                norm is above converged * median of the first `window` of them. Or: over at least
                `depth` layers of one class the rms of the parameter gradients rises toward the
                input by more than depth_ratio, in 80 % of the steps from layer to layer and not by
                one jump (over 60 % of the rise), in `sustain` steps running
    Source:     relative and before clipping, as fixed limits (1e4) depend on the number of
                elements and clipping hides them (TorchLens 2.36); first layer over last as in
                AUTOTRAINER (70), wider since default initialisations reach 70; `ratio` and
                `sustain` chosen here: one batch in a healthy run reaches 20, three in a row do not
    Fix:        clip with torch.nn.utils.clip_grad_norm_; a lower learning rate or a warm-up;
                orthogonal or smaller initialisation of recurrent weights; normalisation layers
    Misses:     growth by less than `ratio` over `window` steps, or to no more than they have had; a
                run that is bad from its first step on and has no depth to show it; a curriculum
                that changes the data on purpose looks the same
    Example:    rnn = nn.RNN(1, 64, nonlinearity="relu")  # 16 pixels at first, then 64
                nn.init.kaiming_normal_(rnn.weight_hh_l0, nonlinearity="relu")
    Fixed:      rnn = nn.RNN(1, 64, nonlinearity="relu")
                nn.init.orthogonal_(rnn.weight_hh_l0)
    """
    summary = step.summary
    if summary is None:
        return
    norm, loss = from_scalar(summary.grad_norm), from_scalar(summary.loss)
    if norm is not None and math.isfinite(norm):
        # Steps of different optimizers are different losses: a GAN has two series.
        known: dict[tuple[int, ...], Series] = memory.setdefault("series", {})
        of = (step.optimizers[0].index,) if len(step.optimizers) == 1 else _indices(step)
        series = known.get(of)
        if series is None:
            series = known[of] = Series(deque(maxlen=window), deque(maxlen=window))
        norms = series.norms
        # A policy that is nearly certain has steps of almost no gradient, then one of the old kind.
        # So the largest rules most out; the median of each window would be most of the cost.
        usual = median(norms) if len(norms) >= least and norm > max(norms) else 0.0
        if usual > 0 and norm > ratio * usual and not _explained(series, norm, loss, converged):
            series.running += 1
            if series.running >= sustain:
                _sort_in(series, window)
                yield _jump(summary, series, f"time {list(of)}", usual, ratio)
        else:
            _remember(summary, series, norm, loss, window)
    low, high = step.span("param_grad_rms")
    if high == 0 or (low > 0 and high / low <= depth_ratio and not memory.get("deep")):
        return
    layers = depth_profile(step, "param_grad_rms")
    if len(layers) < 2:
        return
    deep = len(layers) >= depth and layers[0][1] / layers[-1][1] > depth_ratio
    if deep:  # seldom: a logarithm of each layer in every step is most of the cost
        rise, jump = steadiness([rms for _, rms in reversed(layers)])
        deep = rise >= 0.8 and jump <= 0.6
    memory["deep"] = memory.get("deep", 0) + 1 if deep else 0
    if memory["deep"] >= sustain:
        yield _with_depth(layers, depth_ratio, memory["deep"])


def _indices(step: StepView) -> tuple[int, ...]:
    return tuple(sorted({o.index for o in step.optimizers}))


def _explained(series: Series, norm: float, loss: float | None, converged: float) -> bool:
    """Whether a norm that is large beside those before it is so for nothing."""
    if loss is not None and series.losses and loss < median(series.losses):
        return True
    # Near a minimum the norm falls by orders and Adam's comes back by some, for nothing.
    return bool(series.first) and norm <= converged * median(series.first)


def _remember(summary: Step, series: Series, norm: float, loss: float | None, window: int) -> None:
    series.running = 0
    series.norms.append(norm)
    if len(series.first) < window:
        series.first.append(norm)
    if loss is not None and math.isfinite(loss):
        series.losses.append(loss)
    series.later.append((summary.modules.path, summary.modules.param_grad_rms))
    if len(series.later) >= window:
        _sort_in(series, window)


def _sort_in(series: Series, window: int) -> None:
    """Sort the gradients of several steps by module at once: a finding alone asks for them."""
    later, series.later = series.later, []
    for paths, numbers in later:
        for path, rms in zip(paths, numbers, strict=False):
            if rms:
                known = series.modules.get(path)
                if known is None:
                    known = series.modules[path] = deque(maxlen=window)
                known.append(rms)


def _jump(summary: Step, series: Series, key: str, usual: float, ratio: float) -> Draft:
    norm = float(summary.grad_norm or 0)
    rows = _by_growth(summary, series.modules)
    # After a run of such steps a module's own median is as large: then it says nothing.
    most = (f"; most of all in {module_text(rows[0][0])} ({number_text(rows[0][2])}x)"
            if rows and rows[0][2] > 2 else "")  # fmt: skip
    return Draft(
        message=f"gradient norm {number_text(norm)} is {number_text(norm / usual)}x the median "
        f"{number_text(usual)} of the {len(series.norms)} steps before (limit {ratio:g}x), "
        f"{series.running} steps running{most}",
        cause=key, phase="backward", module=rows[0][0] if rows else None, value=norm,
        limit=ratio * usual,
        evidence={"profile": [[path, rms] for path, rms, _ in rows], "median": usual,
                  "steps": series.running},
    )  # fmt: skip


def _with_depth(layers: list[tuple[str, float]], limit: float, steps: int) -> Draft:
    (first, high), (last, low) = layers[0], layers[-1]
    return Draft(
        message=f"gradient rms grows {number_text(high / low)}x from {module_text(last)} "
        f"({number_text(low)}) back to {module_text(first)} ({number_text(high)}) "
        f"over {len(layers)} layers (limit {number_text(limit)}x), {steps} steps running",
        cause="depth", phase="backward", module=first, value=high / low, limit=limit,
        evidence={"profile": [list(layer) for layer in layers], "steps": steps},
    )  # fmt: skip


def _by_growth(summary: Step, modules: dict[str, deque[float]]) -> list[tuple[str, float, float]]:
    """List path, gradient rms and growth over its own median, the most grown first."""
    rows = [
        (path, rms, rms / median(modules[path]))
        for path, rms in zip(summary.modules.path, summary.modules.param_grad_rms, strict=False)
        if rms and modules.get(path)
    ]
    return sorted(rows, key=lambda row: -row[2])
