"""The report for machines: one strict JSON document, ASCII, so that no terminal is touched by it.

Keys:
    format, version: "tensortrace-report", 1.
    ok: no finding of severity "error" is in `findings`.
    counts: how many findings of each severity.
    header: the `header` line of the log, of the lowest rank if there are several.
    end: its `end` line, null while it runs or if it was killed.
    ranks: one object per log: rank, path, first_step and last_step (null without
        steps), end, lost_bytes, unreadable (lines).
    findings: in order of cause, notes included; every field of a `finding` line, and `later_steps`
        (how many later steps its cause was seen in), `ranks` (those it was found on).
    checked_again: the checks ran over the log now; `problems` has a line for each that failed.
    step, whole: the step that `modules` is about, and whether its calls were in the log.
    modules: one object per module, in order of first call: path, cls, calls, shape, dtype,
        parameters (elements), output_rms, grad_norm (L2), update_ratio, host_ns, device_ns, flag.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from tensortrace.export.contents import Contents, Shown, gather
from tensortrace.export.exporter import Exporter, Wanted, collect
from tensortrace.records import to_scalar

if TYPE_CHECKING:
    from tensortrace.run import Run

REPORT_FORMAT = "tensortrace-report"
REPORT_VERSION = 1
# Nothing that is said nests further, but what a spoilt log holds may.
_DEEPEST = 100


def report_json(
    run: Run | str | Path, *, step: int | None = None, modules: Sequence[str] = ()
) -> str:
    """Write the report of one log as JSON.

    Args:
        run: the log or its path.
        step: the step of `modules`; chosen by default.
        modules: globs over module paths, to filter findings and modules.
    Raises:
        LogError: the path is not a log.
        UsageError: the run has no such step.
    """
    if isinstance(run, (str, Path)):
        from tensortrace.run import open_run

        with closing(open_run(run)) as opened:
            return report_json(opened, step=step, modules=modules)
    return render_json(gather([run], step=step, modules=modules))


def render_json(contents: Contents) -> str:
    """Write what `gather` collected as JSON; the keys are those of this module's docstring."""
    first = contents.runs[0]
    document = {
        "format": REPORT_FORMAT,
        "version": REPORT_VERSION,
        "ok": not contents.counts["error"],
        "counts": contents.counts,
        "header": msgspec.to_builtins(first.header),
        "end": msgspec.to_builtins(first.end),
        "ranks": [_rank(run) for run in contents.runs],
        "findings": [_finding(one) for one in contents.shown],
        "checked_again": any(found.again for found in contents.found),
        "problems": [problem for found in contents.found for problem in found.problems],
        "step": contents.step,
        "whole": contents.whole,
        "modules": [asdict(row) for row in contents.rows],
    }
    return json.dumps(_strict(document), allow_nan=False, indent=1) + "\n"


def _rank(run: Run) -> dict[str, Any]:
    return {
        "rank": run.header.rank,
        "path": str(run.path),
        "first_step": run.first_step() if run.steps else None,
        "last_step": run.last_step() if run.steps else None,
        "end": msgspec.to_builtins(run.end),
        "lost_bytes": run.lost_bytes,
        "unreadable": run.unreadable,
    }


def _finding(one: Shown) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(one.finding),
        "later_steps": one.later,
        "ranks": list(one.ranks),
    }


def _strict(value: Any, depth: int = 0) -> Any:
    """Name what JSON has no number for; evidence of a check that ran just now may hold it."""
    if isinstance(value, float):
        return to_scalar(value)
    if depth > _DEEPEST:
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item, depth + 1) for item in value]
    return value


def _write(runs: Sequence[Run], wanted: Wanted, out: TextIO) -> None:
    out.write(render_json(collect(runs, wanted)))


EXPORTER = Exporter(
    suffix=".json",
    summary="the report for machines, as `tensortrace report --json` prints it",
    write=_write,
    beginnings=(f'{{\n "format": "{REPORT_FORMAT}"',),
)
