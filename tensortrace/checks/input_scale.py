"""TT601: inputs that are not normalised, or not as they were in training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import module_text, number_text

_FLOATS = ("float", "bfloat")


@check("TT601", "input-scale", when="full")
def input_scale(
    step: StepView,
    memory: dict[str, Any],
    *,
    large: float = 20.0,
    small: float = 0.01,
    sustain: int = 3,
    far: float = 3.0,
    far_in_training: float = 20.0,
    least: int = 10,
) -> Iterator[Draft]:
    """Inputs are not normalised, or are on another scale than those seen in training.

    Symptom:    the first steps explode or need a tiny learning rate, or the network sees nothing of
                its input; or validation is much worse than training from the first epoch on
    Threshold:  the first layer with weights gets data with rms > large, or with all elements
                within `small` of 0, in `sustain` full steps running that train, each time that it
                is called, and no norm layer follows it; what a module of the step made does not
                count beside what none did (a discriminator gets both). Or: the std of what an
                outermost module in eval mode gets, in a batch of 8 or more, lies more than `far`
                times outside of all that it got in training (at least `least` full steps); in
                training itself, `far_in_training` times (a note)
    Source:     LeCun et al. 1998, "Efficient BackProp", section 4.3: the initialisations in use
                assume inputs of mean 0 and variance 1; UMLAUT and DeepDiagnosis speak up outside
                -1 to 1; here wider (measured on tests/healthy: rms 0.14 to 1.4; std in eval mode
                never outside, in training at most 1.15 times)
    Fix:        x = (x - mean) / std with the numbers of the training set; x / 255 for pixels, once;
                the same transform for training and validation
    Misses:     inputs that are shifted but not large; single columns of a table beside others;
                tokens; what is normalised inside the first module by ops
    Example:    train = ImageFolder("train", Compose([ToTensor(), Normalize(mean, std)]))
                valid = ImageFolder("valid", ToTensor())
    Fixed:      both = Compose([ToTensor(), Normalize(mean, std)])
                train, valid = ImageFolder("train", both), ImageFolder("valid", both)
    """
    calls = [c for c in step.forward() if c.op is None]
    trains = any(not o.skipped for o in step.optimizers)
    inputs = {id for c in calls if c.parent is None for _, id in c.inputs}
    reached = {c.forward for c in step.calls if c.phase == "backward"}
    seen: dict[str, deque[float]] = memory.setdefault("seen", {})
    given: dict[str, list[tuple[Call, Tensor, bool]]] = {}
    for i, call in enumerate(calls):
        data = _data(step, call)
        if data is None or data.norm is None:
            continue
        rows = data.shape[0] if data.shape else 0
        # Single pictures are dark or bright, a batch of them hardly is.
        if call.parent is None and data.std and rows >= 8 and data.numel >= 64:
            yield from _compare(call, data, seen, far, far_in_training, least)
            if call.training:
                path = call.module or ""
                if path not in seen:
                    seen[path] = deque(maxlen=100)
                seen[path].append(data.std)
        if trains and call.seq in reached and _is_first(step, call, data, inputs):
            rms = data.norm / math.sqrt(data.numel)
            top = max(abs(data.min or 0.0), abs(data.max or 0.0))
            out = rms > large or 0 < top < small
            out = out and not _is_normalised(step, call, calls[i + 1 :])
            given.setdefault(call.module or "", []).append((call, data, out))
    running: dict[str, int] = memory.setdefault("running", {})
    made = {id for c in calls for _, id in c.outputs if _origin(step, id) == id} if given else ()
    for path, each in given.items():
        outer = [g for g in each if _origin(step, g[1].id) not in made] or each
        running[path] = running.get(path, 0) + 1 if all(out for *_, out in outer) else 0
        steps = running[path]
        if steps < sustain:
            continue
        call, data, _ = outer[0]
        rms = (data.norm or 0.0) / math.sqrt(data.numel)
        if rms > large:
            yield _out_of_scale(call, data, f"rms {number_text(rms)}", rms, large, steps=steps)
        else:
            top = max(abs(data.min or 0.0), abs(data.max or 0.0))
            side = f"no element beyond {number_text(top)}"
            yield _out_of_scale(call, data, side, top, small, steps=steps)


def _out_of_scale(
    call: Call, data: Tensor, side: str, value: float, limit: float, *, steps: int
) -> Draft:
    path = call.module or ""
    return Draft(
        message=f"the input of {module_text(path)}, the first layer, is not normalised: {side} "
        f"(limit {limit:g}), mean {number_text(data.mean)}, from {number_text(data.min)} to "
        f"{number_text(data.max)}",
        cause=f"scale {path}", phase="forward", module=path, seq=call.seq, tensor=data.id,
        value=value, limit=limit, location=call.location,
        evidence={"placed": "direct", "steps": steps},
    )  # fmt: skip


def _compare(
    call: Call, data: Tensor, seen: dict[str, deque[float]], *limits: float
) -> Iterator[Draft]:
    far, far_in_training, least = limits
    known = seen.get(call.module or "", ())
    limit = far_in_training if call.training else far
    if len(known) < least or not data.std:
        return
    ratio = max(data.std / max(known), min(known) / data.std)
    if ratio > limit:
        yield Draft(
            message=f"the input of {module_text(call.module)} has std {number_text(data.std)} and "
            f"mean {number_text(data.mean)}{'' if call.training else ' in eval mode'}: in training "
            f"its std was {number_text(min(known))} to {number_text(max(known))}, so "
            f"this is {number_text(ratio)} times outside (limit {limit:g})",
            cause=f"far {call.module} {call.training}", phase="forward", module=call.module,
            severity="note" if call.training else "warning", seq=call.seq, tensor=data.id,
            value=ratio, limit=limit, location=call.location,
            evidence={"placed": "direct", "seen": [min(known), max(known)]},
        )  # fmt: skip


def _origin(step: StepView, id: int) -> int:
    """What a tensor is a view of at last, as a detached one is; itself if it is of none."""
    passed = set[int]()  # a log may say anything
    while id not in passed and (tensor := step.tensors.get(id)) and tensor.view_of is not None:
        passed.add(id)
        id = tensor.view_of
    return id


def _data(step: StepView, call: Call) -> Tensor | None:
    """Pick the first input of a call, if it is data: floating point and without a gradient."""
    given = step.tensors.get(call.inputs[0][1]) if call.inputs else None
    if given is None or given.requires_grad or not given.dtype.startswith(_FLOATS):
        return None
    return given


def _is_first(step: StepView, call: Call, data: Tensor, inputs: set[int]) -> bool:
    """Tell whether a layer with weights to learn is given what came into the network."""
    if data.id not in inputs and data.view_of not in inputs:
        return False
    module = step.module_of(call)
    return module is not None and any(
        len(p.shape) > 1 and p.requires_grad for p in module.parameters
    )


def _is_normalised(step: StepView, call: Call, later: list[Call]) -> bool:
    made = {id for _, id in call.outputs}
    for follower in later:
        named = step.module_of(follower) is not None and "Norm" in step.cls_of(follower.module)
        if named and any(id in made for _, id in follower.inputs):
            return True
    return False
