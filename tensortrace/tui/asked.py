"""Refuse to open at a place that the log of a run that is over does not have.

Of a run that still goes on the place may come; the viewer opens and says what is not there yet.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import msgspec

from tensortrace.errors import UsageError
from tensortrace.log import CHUNK
from tensortrace.run import Run
from tensortrace.text import escape


def check_place(
    runs: Sequence[Run], step: int | None, finding: str | None, module: str | None
) -> None:
    """Look whether a step, a finding (its id or code) and a module are in the logs of a run.

    Raises:
        UsageError: one is in none of them, and the run is over.
    """
    if any(run.end is None or run.unpacked < 1 for run in runs):
        return
    name = escape(str(runs[0].path))
    if step is not None:
        first, last = min(r.first_step() for r in runs), max(r.last_step() for r in runs)
        if not first <= step <= last:
            raise UsageError(f"no step {step} in {name}: it has steps {first} to {last}.")
    if module is not None and not any(_has_module(run, module) for run in runs):
        known = dict.fromkeys(path for run in runs for path in run.modules if path)
        near = difflib.get_close_matches(module, known, n=3, cutoff=0.4)
        closest = f" Closest: {', '.join(_quoted(path) for path in near)}." if near else ""
        raise UsageError(f"no module {_quoted(module)} in {name}.{closest}")
    if finding is not None and not any(_has_finding(run, finding) for run in runs):
        raise UsageError(
            f"no finding {_quoted(finding)} in {name}: `tensortrace report` lists those it has."
        )


def _quoted(text: str) -> str:
    return f"'{escape(text)}'"


def _has_module(run: Run, path: str) -> bool:
    return path in run.modules or _has(run, [_pair("path", path)])


def _has_finding(run: Run, wanted: str) -> bool:
    known = any(wanted == f.id or wanted.upper() == f.code for f in run.findings)
    return known or _has(run, [_pair("id", wanted), _pair("code", wanted.upper())])


def _pair(key: str, text: str) -> bytes:
    """A key with its value, as a record has them in its line."""
    return msgspec.json.encode({key: text})[1:-1]


def _has(run: Run, pairs: Sequence[bytes]) -> bool:
    """Look through the bytes of a log, 1 GB in a second; what is known of it was looked at."""
    file = run.file
    stop = file.complete(file.size())
    overlap = max(map(len, pairs)) - 1
    for start in range(0, stop, CHUNK):
        data = file.read(start, min(CHUNK + overlap, stop - start))
        if any(pair in data for pair in pairs):
            return True
    return False
