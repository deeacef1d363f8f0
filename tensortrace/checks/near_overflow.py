"""TT501: values close to the largest that their dtype can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Tensor
from tensortrace.text import module_text, number_text, short_dtype

# The largest finite number, as torch.finfo has it.
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
# Masks are made of the smallest number of the dtype, to which scores may have been added.
_MASK = 0.95
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
    step: StepView, memory: dict[str, Any], *, share: float = 0.5, sustain: int = 2, window: int = 4
) -> Iterator[Draft]:
    """Values come close to the largest that their dtype can hold.

    Symptom:    all is well until one batch is a little larger: then inf, and NaN after it; it
                happens in float16 and not in float32
    Threshold:  the largest element of what a module or an op returns, or of a gradient that no
                GradScaler has scaled, is > share * the largest number of its dtype (65504 in
                float16), in `sustain` of the last `window` full steps, while nothing
                has overflowed yet
    Source:     torch.finfo; TorchLens (dtype_range) speaks up at 0.9; half of the range leaves one
                doubling (measured on tests/healthy: at most 42 in float16)
    Fix:        bfloat16 instead of float16; a norm layer before it; q / sqrt(d) before q @ k; sums
                and squares in float32 (x.float().pow(2).mean()); a lower learning rate
    Misses:     negative values within 5 % of the lowest number, which are masks; the largest number
                itself; ops without grad; what happens inside an op (a sum of squares that is rooted
                again); gradients under a GradScaler, whose scale rises until they overflow; float8,
                which is scaled to its range
    Example:    scores = q @ k.transpose(-1, -2)                     # float16, unscaled
                weights = scores.softmax(-1)
    Fixed:      scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
                weights = scores.softmax(-1)
    """
    if step.summary is None or not step.summary.full:
        return
    if any(f.code.startswith("TT1") and f.severity == "error" for f in step.findings):
        return  # it has overflowed by now, and that is told
    scaled = step.scaled()
    seen: dict[str, list[int]] = memory.setdefault("seen", {})
    order: int = memory.get("order", 0) + 1
    memory["order"] = order
    met: set[str] = set()
    for call in sorted(step.calls, key=lambda c: c.seq):
        if call.replay or call.op in _SILENT or (scaled and call.phase == "backward"):
            continue
        for name, id in call.outputs:
            tensor = step.tensors.get(id)
            reach = _reach(tensor) if tensor is not None else 0.0
            key = f"{call.module}:{call.op}:{call.phase}"
            if tensor is None or reach <= share or key in met or tensor.nonfinite:
                continue
            if call.op is not None and call.phase == "forward" and not tensor.requires_grad:
                continue  # a buffer that is still to be filled
            met.add(key)
            seen[key] = [at for at in seen.get(key, []) if at > order - window] + [order]
            if len(seen[key]) >= sustain:
                top = max(abs(tensor.min or 0.0), abs(tensor.max or 0.0))
                where = "the gradient of " if call.phase == "backward" else ""
                yield Draft(
                    message=f"{where}{call.op or module_text(call.module)} {name} reaches "
                    f"{number_text(top)} in {short_dtype(tensor.dtype)}: {reach:.0%} of its "
                    f"largest number (limit {share:.0%}), in {len(seen[key])} of {window} full "
                    "steps",
                    cause=tensor.dtype, phase=call.phase, module=call.module, op=call.op,
                    seq=call.seq, tensor=id, value=reach, limit=share, location=call.location,
                    evidence={"placed": "direct", "min": tensor.min, "max": tensor.max},
                )  # fmt: skip
                return


def _reach(tensor: Tensor) -> float:
    """How much of the range of its dtype a tensor takes, masks aside."""
    largest = _LARGEST.get(tensor.dtype)
    if largest is None or tensor.max is None or tensor.min is None:
        return 0.0
    above, below = tensor.max / largest, -tensor.min / largest
    # torch.finfo(...).max itself is what a search for a minimum begins with.
    return max(above if above < 1 else 0.0, below if below < _MASK else 0.0)
