"""Steps as columns of a screen: how many steps a column stands for, zoom, and the order of reading.

A column holds 1, 2, 5, 10, ... steps and begins at a multiple of that, so that it stays what it is
while the run grows. Reading goes from coarse to fine: one step of every column, then three more,
then all, from the cursor outwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from tensortrace.records import Step
from tensortrace.run import Run

# Cells of a step in a short run, at most.
WIDEST = 4
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Span:
    """`columns` columns of `per` steps from step `start` on (a multiple of `per`)."""

    start: int
    per: int
    columns: int

    @property
    def stop(self) -> int:
        """The step after the last column."""
        return self.start + self.per * self.columns

    def column(self, step: int) -> int:
        """The column of a step; outside ``0 .. columns - 1`` if the span does not show it."""
        return (step - self.start) // self.per

    def steps(self, column: int) -> range:
        """The steps of a column."""
        low = self.start + column * self.per
        return range(low, low + self.per)


def sizes() -> Iterator[int]:
    """How many steps a column may hold: 1, 2, 5, 10, 20, 50, ..."""
    for power in count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)


def span_of(first: int, last: int, width: int, per: int, around: int) -> Span:
    """Lay `width` columns of `per` steps over the run, `around` near the middle.

    Columns after the last step stay empty: there the run may grow.
    """
    low, columns = first // per, max(1, width)
    start = max(low, min(around // per - columns // 2, last // per - columns + 1))
    return Span(start * per, per, columns)


def used(span: Span, last: int) -> int:
    """How many columns have steps."""
    return max(1, min(span.columns, span.column(last) + 1))


def fitting(first: int, last: int, width: int) -> int:
    """The smallest size of a column with which the whole run fits."""
    return next(per for per in sizes() if last // per - first // per + 1 <= max(1, width))


def zoomed(per: int, closer: bool) -> int:
    """The next smaller or larger size of a column."""
    smaller = 1
    for size in sizes():
        if size == per and closer:
            return smaller
        if size > per:
            return size
        smaller = size
    raise AssertionError  # sizes never end


def shifted(span: Span, first: int, last: int, step: int, width: int) -> Span:
    """The same span if it shows a step and has this width, else another around the step."""
    inside = 0 <= span.column(step) < span.columns
    fresh = span_of(first, last, width, span.per, step)
    whole = fresh.start <= first and last < fresh.stop
    return span if inside and span.columns == fresh.columns and not whole else fresh


def reading_order(span: Span, first: int, last: int, around: int) -> Iterator[range]:
    """Blocks of steps to read: first what gives every column something, then all the rest."""
    columns = sorted(range(span.columns), key=lambda at: abs(at - span.column(around)))
    inside = range(max(first, span.start), min(last + 1, span.stop))
    if span.per > 1:
        for share in (span.per // 2, 0, span.per // 4, 3 * span.per // 4):
            for at in columns:
                step = span.steps(at)[share]
                if step in inside:
                    yield range(step, step + 1)
    for at in columns:
        steps = span.steps(at)
        for low in range(steps.start, steps.stop, AT_ONCE):
            block = range(max(low, inside.start), min(low + AT_ONCE, steps.stop, inside.stop))
            if block:
                yield block


def read_blocks(
    run: Run,
    blocks: Iterator[range],
    take: Callable[[list[Step]], object],
    cancelled: Callable[[], bool],
    *,
    modules: bool = True,
) -> None:
    """Hand over the step lines of blocks of steps, one block after the other; for a thread."""
    read = run.summaries if modules else run.heads
    for block in blocks:
        if cancelled():
            return
        take(read(block.start, block.stop))
