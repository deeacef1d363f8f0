"""What `exponents` of a tensor say: its elements by magnitude, in ranges of a factor of 16.

A log may hold anything: what is no such counts is taken for none.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from tensortrace.records import BUCKETS, LOWEST, WIDTH, Tensor

__all__ = ["LARGEST", "counts_of", "lower_end", "share_from"]

# The largest finite number of the floats that training may reach the end of, as torch.finfo has it.
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}


def counts_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Elements of a sample in each of 16 ranges; None if they were not counted, or all are 0."""
    counts = tensor.exponents
    if counts is None or len(counts) != BUCKETS or min(counts) < 0 or not any(counts):
        return None
    return counts


def lower_end(index: int) -> float:
    """Where a range begins: 0, 2 ** -32, 2 ** -28, ... 2 ** 24; past the last, infinity."""
    if index >= BUCKETS:
        return float("inf")
    return 2.0 ** (LOWEST + WIDTH * (index - 1)) if index > 0 else 0.0


_ENDS = tuple(map(lower_end, range(BUCKETS)))


def share_from(counts: Sequence[int], limit: float) -> tuple[float, float]:
    """Tell what share of the elements counted has a magnitude of `limit` and more.

    Zeros and what is not finite are not counted.

    Args:
        counts: as `counts_of` gives them.
    Returns:
        At least, and at most: they differ by what is in the range that `limit` lies in.
    """
    total = sum(counts)
    least = sum(counts[bisect_left(_ENDS, limit) :])
    most = sum(counts[max(0, bisect_right(_ENDS, limit) - 1) :])
    return least / total, most / total
