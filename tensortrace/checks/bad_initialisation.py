"""TT403: weights that start where training cannot begin, or begins badly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Param, Tensor
from tensortrace.text import number_text

_LAYERS = frozenset(("Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d"))
_CELLS = frozenset(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"))
# The gain of He et al. for ReLU: std = sqrt(2) / sqrt(fan-in).
_HE = math.sqrt(2)
# The steps before are all full, unless somebody says otherwise.
_ALL_FULL = 20


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as it was first seen; `fan` is the smaller of fan-in and fan-out."""

    param: Param
    path: str
    rms: float
    fan: int
    fan_in: int

    @property
    def gain(self) -> float:
        """The rms in units of 1 / sqrt(fan)."""
        return self.rms * math.sqrt(self.fan)


@check("TT403", "bad-initialisation", when="full")
def bad_initialisation(
    step: StepView,
    memory: dict[str, Any],
    *,
    sustain: int = 5,
    large: float = 5.0,
    small: float = 0.01,
    embedding: float = 10.0,
    alike: float = 1e-5,
) -> Iterator[Draft]:
    """Weights start all zero, constant, or at a scale far from what their fan-in asks for.

    Symptom:    the loss stays where guessing puts it, or starts far above it and takes long to come
                down; widening the network changes nothing, as all units compute the same
    Threshold:  a weight of two dims or more that is exactly 0, as is its gradient, in `sustain`
                full steps running in which its optimizer steps at a rate above 0. Or, where a
                weight is first seen: all elements of a linear or convolution layer equal and not 0,
                and another layer takes its features and has a gradient to send back; or rms *
                sqrt(the smaller of fan-in and fan-out) > large * sqrt(2), and the rms of the
                layer's output is more than half as many times that of its input and than 1, of a
                linear or convolution layer (an embedding whose weight it shares included) or,
                without the output, of what a recurrent layer feeds back; or rms * sqrt(fan-in) <
                small * sqrt(2) in two layers or more and in most of them; or an embedding has rms >
                embedding. Or, in its first two optimizer steps: all rows of a weight and all rows
                of its gradient are alike (apart by < alike * their norm)
    Source:     Glorot and Bengio 2010, He et al. 2015: std = sqrt(2 / fan-in) keeps the scale of
                the outputs, with the fan-out that of the gradients, and either will do; PyTorch's
                own default is 0.41 times the first; equal units get equal gradients and stay
                equal (Goodfellow et al. 2016, section 8.4), but for rounding of about 1e-7. `large`
                and `small` measured on tests/healthy: 0.34 to 0.83 times, deliberate zeros aside;
                std 0.02 at width 1024 has 0.45. `sustain`: a zero output or gate after a zero one
                gets its gradient in the third step (Peebles and Xie 2023, adaLN-Zero)
    Fix:        leave PyTorch's default, or nn.init.kaiming_normal_(weight) for ReLU,
                nn.init.xavier_uniform_(weight) for tanh, nn.init.normal_(weight, std=0.02) in
                transformers, embeddings that share their weight with the output included; zero is
                for biases, for the last layer, and for one of two matrices in a product
    Misses:     layers of classes of your own; equal units that get different gradients, as those of
                an output layer; weights of an optimizer whose first step that is recorded in full
                comes after step 20, as it may have moved them before; a tiny weight between larger
                ones

    Example:
        for p in model.parameters():
            nn.init.constant_(p, 0.01)

    Fixed:
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.kaiming_normal_(p)
            else:
                nn.init.zeros_(p)
    """
    if not step.params:
        return
    yield from _stuck(step, memory.setdefault("streaks", {}), sustain)
    yield from _alike(step, alike)
    met: set[str] = memory.setdefault("met", set())
    trained = _trained(step, memory.setdefault("optimizers", set()))
    fresh: list[Weight] = []
    for param in step.params:
        shape = param.value.shape or ()
        if param.name in met or len(shape) < 2 or param.value.norm is None:
            continue
        met.add(param.name)
        if param.optimizer in trained:
            continue
        fan_in = param.value.numel // max(shape[0], 1)
        if fan_in and param.module is not None:
            rms = param.value.norm / math.sqrt(param.value.numel)
            fan = min(fan_in, shape[0] * math.prod(shape[2:]))
            fresh.append(Weight(param, param.module, rms, fan, fan_in))
    if fresh:
        yield from _constant(step, fresh)
        yield from _too_large(step, fresh, large, embedding)
        yield from _too_small(step, fresh, small)


