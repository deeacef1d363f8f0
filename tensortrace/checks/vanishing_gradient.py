"""TT202: gradients that vanish on their way to the first layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, depth_profile, steadiness
from tensortrace.text import module_text, number_text


@check("TT202", "vanishing-gradient")
def vanishing_gradient(
    step: StepView,
    memory: dict[str, Any],
    *,
    ratio: float = 0.001,
    depth: int = 5,
    sustain: int = 4,
    window: int = 6,
) -> Iterator[Draft]:
    """The gradient shrinks layer by layer and hardly reaches the first ones.

    Symptom:    the loss hardly moves or stops early; the first layers stay what they were
    Threshold:  over at least `depth` layers of one class, rms of the parameter gradients of the
                first < ratio * that of the last, shrinking toward the input in 80 % of the steps
                from layer to layer and not by one jump (over 60 % of the fall), in `sustain` of
                the last `window` steps that have gradients
    Source:     first over last kernel < 1e-3 as in AUTOTRAINER; its second condition, a norm under
                1e-4, and the 1e-7 of SageMaker Debugger and DeepDiagnosis are absolute and left
                out; sustained as in TorchLens (5 of 8), somewhat shorter
    Fix:        ReLU, GELU or SiLU for sigmoid and tanh; residual connections; normalisation
                layers; kaiming or xavier initialisation for the activation in use
    Misses:     a recurrent network unrolled over time is one layer; layers of several classes
                that alternate are seen by the commonest class only; a chain with frozen layers in
                it, since adapters (LoRA) begin with gradients of zero; parts with no gradient at
                all are TT203; of networks with a loss and an optimizer each the way through both
    Example:    layers = []
                for _ in range(12):
                    layers += [nn.Linear(64, 64), nn.Sigmoid()]
    Fixed:      layers = []
                for _ in range(12):
                    layers += [nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()]
    """
    recent: deque[bool] | None = memory.get("recent")
    if recent is None:
        recent = memory["recent"] = deque(maxlen=window)
    low, high = step.span("param_grad_rms")
    # After a whole window without, one more changes nothing.
    if low > 0 and low / high >= ratio and len(recent) == window and True not in recent:
        return
    layers = depth_profile(step, "param_grad_rms")
    if not layers:
        return
    first, last = layers[0], layers[-1]
    shrunk = first[1] / last[1]
    vanishes = len(layers) >= depth and shrunk < ratio
    if vanishes:  # seldom: a logarithm of each layer in every step is most of the cost
        fall, jump = steadiness([rms for _, rms in layers])
        vanishes = fall >= 0.8 and jump <= 0.6 and not _holds_frozen(step, layers)
    recent.append(vanishes)
    if not vanishes or sum(recent) < sustain:
        return
    yield Draft(
        message=f"gradient rms shrinks from {number_text(last[1])} at {module_text(last[0])} to "
        f"{number_text(first[1])} at {module_text(first[0])} over {len(layers)} layers: "
        f"{number_text(shrunk)} of it arrives (limit {number_text(ratio)}), "
        f"{sum(recent)} of {len(recent)} steps",
        cause="depth", phase="backward", module=first[0], value=shrunk, limit=ratio,
        evidence={"profile": [list(layer) for layer in layers], "steps": sum(recent)},
    )  # fmt: skip


def _holds_frozen(step: StepView, layers: list[tuple[str, float]]) -> bool:
    """Whether a layer of the same class, called between the first and the last, is frozen."""
    paths = list(step.modules)  # in order of first call
    cls = step.cls_of(layers[0][0])
    between = paths[paths.index(layers[0][0]) : paths.index(layers[-1][0])]
    called = [step.modules[path] for path in between if step.cls_of(path) == cls]
    return any(m.parameters and not any(p.requires_grad for p in m.parameters) for m in called)
