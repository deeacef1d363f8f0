"""What else tracing costs: memory, by running alone in a fresh process; and each check its time."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import hush, tracing, untraced
from tests.benchmarks.workloads import build

if TYPE_CHECKING:
    from tensortrace.checks import Check

_MEMORY_STEPS = 12


def peak_mib(name: str, traced: bool) -> float:
    """The largest resident memory, in MiB, of a process that trains a workload for some steps."""
    way = "traced" if traced else "untraced"
    command = [sys.executable, "-m", "tests.benchmarks.costs", name, way]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout))


def _train_and_tell(name: str, way: str) -> None:
    import torch

    torch.set_num_threads(1)
    with (tracing(every=1) if way == "traced" else untraced)(build(name)) as turn:
        for _ in range(_MEMORY_STEPS):
            turn.run()
    # Not getrusage: its peak begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    print(json.dumps(int(peak.split()[1]) / 1024))


def check_ms(name: str, steps: int = 6) -> dict[str, float]:
    """Milliseconds a step that each check takes, live; "engine" is what feeding them adds."""
    from tensortrace import trace
    from tensortrace.checks import all_checks
    from tensortrace.engine import Engine
    from tensortrace.records import Record, Step

    records: list[Record] = []
    work = build(name)
    with hush(), trace(out=records.append, every=1):
        for _ in range(steps):
            work.step()
    spent: dict[str, float] = defaultdict(float)
    engine = Engine([_timed(one, spent) for one in all_checks()])
    by_step: list[dict[str, float]] = []
    start = time.perf_counter()
    for record in records:
        engine.feed(record)
        if isinstance(record, Step):
            rules = sum(spent.values())
            by_step.append({**spent, "engine": time.perf_counter() - start - rules})
            spent.clear()
            start = time.perf_counter()
    # The first step meets everything for the first time.
    codes = sorted({code for row in by_step for code in row}, key=lambda c: (c == "engine", c))
    return {c: 1e3 * statistics.median(row.get(c, 0.0) for row in by_step[1:]) for c in codes}


def _timed(one: Check, spent: dict[str, float]) -> Check:
    rule = one.rule

    @functools.wraps(rule)
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
        start = time.perf_counter()
        drafts = list(rule(*args, **kwargs))
        spent[one.code] += time.perf_counter() - start
        return iter(drafts)

    return replace(one, rule=wrapper)


if __name__ == "__main__":
    _train_and_tell(*sys.argv[1:])
