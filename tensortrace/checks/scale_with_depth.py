"""TT303: activations that grow or shrink from layer to layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, depth_profile, steadiness
from tensortrace.text import module_text, number_text


# A step at rest has no rms of what inner layers return.
@check("TT303", "scale-with-depth", of=("inner",))
def scale_with_depth(
    step: StepView,
    memory: dict[str, Any],
    *,
    ratio: float = 1000.0,
    depth: int = 5,
    sustain: int = 4,
    window: int = 6,
) -> Iterator[Draft]:
    """The scale of the activations grows or shrinks from layer to layer.

    Symptom:    deep layers see next to nothing, or numbers so large that a small change of a weight
                overturns the output; float16 overflows
    Threshold:  over at least `depth` layers of one class, in order of call, rms of the output of
                the last > ratio * that of the first, or the reverse, in 80 % of the steps from
                layer to layer in the same direction and not by one jump (over 60 % of the way), in
                `sustain` of the last `window` steps that train
    Source:     He et al. 2015, section 2.2: the scale is a product over the layers, which a proper
                initialisation keeps from growing or shrinking exponentially; `ratio` as in TT202
                (measured on tests/healthy: at most 16 in either direction)
    Fix:        kaiming_normal_ for ReLU, xavier_normal_ for tanh, as initialisation; normalisation
                layers; residual connections, their branches scaled by 1 / sqrt(depth)
    Misses:     layers of several classes that alternate are seen by the commonest class only; a
                recurrent network unrolled over time is one layer; fewer than `depth` layers
    Example:    for conv in self.convs:  # 12 of Conv2d(64, 64, 3, bias=False), a ReLU after each
                    nn.init.normal_(conv.weight, std=0.01)
    Fixed:      for conv in self.convs:
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    """
    if not step.taken:
        return
    layers = depth_profile(step, "output_rms")
    recent = memory.setdefault("recent", deque(maxlen=window))
    shift = layers[-1][1] / layers[0][1] if len(layers) >= depth else 1.0
    grows = shift > 1
    out = max(shift, 1 / shift) > ratio
    if out:  # seldom: a logarithm of each layer in every step is most of the cost
        along, jump = steadiness([rms for _, rms in (layers if grows else layers[::-1])])
        out = along >= 0.8 and jump <= 0.6
    recent.append(out)
    if not out or sum(recent) < sustain:
        return
    (first, at_first), (last, at_last) = layers[0], layers[-1]
    yield Draft(
        message=f"output rms {'grows' if grows else 'shrinks'} from {number_text(at_first)} at "
        f"{module_text(first)} to {number_text(at_last)} at {module_text(last)} over {len(layers)} "
        f"layers: by {number_text(max(shift, 1 / shift))} (limit {ratio:g}), {sum(recent)} of "
        f"{len(recent)} steps",
        cause="depth", phase="forward", module=last, value=shift,
        limit=ratio if grows else 1 / ratio,
        evidence={"profile": [list(layer) for layer in layers], "steps": sum(recent)},
    )  # fmt: skip
