"""A log as a reader sees it: steps, modules, tensors, findings, decoded lazily.

Opening reads the head and the tail; a step is found by bisecting bytes; `Run.index` reads the rest
piece by piece, in the background if the caller likes (every method may be called from any thread).
Lines of the log that are damaged or unknown are counted and left out, never an error.
"""

from __future__ import annotations

from tensortrace.run.folder import newest_log, open_run, start_run
from tensortrace.run.ranks import Ranks, named_logs, open_ranks, start_ranks
from tensortrace.run.run import Run
from tensortrace.run.series import held_over, looked_at, nonfinite_letter
from tensortrace.run.step import StepRecords

__all__ = [
    "Ranks",
    "Run",
    "StepRecords",
    "held_over",
    "looked_at",
    "named_logs",
    "newest_log",
    "nonfinite_letter",
    "open_ranks",
    "open_run",
    "start_ranks",
    "start_run",
]
