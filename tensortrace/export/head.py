"""The head of a report: what ran, how far it came, how it ended, what the log has lost."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from tensortrace.export.contents import Contents, Found, step_lines
from tensortrace.export.finding_words import place_text
from tensortrace.records import SEVERITIES

if TYPE_CHECKING:
    from tensortrace.run import Run


def head_lines(run: Run, found: Found, *, first: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (label, text) about a log, in the log's own characters, not yet escaped.

    Args:
        run: the log.
        found: its findings, for what the checks have to say about themselves.
        first: False for a further rank of a run, which needs only what may differ.
    """
    header = run.header
    rank = f"rank {header.rank} of {header.world_size}"
    yield "log", str(run.path) + (f" ({rank})" if header.world_size > 1 else "")
    if first:
        when = datetime.fromtimestamp(header.time_ns / 1e9, tz=timezone.utc)
        yield "run", " ".join(header.argv) or "(interactive)"
        yield (
            "with",
            (
                f"torch {header.torch}, python {header.python}, tensortrace {header.tensortrace}, "
                f"{when:%Y-%m-%d %H:%M} UTC"
            ),
        )
    yield "steps", steps_text(run)
    yield "ended", ended_text(run)
    if missing := missing_text(run):
        yield "missing", missing
    if found.again:
        yield "checks", f"run again over this log; {kept_text(run)}"
    for problem in found.problems:
        yield "problem", problem


def steps_text(run: Run) -> str:
    """Say which steps the log holds and how often the optimizer stepped."""
    if not run.steps:
        return "none"
    records = run.step(run.last_step())
    updates = (
        run.end.updates if run.end is not None
        else records.summary.update if records.summary is not None
        else max((call.update for call in records.calls), default=0)
    )  # fmt: skip
    return f"{run.first_step()} to {run.last_step()}, {updates} update{'' if updates == 1 else 's'}"


def ended_text(run: Run) -> str:
    """Say how the run ended, in one sentence."""
    end = run.end
    if end is None:
        state = (
            "killed" if run.killed else "still running" if run.live else "still running or killed"
        )
        cut = f", {run.lost_bytes} bytes cut" if run.lost_bytes else ""
        return f"no end line: {state}{cut}"
    after = f"after {end.elapsed_ns / 1e9:.1f} s"
    if end.why == "interrupt":
        return f"interrupted {after}"
    failure = end.failure
    if end.why == "exit" or failure is None:
        return f"{end.why} {after}"
    inside = f" in module {failure.module}" if failure.module else ""
    at = f" at {place_text(run, failure.location)}" if failure.location else ""
    message = f": {failure.message}" if failure.message else ""
    return f"exception {after}: {failure.type}{inside}{at}{message}"


def counts_text(contents: Contents) -> str:
    """Count the findings: ``1 error, 2 notes``; empty if there are none."""
    counts = contents.counts
    return ", ".join(
        f"{counts[s]} {s}{'' if counts[s] == 1 else 's'}" for s in SEVERITIES if counts[s]
    )


def missing_text(run: Run) -> str:
    """Say what is not in the log although it happened; empty if nothing."""
    parts = []
    if run.end is not None and run.end.thinned:
        parts.append(f"{run.end.thinned} records thinned")
    if run.end is not None and run.end.dropped:
        parts.append(f"{run.end.dropped} records dropped")
    if run.end is not None and run.lost_from is not None:
        parts.append(f"the step lines of steps {run.lost_from} to {run.end.steps - 1} (max_bytes)")
    if run.notice:
        parts.append(run.notice)
    if run.unreadable:
        parts.append(f"{run.unreadable} unreadable lines")
    if run.skipped:
        names = ", ".join(sorted(run.skipped)[:5])
        parts.append(f"{sum(run.skipped.values())} of a newer version skipped ({names})")
    return ", ".join(parts)


def kept_text(run: Run) -> str:
    """Say how many steps are whole: the others hold less for a check to look at."""
    total = whole = 0
    for line in step_lines(run):
        total += 1
        whole += line.full
    return f"{whole} of {total} steps are whole"
