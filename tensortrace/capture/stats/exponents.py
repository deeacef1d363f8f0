"""How large the elements of a tensor are: counts by range of their binary exponent.

A hot path of full steps. A sample, since a count of all would cost more than all other statistics.
"""

from __future__ import annotations

import torch

from tensortrace.capture.compiled import is_packed
from tensortrace.records import BUCKETS, LOWEST, WIDTH

__all__ = ["HALF", "LEAST", "RUN", "SAMPLE", "count_exponents"]

# The floats whose range is narrow enough to ask where in it a tensor lies.
HALF = frozenset({torch.float16, torch.bfloat16})
# Elements read of a tensor, at most, and how many of them lie side by side: a line of the cache.
# Measured on one core: 3 us an f32 tensor of any size, where 16,384 in runs of 64 take 10.
SAMPLE, RUN = 4096, 16
# Of fewer elements there is no distribution.
LEAST = 64


def count_exponents(tensor: torch.Tensor) -> torch.Tensor | None:
    """Count elements of a sample by magnitude, as `exponents` of the compiled kernel does.

    Waits for no device.

    Args:
        tensor: float16 or bfloat16 of any shape and device, not empty; not modified, not kept.
    Returns:
        int64 ``(BUCKETS,)`` on the device of the tensor; None if there are gaps in its memory.
    """
    if not is_packed(tensor):
        return None
    part = _sample(tensor.detach()).float()
    # frexp has the fraction in [1/2, 1).
    distance = torch.frexp(part).exponent - 1 - LOWEST
    bucket = distance.div(WIDTH, rounding_mode="floor").add_(1).clamp_(0, BUCKETS - 1)
    bucket = torch.where(part.isfinite() & (part != 0), bucket, -1)
    each = torch.arange(BUCKETS, device=part.device)
    return (bucket.reshape(-1, 1) == each).sum(0)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLE` elements, evenly spaced in memory; as spacing_of in _statistics.c."""
    n = tensor.numel()
    flat = tensor.as_strided((n,), (1,))
    stride = -(-n // SAMPLE)
    if stride <= 1:
        return flat
    pitch = RUN * (stride | 1)
    runs = n // pitch
    if not runs:
        return flat[:SAMPLE]
    return flat[: runs * pitch].view(runs, pitch)[:, :RUN]
