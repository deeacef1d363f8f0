"""Triton kernels: one launch reduces a tensor on a GPU, one more a gate puts the parts together.

A hot path. Imported when the first CUDA tensor is measured, and never without Triton. Sums are
doubles and counts are exact, as in the compiled kernel of the CPU; nothing here waits for the
device, and nothing depends on the order in which programs run.

No ``from __future__ import annotations``: Triton reads what is written beside a parameter.
"""

import triton
import triton.language as tl

__all__ = ["combine", "largest", "reduce"]

# A row of numbers: nan, posinf, neginf, zeros, min, max, then of d = x / scale - shift over the
# finite elements the sums of d and d * d, the sum of (x / scale) ** 2, the first element that is
# not finite, shift, scale. The same shift and scale for all parts of a tensor, so that sums add up.
ROW: tl.constexpr = tl.constexpr(16)
FIRST: tl.constexpr = tl.constexpr(9)
LARGEST: tl.constexpr = tl.constexpr(12)
# At most so many programs share a tensor.
PARTS: tl.constexpr = tl.constexpr(512)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
# Further than any element: exact in a double.
NOWHERE: tl.constexpr = tl.constexpr(1 << 52)
# As in exponents.py: which elements are sampled, and how ranges of their exponents are numbered.
RUN: tl.constexpr = tl.constexpr(16)
LOWEST: tl.constexpr = tl.constexpr(-32)
WIDTH_LOG2: tl.constexpr = tl.constexpr(2)


@triton.jit
def _as_float(x, WIDE: tl.constexpr):
    """Any element as a float that holds it: f64 of f64 and of whole numbers of 32 bits or more."""
    # Not by x.dtype: Triton 3.2, which torch 2.6 has, cannot compare with that.
    return x.to(tl.float64 if WIDE else tl.float32)


@triton.jit(do_not_specialize=["n", "tiles", "first"])
def largest(source, rows, n, tiles, first, BLOCK: tl.constexpr):
    """Write the largest modulus of each part: what doubles are scaled by, so that squares hold."""
    part = tl.program_id(0)
    begin = part.to(tl.int64) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, n)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    found = tl.zeros([BLOCK], tl.float64)
    for at in range(begin, end, BLOCK):
        where = at + lane
        if at + BLOCK <= end:
            taken = tl.load(source + where)
        else:
            taken = tl.load(source + where, mask=where < end, other=0)
        x = tl.abs(taken.to(tl.float64))
        found = tl.where(x < INFINITY, tl.maximum(found, x), found)
    tl.store(rows + (first + part).to(tl.int64) * ROW + LARGEST, tl.max(found, 0))


@triton.jit
def _reduce(
    source, rows, n, tiles, first, parts,
    WIDE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    begin = part.to(tl.int64) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, n)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    first_of_all = _as_float(tl.load(source), WIDE)
    start = first_of_all.to(tl.float64)
    if SCALED:
        each = tl.arange(0, PARTS)
        at_each = rows + (first + each).to(tl.int64) * ROW + LARGEST
        scale = tl.max(tl.load(at_each, mask=each < parts, other=0.0), 0)
        scale = tl.where(scale > 0, scale, 1.0)
        start = start / scale
    else:
        scale = tl.full([], 1.0, tl.float64)
    shift = tl.where(tl.abs(start) < INFINITY, start, 0.0)
    nan = tl.zeros([BLOCK], tl.int32)
    posinf = tl.zeros([BLOCK], tl.int32)
    neginf = tl.zeros([BLOCK], tl.int32)
    zeros = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], INFINITY, first_of_all.dtype)
    high = tl.full([BLOCK], -INFINITY, first_of_all.dtype)
    sums = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    whole = tl.zeros([BLOCK], tl.float64)
    bad = tl.full([BLOCK], NOWHERE, tl.int64)
    for at in range(begin, end, BLOCK):
        where = at + lane
        inside = where < end
        # Without a mask four elements of a thread come in one load.
        if at + BLOCK <= end:
            taken = tl.load(source + where)
        else:
            taken = tl.load(source + where, mask=inside, other=0)
        x = _as_float(taken, WIDE)
        finite = inside & (tl.abs(x) < INFINITY)
        nan += (inside & (x != x)).to(tl.int32)
        posinf += (inside & (x == INFINITY)).to(tl.int32)
        neginf += (inside & (x == -INFINITY)).to(tl.int32)
        zeros += (inside & (x == 0)).to(tl.int32)
        bad = tl.minimum(bad, tl.where(inside & (finite == 0), where, NOWHERE))
        low = tl.minimum(low, tl.where(finite, x, INFINITY))
        high = tl.maximum(high, tl.where(finite, x, -INFINITY))
        y = x.to(tl.float64)
        if SCALED:
            y = y / scale
        d = tl.where(finite, y - shift, 0.0)
        y = tl.where(finite, y, 0.0)
        sums += d
        squares += d * d
        whole += y * y
    row = rows + (first + part).to(tl.int64) * ROW
    tl.store(row, tl.sum(nan, 0).to(tl.float64))
    tl.store(row + 1, tl.sum(posinf, 0).to(tl.float64))
    tl.store(row + 2, tl.sum(neginf, 0).to(tl.float64))
    tl.store(row + 3, tl.sum(zeros, 0).to(tl.float64))
    tl.store(row + 4, tl.min(low, 0).to(tl.float64))
    tl.store(row + 5, tl.max(high, 0).to(tl.float64))
    tl.store(row + 6, tl.sum(sums, 0))
    tl.store(row + 7, tl.sum(squares, 0))
    tl.store(row + 8, tl.sum(whole, 0))
    tl.store(row + FIRST, tl.min(bad, 0).to(tl.float64))
    tl.store(row + 10, shift)
    tl.store(row + 11, scale)


