"""TT302: sigmoids, tanhs and softmaxes whose slope has gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from tensortrace.checks import Draft, StepView, check, has_matrix, plain_op
from tensortrace.records import Call, Tensor
from tensortrace.text import module_text, number_text

_KINDS = frozenset(("sigmoid", "tanh", "softmax"))
Site = tuple[str, str]


@check("TT302", "saturated", when="full")
def saturated(
    step: StepView,
    memory: dict[str, Any],
    *,
    slope: float = 0.02,
    sustain: int = 4,
    window: int = 6,
) -> Iterator[Draft]:
    """Hidden sigmoids, tanhs or softmaxes are at their ends, where no gradient passes them.

    Symptom:    the layers in front of them hardly learn; attention looks at one place only, or a
                gate is always open or always shut, from the first steps on
    Threshold:  the mean slope over all elements of the output is < slope * the greatest that there
                can be, in `sustain` of the last `window` full steps that train, where a layer with
                weights follows in the same model. The slope follows from the output alone:
                x (1 - x) of a sigmoid, 1 - x^2 of a tanh, 1 - sum of x^2 over a row of a softmax
    Source:     Glorot and Bengio 2010, section 3 (saturation of hidden layers); Vaswani et al.
                2017, section 3.2.1 (why scores are divided by sqrt(d)). Below `slope` fewer than
                one unit in ten has a fifth of the greatest slope. Measured on tests/healthy: at
                least 0.03 (LBFGS, converged), else 0.5
    Fix:        inputs normalised to mean 0 and std 1; xavier_normal_ weights (TT403); a norm layer
                in front; scores divided by sqrt(head_dim) before a softmax; a lower learning rate
                if it came while training
    Misses:     functional calls inside modules at level "module" (level="op" shows them); the
                gates inside nn.LSTM and nn.GRU; the last activation of a model, which may well be
                sure; a gate that is meant to be hard is told

    Example:
        scores = self.softmax(q @ k.transpose(-2, -1))

    Fixed:
        scores = self.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    """
    if not any(not optimizer.skipped for optimizer in step.optimizers):
        return
    seen = _slopes(step)
    series: dict[Site, deque[bool]] = memory.setdefault("series", {})
    found: list[Site] = []
    for site, (mean, _) in seen.items():
        recent = series.setdefault(site, deque(maxlen=window))
        recent.append(mean < slope)
        if mean < slope and sum(recent) >= sustain:
            found.append(site)
    if not found:
        return
    path, kind = first = found[0]
    mean, call = seen[first]
    given = step.tensors.get(call.inputs[0][1]) if call.inputs else None
    rms = f", on an input of rms {number_text(given.rms)}" if given and given.rms else ""
    recent = series[first]
    yield Draft(
        message=f"the mean slope of {kind} in {module_text(path)} is {number_text(mean)} of the "
        f"greatest (limit {slope:g}){rms}, {sum(recent)} of {len(recent)} full steps, as in "
        f"{len(found)} of {len(seen)} places",
        cause="saturated", phase="forward", module=path, op=call.op, seq=call.seq, value=mean,
        limit=slope, location=call.location,
        evidence={"slopes": [[*site, seen[site][0]] for site in found[:20]]},
    )  # fmt: skip


def _slopes(step: StepView) -> dict[Site, tuple[float, Call]]:
    """The largest relative slope of each site of the step, in order of call."""
    calls = step.forward()
    by_seq = {call.seq: call for call in calls}
    # By outermost call: the last call inside it of a module with weights.
    last: dict[int, int] = {}
    outermost: dict[int, int] = {}
    for call in calls:
        above = by_seq.get(call.parent) if call.parent is not None else None
        outermost[call.seq] = outermost.get(above.seq, above.seq) if above else call.seq
        module = step.modules.get(call.module) if call.module is not None else None
        if call.op is None and module and has_matrix(module):
            last[outermost[call.seq]] = call.seq
    found: dict[Site, tuple[float, Call]] = {}
    for call in calls:
        kind = _kind(step, call)
        hidden = call.seq < last.get(outermost[call.seq], -1)
        if kind is None or not hidden or not call.grad_enabled or call.training is False:
            continue
        mean = _mean_slope(kind, step.tensors, call)
        site = (call.module or "", kind)
        if mean is not None and (site not in found or mean > found[site][0]):
            found[site] = (mean, call)
    return found


def _kind(step: StepView, call: Call) -> str | None:
    if call.module is None:
        return None
    module = step.modules.get(call.module)
    word = plain_op(call.op) if call.op else module.cls.lower() if module is not None else ""
    return word if word in _KINDS else None


def _mean_slope(kind: str, tensors: Mapping[int, Tensor], call: Call) -> float | None:
    """The mean slope of an output over the greatest that it can have; None if not known."""
    made = tensors.get(call.outputs[0][1]) if call.outputs else None
    if made is None or not made.requires_grad or made.nonfinite:
        return None
    if made.mean is None or made.norm is None or made.numel < 2:
        return None
    square = made.norm**2 / made.numel
    if square > 1 + 1e-6:
        return None  # inside vmap the elements of one sample are counted, and those of all measured
    if kind == "sigmoid":
        return max(0.0, 4 * (made.mean - square))
    if kind == "tanh":
        return max(0.0, 1 - square)  # of rounded numbers it may be less than nothing
    # A row sums to 1, so that the mean is 1 / classes. Of few classes one is easily taken.
    if not 0 < made.mean <= 0.25:
        return None
    return max(0.0, (1 - square / made.mean) / (1 - made.mean))
