"""How large the elements of a tensor are: counts by range of their binary exponent."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tensortrace.capture import compiled
from tensortrace.capture.unwrap import blocks, distinct, plain, quiet

__all__ = ["BUCKETS", "LOWEST", "SAMPLE", "WIDTH", "Exponents", "count_exponents"]

# As in _statistics.c. Bucket 0 counts 0 < |x| < 2**-32, bucket k up to 14 counts
# 2**(-36 + 4 * k) <= |x| < 2**(-32 + 4 * k), bucket 15 counts 2**24 <= |x| < inf.
BUCKETS, LOWEST, WIDTH = 16, -32, 4
# How many elements, at most, are looked at without the compiled kernel.
SAMPLE = 65_536
_BLOCK = 1 << 19


class Exponents(NamedTuple):
    """`counts` by bucket, and how many elements were `read` for it.

    Of the elements read, those that are zero, NaN or infinite are in no bucket.
    """

    counts: tuple[int, ...]
    read: int


def count_exponents(tensor: torch.Tensor) -> Exponents | None:
    """Count the elements of a tensor by magnitude, in powers of 16 from 2**-32 to 2**24.

    Subnormal numbers count by what they are worth, like all others.

    Args:
        tensor: any shape, dtype, layout, device; not modified, not kept. Complex: the modulus. Of
            dims that are expanded one slice is read. On another device than the CPU this waits.
    Returns:
        All elements of dense CPU floats with the compiled kernel; else at most 65,536, evenly
        spaced in memory. None if it has no elements that can be read.
    """
    with torch._C.DisableTorchFunction():
        kernel = compiled.kernel
        if kernel is not None and (place := compiled.place(tensor)) is not None:
            return Exponents(kernel.exponents(*place), place[1])
    with quiet():
        found = plain(tensor)
        if isinstance(found, str) or not found.numel():
            return None
        return _sample(distinct(found)[0])


def _sample(tensor: torch.Tensor) -> Exponents:
    every = math.ceil(tensor.numel() / SAMPLE)
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    start = read = 0
    for block in blocks(tensor, _BLOCK):
        part = block[(-start) % every :: every]
        start += block.numel()
        read += part.numel()
        part = part[part.isfinite() & (part != 0)]
        # frexp has the fraction in [1/2, 1).
        distance = torch.frexp(part).exponent - 1 - LOWEST
        bucket = distance.div(WIDTH, rounding_mode="floor").add_(1).clamp_(0, BUCKETS - 1)
        counts += torch.bincount(bucket, minlength=BUCKETS).cpu()
    return Exponents(tuple(counts.tolist()), read)
