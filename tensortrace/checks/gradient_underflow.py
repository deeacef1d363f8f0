"""TT502: float16 gradients that are lost at the lower end of the dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.magnitudes import counts_of, share_from
from tensortrace.records import Call, Tensor, from_scalar
from tensortrace.text import module_text, number_text

# The smallest number of float16 above 0; what is below half of it becomes 0.
_SMALLEST = 2.0**-24
_CASTS = frozenset(("to", "float", "half", "type"))


@check("TT502", "gradient-underflow", when="full")
def gradient_underflow(
    step: StepView,
    memory: dict[str, Any],
    *,
    near: float = 16.0,
    share: float = 0.5,
    sustain: int = 3,
    least: int = 64,
    learnt: float = 0.1,
) -> Iterator[Draft]:
    """Gradients in float16 are so small that most of them become 0 or the last few numbers above.

    Symptom:    in float16 the loss stands still or falls more slowly than in float32; the first
                layers learn nothing
    Threshold:  in more than `share` of the float16 gradients of a step (of at least `least`
                elements) the rms of what is not 0 is below near * 2 ** -24, or they are 0
                throughout beside such; or a cast turns more than `share` of a float32 gradient into
                zeros; in `sustain` full steps running in which the loss is above `learnt` * what it
                was at first. A note, if the rms is above, and by their exponents more than `share`
                of what is not 0 in them is below: few large elements carry the sum, but Adam
                divides each by its own size
    Source:     Micikevicius et al. 2018, "Mixed Precision Training", section 3.2: values below
                2 ** -24 become 0, so that the loss is scaled; numbers below 2 ** -14 have fewer
                digits; `near`: 16 numbers are left between 0 and there, which is where a range of
                exponents ends (measured on tests/healthy, with a scale of 4096 and more: rms 0.06
                and more while it learns, and no element below)
    Fix:        scaler = torch.amp.GradScaler(); scaler.scale(loss).backward();
                scaler.step(optimizer); scaler.update(). Or bfloat16, whose range is that of
                float32. With a scaler: a higher init_scale, and no inf that keeps halving it
    Misses:     what is lost in a gradient most of which is large; which zeros were lost, and which
                are those of a ReLU or a mask; bfloat16 and float32, which reach down to 1e-38
    Example:    with torch.autocast("cuda", dtype=torch.float16):
                    loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
    Fixed:      with torch.autocast("cuda", dtype=torch.float16):
                    loss = criterion(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    """
    backward = sorted((c for c in step.calls if c.phase == "backward" and not c.replay),
                      key=lambda c: c.seq)  # fmt: skip
    loss = from_scalar(step.summary.loss) if step.summary is not None else None
    if not backward or loss is None:
        return
    first = memory.setdefault("first", abs(loss))
    if not any(tensor.dtype == "float16" for tensor in step.tensors.values()):
        memory["running"] = memory["weakly"] = 0
        return
    half = _sort(step, backward, near, share, least)
    part, cast = _flushed(step, backward, least)
    learns = abs(loss) > learnt * first
    low = bool(half.low) and len(half.low) + half.zero > share * half.count
    mostly = bool(half.mostly) and len(half.mostly) + half.zero > share * half.count
    running = _steps_running(memory, "running", learns and (low or part > share))
    weakly = _steps_running(memory, "weakly", learns and (low or mostly or part > share))
    if max(running, weakly) < sustain:
        return
    if cast and part > share:
        call, tensor = cast
        value, what = part, f"the cast to float16 makes 0 of {part:.0%} of the gradient"
    else:
        call, tensor = (half.low if low else half.mostly)[-1]
        value, what = _told(half, low, near)
    yield Draft(
        message=f"{what} (limit {share:.0%}), {'with' if step.scaled() else 'without'} a "
        f"GradScaler, in {max(running, weakly)} full steps running (limit {sustain})",
        cause="underflow", severity=None if running >= sustain else "note", phase="backward",
        module=call.module, op=call.op, seq=call.seq, tensor=tensor.id, value=value, limit=share,
        location=call.location,
        evidence={"placed": "direct", "gradients": half.count, "low": len(half.low),
                  "mostly": len(half.mostly), "zero": half.zero},
    )  # fmt: skip


def _steps_running(memory: dict[str, Any], key: str, out: bool) -> int:
    running: int = memory.get(key, 0) + 1 if out else 0
    memory[key] = running
    return running


@dataclass(slots=True)
class _Half:
    """The float16 gradients of a step: by what they hold beside zeros, `low` are `mostly` too."""

    count: int = 0
    zero: int = 0
    low: list[tuple[Call, Tensor]] = field(default_factory=list)
    mostly: list[tuple[Call, Tensor]] = field(default_factory=list)


def _sort(step: StepView, backward: list[Call], near: float, share: float, least: int) -> _Half:
    half, met = _Half(), set[int]()
    for call in backward:
        for _, id in (*call.inputs, *call.outputs):
            tensor = step.tensors.get(id)
            if tensor is None or tensor.dtype != "float16" or id in met or tensor.numel < least:
                continue
            met.add(id)
            if tensor.norm is None or tensor.nonfinite:
                continue
            half.count += 1
            if tensor.zeros == tensor.numel:
                half.zero += 1
                continue
            low = _rms(tensor) < near * _SMALLEST
            if low:
                half.low.append((call, tensor))
            if low or (_part_below(tensor, near) or 0.0) > share:
                half.mostly.append((call, tensor))
    return half


def _told(half: _Half, low: bool, near: float) -> tuple[float, str]:
    """The share that is lost, and what to say of it."""
    met = half.low if low else half.mostly
    call, tensor = met[-1]
    lost = len(met) + half.zero
    return lost / half.count, (
        f"{lost} of {half.count} float16 gradients are near or below "
        f"2 ** -24{'' if low else ' in most elements'}, at {module_text(call.module)} with "
        f"rms {number_text(_rms(tensor))}{_parts_text(tensor, near)}"
    )


def _rms(tensor: Tensor) -> float:
    """Root mean square of the elements that are not 0."""
    return (tensor.norm or 0.0) / math.sqrt(max(1, tensor.numel - tensor.zeros))


def _part_below(tensor: Tensor, near: float) -> float | None:
    """The share of what is not 0 that is certainly below; None if it was not counted."""
    counts = counts_of(tensor)
    return None if counts is None else 1 - share_from(counts, near * _SMALLEST)[1]


def _parts_text(tensor: Tensor, near: float) -> str:
    part = _part_below(tensor, near)
    if part is None:
        return ""
    nothing = tensor.zeros / max(1, tensor.numel)
    return f", {nothing:.0%} of it 0 and {part:.0%} of the rest among the last {near:g} numbers"


def _flushed(
    step: StepView, backward: list[Call], least: int
) -> tuple[float, tuple[Call, Tensor] | None]:
    """Measure what share of a float32 gradient a cast turns into zeros, the largest."""
    most: tuple[float, tuple[Call, Tensor] | None] = (0.0, None)
    for call in backward:
        if call.op not in _CASTS or not call.inputs or not call.outputs:
            continue
        wide, half = (step.tensors.get(names[0][1]) for names in (call.inputs, call.outputs))
        if wide is None or half is None or wide.numel != half.numel or wide.numel < least:
            continue
        if wide.dtype == "float32" and half.dtype == "float16":
            part = (half.zeros - wide.zeros) / wide.numel
            most = max(most, (part, (call, half)), key=lambda found: found[0])
    return most
