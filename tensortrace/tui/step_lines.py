"""Step lines that the screen shows and a thread reads: those of the timeline, and of the trends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from textual.worker import get_current_worker

from tensortrace.records import ModuleColumns, Step
from tensortrace.run import Run
from tensortrace.tui.grid import Grid
from tensortrace.tui.span import read_blocks
from tensortrace.tui.trend import sample, trend_span

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame

# The screen is told of progress ten times a second at most.
TELL_EVERY_S = 0.1
# Until the log is indexed each step line is looked for by bisection, 2 ms.
SUMMARIES_AT_ONCE, BISECTED_AT_ONCE = 16, 2
KEPT_SUMMARIES = 4096
NO_MODULES = ModuleColumns()


def bare(step: Step) -> Step:
    """A step line without its modules, which the first line and the timeline do not show."""
    return msgspec.structs.replace(step, modules=NO_MODULES) if step.modules.path else step


class StepLines:
    """The step lines around the place, by step: `held` has those that were read so far."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.held: dict[int, Step] = {}
        # Steps that were asked for last, and those that have no step line.
        self.wanted: frozenset[int] = frozenset()
        self.absent: set[int] = set()

    def keep(self, step: Step) -> None:
        """Hold a step line that is known already."""
        self.held[step.step] = bare(step)

    def forget(self) -> None:
        """Drop what was read: the steps are those of another log now."""
        self.held.clear()
        self.absent.clear()
        self.wanted = frozenset()

    def want(self, shown: range) -> None:
        """Read those of some steps that are missing, the nearest first, in a thread."""
        stand = self.frame.stand
        last, live = stand.log.last_step(), stand.log.live
        missing = [n for n in shown if n not in self.held and (n < last or not live)]
        wanted = frozenset(missing) - self.absent
        if self.frame.begun and wanted and wanted != self.wanted:
            self.wanted = wanted
            blocks = sorted(
                {n // SUMMARIES_AT_ONCE for n in wanted},
                key=lambda block: abs(block * SUMMARIES_AT_ONCE - stand.number),
            )
            self.frame.in_thread("timeline", lambda: self.read(blocks))

    def read(self, blocks: list[int]) -> None:
        """Read step lines block by block, of the rank that is shown now; runs in a thread."""
        worker, log, told = get_current_worker(), self.frame.stand.log, 0.0
        asked: set[int] = set()
        steps: list[Step] = []
        for block in blocks:
            if worker.is_cancelled:
                return
            numbers = range(block * SUMMARIES_AT_ONCE, (block + 1) * SUMMARIES_AT_ONCE)
            if log.indexed >= 1:
                # Steps that are still open, or to come, are not there yet.
                over = log.last_step() + (not log.live)
                asked.update(range(numbers.start, min(numbers.stop, over)))
            for low in range(numbers.start, numbers.stop, BISECTED_AT_ONCE):
                steps += map(bare, log.heads(low, low + BISECTED_AT_ONCE))
                self.frame.turns.breathe()
            if time.monotonic() - told > TELL_EVERY_S:  # the nearest ones at once
                told = time.monotonic()
                self.frame.from_thread(self.take, log, asked, steps)
                asked, steps = set(), []
        self.frame.from_thread(self.take, log, asked, steps)

    def take(self, log: Run, asked: set[int], steps: list[Step]) -> None:
        """Draw step lines that came; those that the log surely lacks are not asked for again."""
        if log is not self.frame.stand.log:
            return
        self.held.update((step.step, step) for step in steps)
        self.absent |= {n for n in asked if n not in self.held}
        if len(self.held) > KEPT_SUMMARIES:
            near = sorted(self.held, key=lambda n: abs(n - self.frame.number))
            for number in near[KEPT_SUMMARIES // 2 :]:
                del self.held[number]
        self.frame.draw_top()


class Trends:
    """What a few step lines over the whole run say of every module; `grid` is None until then."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.grid: Grid | None = None
        # The run, its rank, and how much of it the grid was read for.
        self.of: tuple[str, int, int] | None = None

    def want(self) -> None:
        """Read them where they are of another run, or of much less of it."""
        log = self.frame.stand.log
        first, last = log.first_step(), log.last_step()
        run = f"{log.header.run_id} {log.header.rank}"
        of = run, first, last // max(1, trend_span(first, last).per)
        if self.frame.begun and of != self.of:
            self.of = of
            self.frame.in_thread("trends", self.read)

    def read(self) -> None:
        """Read a few step lines over the whole run; runs in a thread."""
        worker, log = get_current_worker(), self.frame.stand.log
        first, last = log.first_step(), log.last_step()
        grid = Grid(trend_span(first, last))

        def take(steps: list[Step]) -> None:
            grid.add(steps)
            self.frame.turns.breathe()

        read_blocks(log, sample(grid.span, first, last), take, lambda: worker.is_cancelled)
        if not worker.is_cancelled:
            self.frame.from_thread(self.take, grid)

    def take(self, grid: Grid) -> None:
        """Draw what came."""
        self.grid = grid
        self.frame.draw_trends()
