"""Ratios that mean something on a machine that others use too.

One pair times two ways of running the same workload right after each other, in CPU time of this
process; pairs alternate (A B, B A, ...) and so do the two copies of the model, so that neither
drift nor where a model lies in memory favours a way. What is stated is the median of the pairs'
ratios with its quartiles, beside the same for "nothing against nothing" (A/A): a difference below
that is no result.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tests.benchmarks.workloads import Workload

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder

_LEFT_OUT = 3
# glibc gives freed gradients back to the system and takes them anew each step, at random cost:
# A/A of mlp was 0.98 to 1.29 without these and 0.98 to 1.02 with them. They hold for a process
# from its start, so the benchmark starts itself again.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(slots=True)
class Turn:
    """One block of steps as a way prepares it: what to run, and what it logged when asked."""

    run: Callable[[], object]
    nbytes: Callable[[], int] = lambda: 0


# Opens a way of running a workload; the block closes it.
Way = Callable[[Workload], AbstractContextManager[Turn]]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one way costs on one workload: ratios of CPU time to untraced, and bytes a step."""

    workload: str
    way: str
    ratios: list[float] = field(repr=False)
    base_ms: float
    bytes_per_step: float

    @property
    def median(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of the ratios."""
        if len(self.ratios) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    def as_json(self) -> dict[str, Any]:
        """The cell with what is computed from it."""
        return {**asdict(self), "median": self.median, "quartiles": self.quartiles}


@contextmanager
def untraced(work: Workload) -> Iterator[Turn]:
    """Run the steps as they are."""
    yield Turn(work.step)


def tracing(after: int = 0, **options: Any) -> Way:
    """Run the steps inside ``with trace(...)`` with a log on disk.

    Args:
        after: the number of the first step: what a run of that length would do from there on.
    """

    @contextmanager
    def way(work: Workload) -> Iterator[Turn]:
        from tensortrace import trace

        with (
            tempfile.TemporaryDirectory() as folder,
            hush(),
            trace(Path(folder) / "log.jsonl", **options) as t,
        ):
            recorder = t._recorder
            assert recorder is not None
            if after:
                _skip_to(recorder, after)
            yield Turn(work.step, lambda: recorder.journal.sink.nbytes)
            if not t.ok or not all(recorder.on.values()):
                raise RuntimeError(f"tracing did not go well: {t.findings}, {recorder.on}")

    return way


def without_kernel(way: Way) -> Way:
    """Measure with torch's and NumPy's reductions, as where no C compiler was."""
    return _with(way, "tensortrace.capture.compiled.kernel", None)


def without_exponents(way: Way) -> Way:
    """Measure as if no tensor had enough elements to count their exponents."""
    added = _with(way, "tensortrace.capture.stats.queue.LEAST", sys.maxsize)
    return _with(added, "tensortrace.capture.stats.queue._CLOSELY", 0)


def _with(way: Way, name: str, value: object) -> Way:
    @contextmanager
    def changed(work: Workload) -> Iterator[Turn]:
        import tensortrace.capture.tracer  # noqa: F401 what is loaded later must not see the change

        with patch(name, value), way(work) as turn:
            yield turn

    return changed


def _skip_to(recorder: Recorder, step: int) -> None:
    """Make the run look as if it had come to this step."""
    recorder.step = step
    recorder.journal.begin_step(step)
    recorder._begin_step()


def compare(build: Callable[[], Workload], way_name: str, way: Way, pairs: int) -> Cell:
    """Time `way` against untraced, in pairs, on two equal copies of a workload."""
    copies = [build(), build()]
    ratios, bases = [], []
    nbytes = 0.0
    for i in range(pairs):
        base, other = copies if i % 4 < 2 else copies[::-1]
        if i % 2 == 0:
            before, _ = _timed(untraced, base)
            after, nbytes = _timed(way, other)
        else:
            after, nbytes = _timed(way, other)
            before, _ = _timed(untraced, base)
        ratios.append(after / before)
        bases.append(before)
    return Cell(copies[0].name, way_name, ratios, statistics.median(bases) * 1e3, nbytes)


def _timed(way: Way, work: Workload) -> tuple[float, float]:
    """Seconds and logged bytes of one step.

    The first three of the block are left out: in the second a traced run writes, once, the modules
    and source lines that it met in the first, and what a call moves is learnt from three of them.
    """
    steps = work.steps
    with way(work) as turn:
        for _ in range(_LEFT_OUT):
            turn.run()
        written = turn.nbytes()
        start = time.process_time()
        for _ in range(steps):
            turn.run()
        elapsed = time.process_time() - start
        written = turn.nbytes() - written
    return elapsed / steps, written / steps


@contextmanager
def hush() -> Iterator[None]:
    """Keep the one line that a run ends with off the screen."""
    with Path(os.devnull).open("w") as nowhere:
        stderr, sys.stderr = sys.stderr, nowhere
        try:
            yield
        finally:
            sys.stderr = stderr