def _trained(step: StepView, met: set[int]) -> set[int]:
    """Which optimizers may have moved their weights before any record showed them."""
    new = {param.optimizer for param in step.params} - met
    met |= new
    return new if step.number >= _ALL_FULL else set()


def _flow(step: StepView, path: str) -> tuple[Tensor, Tensor] | None:
    """What a module was given first and what it made of it, in its first call of the step."""
    for call in step.calls:
        if call.module == path and call.op is None and call.phase == "forward":
            given = step.tensors.get(call.inputs[0][1]) if call.inputs else None
            made = step.tensors.get(call.outputs[0][1]) if call.outputs else None
            return (given, made) if given is not None and made is not None else None
    return None


def _stuck(step: StepView, streaks: dict[str, int], sustain: int) -> Iterator[Draft]:
    moving = {o.index for o in step.optimizers if not o.skipped and o.highest_lr > 0}
    stuck: list[Param] = []
    ran = set(step.summary.modules.path) if step.summary is not None else set()
    for param in step.params:
        if param.optimizer not in moving or param.grad is None or param.module not in ran:
            continue
        nothing = all(0 < t.numel == t.zeros for t in (param.value, param.grad))
        if nothing and len(param.value.shape or ()) > 1:
            streaks[param.name] = streaks.get(param.name, 0) + 1
            if streaks[param.name] >= sustain:
                stuck.append(param)
        else:
            streaks.pop(param.name, None)
    if stuck:
        first = stuck[0]
        count = streaks[first.name]
        yield Draft(
            message=f"all {first.value.numel} elements of {first.name} are 0, and so is their "
            f"gradient, in {count} optimizer steps running (limit {sustain}), as in {len(stuck)} "
            "weights in all: they cannot leave 0",
            cause="zero", module=first.module, param=first.name, value=count, limit=sustain,
            evidence={"weights": [p.name for p in stuck[:20]]},
        )  # fmt: skip


def _alike(step: StepView, limit: float) -> Iterator[Draft]:
    found: list[tuple[float, Param]] = []
    for param in step.params:
        value, grad = param.value, param.grad
        of_grad = grad.row_spread if grad is not None else None
        # Zeros have no spread.
        of_value = 0.0 if value.zeros == value.numel else value.row_spread
        if of_grad is not None and of_value is not None and max(of_value, of_grad) < limit:
            found.append((max(of_value, of_grad), param))
    if found:
        spread, first = found[0]
        rows = (first.value.shape or (0,))[0]
        yield Draft(
            message=f"the {rows} rows of {first.name} are alike, and so are those of its gradient "
            f"(apart by {number_text(spread)} of their norm, limit {limit:g}), as in {len(found)} "
            "weights: units that start equal and learn the same stay equal",
            cause="alike", module=first.module, param=first.name, value=spread, limit=limit,
            evidence={"weights": [param.name for _, param in found[:20]]},
        )  # fmt: skip


def _constant(step: StepView, fresh: list[Weight]) -> Iterator[Draft]:
    found: list[Weight] = []
    for weight in fresh:
        value = weight.param.value
        shape = value.shape or ()
        # (n, 1, k, k) is a depthwise filter: each row has a channel of its own.
        alone = shape[0] < 2 or weight.fan_in < 2 or (len(shape) > 2 and shape[1] == 1)
        if alone or not value.min or value.min != value.max:
            continue
        if step.cls_of(weight.path) in _LAYERS and _feeds_another(step, weight.path, shape[0]):
            found.append(weight)
    if found:
        first = found[0]
        yield Draft(
            message=f"all elements of {first.param.name} are {number_text(first.param.value.min)},"
            f" as in {len(found)} hidden layers: all of a layer's units get the same input and"
            " the same gradient",
            cause="alike", module=first.path, param=first.param.name,
            value=first.param.value.min, evidence={"weights": [w.param.name for w in found[:20]]},
        )  # fmt: skip