@triton.jit
def _count(source, row, pitch, sampled, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Write how many elements of a sample lie in each range of exponents."""
    lane = tl.arange(0, BLOCK)
    each = tl.arange(0, ROW)
    counts = tl.zeros([ROW], tl.int32)
    for at in range(0, sampled, BLOCK):
        k = at + lane
        inside = k < sampled
        where = (k // RUN).to(tl.int64) * pitch + k % RUN
        x = tl.abs(_as_float(tl.load(source + where, mask=inside, other=0), WIDE))
        inside = inside & (x > 0) & (x < INFINITY)
        if WIDE:
            exponent = ((x.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)
        else:
            exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
        bucket = ((exponent - LOWEST) >> WIDTH_LOG2) + 1
        bucket = tl.minimum(tl.maximum(bucket, 0), ROW - 1)
        bucket = tl.where(inside, bucket, -1)
        counts += tl.sum((bucket[:, None] == each[None, :]).to(tl.int32), 0)
    tl.store(row + each, counts.to(tl.float64))


@triton.jit(do_not_specialize=["n", "tiles", "first", "parts", "pitch", "sampled"])
def reduce(
    source, rows, n, tiles, first, parts, pitch, sampled,
    WIDE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduce a tensor that fills its memory: program i its i-th share, into row `first` + i.

    A program more than `parts` counts exponents, into the row after.
    """
    if tl.program_id(0) < parts:
        _reduce(source, rows, n, tiles, first, parts, WIDE, SCALED, BLOCK)
    else:
        row = rows + (first + parts).to(tl.int64) * ROW
        _count(source, row, pitch, sampled, WIDE, BLOCK)


@triton.jit(do_not_specialize=["since"])
def combine(rows, table, out, since, BLOCK: tl.constexpr):
    """Put rows together: program i those that pair `since` + i of the table names.

    A pair says the first row and how many. One row alone comes out as it is, whatever it holds.
    """
    entry = since + tl.program_id(0)
    first = tl.load(table + 2 * entry)
    count = tl.load(table + 2 * entry + 1)
    column = tl.arange(0, ROW)
    line = tl.arange(0, BLOCK)
    total = tl.zeros([ROW], tl.float64)
    low = tl.full([ROW], INFINITY, tl.float64)
    high = tl.full([ROW], -INFINITY, tl.float64)
    for at in range(0, count, BLOCK):
        part = at + line
        inside = (part < count)[:, None]
        place = (first + part).to(tl.int64)[:, None] * ROW + column[None, :]
        found = tl.load(rows + place, mask=inside, other=0.0)
        total += tl.sum(found, 0)
        low = tl.minimum(low, tl.min(tl.where(inside, found, INFINITY), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, found, -INFINITY), 0))
    # The smallest and the largest of one NaN would be none.
    several = count > 1
    lowest = ((column == 4) | (column >= FIRST)) & several
    found = tl.where(lowest, low, tl.where((column == 5) & several, high, total))
    tl.store(out + entry * ROW + column, found)
