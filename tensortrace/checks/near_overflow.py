"""TT501: values close to the largest that their dtype can hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.magnitudes import LARGEST, counts_of, share_from
from tensortrace.records import Call, Location, Step, Tensor
from tensortrace.text import module_text, number_text, short_dtype

# Masks are made of the smallest number of the dtype, to which scores may have been added.
_MASK = 0.95
# A range of exponents: so far below the largest number a crowd begins.
_FACTOR = 16
# What was below this share of the limit in a full step is far from it until the next one.
_NEAR = 1 / 64
# They return what was in memory before.
_UNINITIALISED = frozenset(("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty",
                            "new_empty_strided", "resize_", "resize_as_"))  # fmt: skip
# These compute no value: what they return was made before, or is such memory (sharded parameters).
_SILENT = _UNINITIALISED | frozenset((
    "view", "view_as", "reshape", "chunk", "split", "narrow", "unbind", "select", "getitem",
    "as_strided", "expand", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute",
    "contiguous", "clone", "detach", "to", "T", "t", "movedim", "tensor_split",
))  # fmt: skip


@check("TT501", "near-overflow")
def near_overflow(
    step: StepView,
    memory: dict[str, Any],
    *,
    share: float = 0.5,
    crowd: float = 0.25,
    sustain: int = 2,
    window: int = 4,
) -> Iterator[Draft]:
    """Values come close to the largest that their dtype can hold.

    Symptom:    all is well until one batch is a little larger: then inf, and NaN after it; it
                happens in float16 and not in float32
    Threshold:  the largest element of what a module or an op returns, or of a gradient that no
                GradScaler has scaled, is > share * the largest number of its dtype (65504 in
                float16), or by its exponents > crowd of its elements that are not 0 are above
                4096 in float16, a factor of 16 below; in `sustain` of the last `window` full steps,
                while nothing has overflowed yet. Between full steps: the rms of what a module
                returns, times what its largest element was of its rms in the last full step, is
                > share * that number in `sustain` of the last `window` steps in which it is known
    Source:     torch.finfo; TorchLens (dtype_range) speaks up at 0.9; half of the range leaves one
                doubling (measured on tests/healthy: at most 42 in float16). `crowd` chosen here: of
                normal values the largest of a million is then above a quarter of the range
    Fix:        bfloat16 instead of float16; a norm layer before it; q / sqrt(d) before q @ k; sums
                and squares in float32 (x.float().pow(2).mean()); a lower learning rate
    Misses:     negative values within 5 % of the lowest number, and those far from all others by
                their exponents, which are masks; the largest number itself; ops without grad; what
                happens inside an op (a sum of squares that is rooted again); gradients under a
                GradScaler, whose scale rises until they overflow; float8, which is scaled to its
                range; between full steps, what grows 64 times and more
    Example:    scores = q @ k.transpose(-1, -2)                     # float16, unscaled
                weights = scores.softmax(-1)
    Fixed:      scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
                weights = scores.softmax(-1)
    """
    if step.summary is None:
        return
    if not (step.summary.full or memory.get("near")):
        return
    if any(f.code.startswith("TT1") and f.severity == "error" for f in step.findings):
        return  # it has overflowed by now, and that is told
    if not step.summary.full:
        yield from _between(step.summary, memory, share, sustain, window)
        return
    seen: dict[str, list[int]] = memory.setdefault("seen", {})
    order: int = memory.get("order", 0) + 1
    memory["order"] = order
    near = _coming_near(step, share)
    memory["near"] = _per_rms(step, step.summary, near, share)
    met: set[str] = set()
    for call, name, tensor in _made(step, near) if near else ():
        key = f"{call.module}:{call.op}:{call.phase}"
        verdict = _judge(tensor, share, crowd) if key not in met else None
        if verdict is None:
            continue
        met.add(key)
        seen[key] = [at for at in seen.get(key, []) if at > order - window] + [order]
        if len(seen[key]) >= sustain:
            value, limit, text = verdict
            where = "the gradient of " if call.phase == "backward" else ""
            yield Draft(
                message=f"{where}{call.op or module_text(call.module)} {name} {text}, in "
                f"{len(seen[key])} of {window} full steps",
                cause=tensor.dtype, phase=call.phase, module=call.module, op=call.op,
                seq=call.seq, tensor=tensor.id, value=value, limit=limit, location=call.location,
                evidence={"placed": "direct", "min": tensor.min, "max": tensor.max},
            )  # fmt: skip
            return


def _made(step: StepView, near: dict[int, Tensor]) -> Iterator[tuple[Call, str, Tensor]]:
    """List what was computed of some tensors: call, name of the output, the finite tensor."""
    scaled = step.scaled()
    for call in sorted(step.calls, key=lambda c: c.seq):
        if call.replay or call.op in _SILENT or (scaled and call.phase == "backward"):
            continue
        for name, id in call.outputs:
            tensor = near.get(id)
            if tensor is None or tensor.nonfinite:
                continue
            if call.op is not None and call.phase == "forward" and not tensor.requires_grad:
                continue  # a buffer that is still to be filled
            yield call, name, tensor


def _judge(tensor: Tensor, share: float, crowd: float) -> tuple[float, float, str] | None:
    """Say what is out, with its limit; None if nothing is."""
    reach, crowded = _reach(tensor), _crowded(tensor)
    dtype = short_dtype(tensor.dtype)
    if reach > share:
        top = number_text(max(abs(tensor.min or 0.0), abs(tensor.max or 0.0)))
        text = f"reaches {top} in {dtype}: {reach:.0%} of its largest number (limit {share:.0%})"
        return reach, share, text
    if crowded > crowd:
        text = f"has {crowded:.0%} of its elements within a factor of 16 of the largest number of "
        return crowded, crowd, f"{text}{dtype} (limit {crowd:.0%})"
    return None


def _coming_near(step: StepView, share: float) -> dict[int, Tensor]:
    """Pick the few tensors, masks too, of which anything below can be out. Hot."""
    least = {dtype: min(share * _NEAR, 1 / _FACTOR) * top for dtype, top in LARGEST.items()}
    return {
        id: tensor
        for id, tensor in step.tensors.items()
        if (limit := least.get(tensor.dtype)) is not None
        and ((tensor.max or 0.0) > limit or (tensor.min or 0.0) < -limit)
    }


def _reach(tensor: Tensor) -> float:
    """How much of the range of its dtype a tensor takes, masks aside."""
    largest = LARGEST.get(tensor.dtype)
    if largest is None or tensor.max is None or tensor.min is None:
        return 0.0
    above = tensor.max / largest
    below = 0.0 if _is_masked(tensor, largest) else -tensor.min / largest
    # torch.finfo(...).max itself is what a search for a minimum begins with.
    return max(above if above < 1 else 0.0, below)


def _crowded(tensor: Tensor) -> float:
    """What share of it is certainly within a factor of 16 of the largest number of its dtype."""
    largest, counts = LARGEST.get(tensor.dtype), counts_of(tensor)
    if largest is None or counts is None or _is_masked(tensor, largest):
        return 0.0
    return share_from(counts, largest / _FACTOR)[0]


def _is_masked(tensor: Tensor, largest: float) -> bool:
    """Whether its lowest values were filled in: the lowest number, or one far below all others."""
    if tensor.min is not None and -tensor.min >= _MASK * largest:
        return True
    counts = counts_of(tensor)
    if counts is None or tensor.max is None or tensor.max >= largest / _FACTOR:
        return False
    top = share_from(counts, largest / _FACTOR)[0]
    return 0 < top == share_from(counts, largest / _FACTOR**2)[0]


def _per_rms(
    step: StepView, summary: Step, near: dict[int, Tensor], share: float
) -> dict[str, tuple[float, str, Location | None]]:
    """How large, by its rms, the largest element is that a module returns, for `_between`.

    Returns:
        By path: share of the range per rms, dtype, line. Only of what is not far from the end.
    """
    found: dict[str, tuple[float, str, Location | None]] = {}
    columns = summary.modules
    rms = dict(zip(columns.path, columns.output_rms, strict=False)) if near else {}
    for call in step.calls if near else ():
        path = call.module
        if call.op is not None or path is None or call.phase != "forward" or not rms.get(path):
            continue
        for _, id in call.outputs:
            reach = _reach(near[id]) if id in near else 0.0
            if reach > share * _NEAR:
                found[path] = reach / (rms[path] or 1.0), near[id].dtype, call.location
    return found


def _between(
    summary: Step, memory: dict[str, Any], share: float, sustain: int, window: int
) -> Iterator[Draft]:
    """Follow between full steps what was near in the last one."""
    near: dict[str, tuple[float, str, Location | None]] = memory.get("near", {})
    high: dict[str, deque[bool]] = memory.setdefault("high", {})
    columns = summary.modules
    for path, rms in zip(columns.path, columns.output_rms, strict=False) if near else ():
        if rms is None or path not in near:
            continue
        per_rms, dtype, location = near[path]
        recent = high.setdefault(path, deque(maxlen=window))
        recent.append(rms * per_rms > share)
        if recent[-1] and sum(recent) >= sustain:
            times = per_rms * LARGEST[dtype]
            yield Draft(
                message=f"what {module_text(path)} returns has rms {number_text(rms)} in "
                f"{short_dtype(dtype)}, and its largest element was {number_text(times)} times that"
                f" in the last full step: some {rms * per_rms:.0%} of the largest number (limit "
                f"{share:.0%}), in {sum(recent)} of {window} steps",
                cause=dtype, phase="forward", module=path, value=rms * per_rms, limit=share,
                location=location, evidence={"placed": "module", "rms": rms},
            )  # fmt: skip
            return