def _feeds_another(step: StepView, path: str, features: int) -> bool:
    """Whether a later layer takes so many features that depend on something trained."""
    seen = False
    for call in sorted(step.calls, key=lambda call: call.seq):
        if call.op is not None or call.phase != "forward":
            continue
        if call.module == path:
            seen = True
        elif seen and call.module is not None and call.inputs:
            given = step.tensors.get(call.inputs[0][1])
            module = step.modules.get(call.module)
            shapes = [p.shape for p in module.parameters] if module is not None else []
            takes = any(len(shape) > 1 and shape[1] == features for shape in shapes)
            if takes and given is not None and given.requires_grad:
                return True
    return False


def _too_large(
    step: StepView, fresh: list[Weight], large: float, embedding: float
) -> Iterator[Draft]:
    limit = large * _HE
    found: list[tuple[float, str, Weight]] = []
    for weight in fresh:
        cls, path = step.cls_of(weight.path), weight.path
        if cls == "Embedding":
            if weight.rms > embedding:
                yield Draft(
                    message=f"the embedding {weight.param.name} starts at rms "
                    f"{number_text(weight.rms)} (limit {embedding:g})",
                    cause="embedding", module=path, param=weight.param.name, value=weight.rms,
                    limit=embedding,
                )  # fmt: skip
                continue
            path = _shares(step, weight)
        if cls in _CELLS and "weight_hh" in weight.param.name and weight.gain > limit:
            found.append((weight.gain, path, weight))
        if weight.gain > limit and (cls in _LAYERS or path != weight.path):
            flow = _flow(step, path)
            if flow is None or not (flow[0].norm and flow[1].norm):
                continue
            rms_in, rms_out = (t.norm / math.sqrt(t.numel) for t in flow if t.norm)
            if rms_out > limit / 2 * max(rms_in, 1.0):
                found.append((weight.gain, path, weight))
    if found:
        gain, path, worst = max(found, key=lambda one: one[0])
        he = _HE / math.sqrt(worst.fan)
        shared = f", which {path} shares," if path != worst.path else ""
        yield Draft(
            message=f"{worst.param.name}{shared} starts at rms {number_text(worst.rms)}, "
            f"{number_text(gain / _HE)} times the {number_text(he)} that a fan of "
            f"{worst.fan} asks for (limit {large:g}), in {len(found)} weights",
            cause="large", module=path, param=worst.param.name, value=gain / _HE, limit=large,
            evidence={"weights": {w.param.name: g / _HE for g, _, w in found[:20]}},
        )  # fmt: skip


def _shares(step: StepView, weight: Weight) -> str:
    """The linear layer whose weight is this embedding's: its own, of that shape, has no record."""
    own = {param.name for param in step.params}
    for path, module in step.modules.items():
        same = [p for p in module.parameters if p.shape == weight.param.value.shape]
        names = [f"{path}.{p.name}" if path else p.name for p in same if p.requires_grad]
        if module.cls in _LAYERS and names and not own.intersection(names):
            return path
    return weight.path


def _too_small(step: StepView, fresh: list[Weight], small: float) -> Iterator[Draft]:
    layers = [w for w in fresh if w.rms and step.cls_of(w.path) in _LAYERS]
    shares = {w.param.name: w.rms * math.sqrt(w.fan_in) / _HE for w in layers}
    tiny = [weight for weight in layers if shares[weight.param.name] < small]
    if len(tiny) > 1 and 2 * len(tiny) > len(layers):
        worst = min(tiny, key=lambda weight: shares[weight.param.name])
        share = shares[worst.param.name]
        yield Draft(
            message=f"{worst.param.name} starts at rms {number_text(worst.rms)}, "
            f"{number_text(share)} times what a fan-in of {worst.fan_in} asks for (limit {small:g})"
            f", as do {len(tiny)} of {len(layers)} layers: next to nothing passes them",
            cause="small", module=worst.path, param=worst.param.name, value=share, limit=small,
            evidence={"weights": dict(sorted(shares.items(), key=lambda one: one[1])[:20])},
        )  # fmt: skip
