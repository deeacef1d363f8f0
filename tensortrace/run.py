"""A log as a reader sees it: steps, modules, tensors, findings, decoded lazily."""

from __future__ import annotations

from pathlib import Path

from tensortrace.records import End, Finding, Header, Module, Source, Step


class StepRecords:
    """All records of one step: `calls`, `params`, `actions`, `optimizers`, `findings`, `summary`.

    Also `records` (everything, in log order) and `tensors` (by id, with `producer(id)` and
    `consumers(id)` giving calls).
    """


class Run:
    """A log opened for reading: bounded memory, any step at once, growing while it is written.

    Attributes: `path`, `header: Header`, `modules: dict[str, Module]`, `findings: list[Finding]`,
    `end: End | None`, `live: bool`, `lost_bytes: int` (cut last line), `skipped: Counter[str]`
    (unknown kinds and keys), `unreadable: int` (lines that are not records).
    """

    header: Header
    modules: dict[str, Module]
    findings: list[Finding]
    end: End | None

    def first_step(self) -> int: ...
    def last_step(self) -> int: ...
    def step(self, number: int) -> StepRecords:
        """All records of a step; found by bisecting bytes, no index needed. LRU-cached."""

    def summaries(self, start: int, stop: int) -> list[Step]:
        """The step lines in a range, for the timeline."""

    def source(self, file: str, line: int) -> Source | None:
        """The stored function that contains a line."""

    def refresh(self) -> bool:
        """Read on what the writer added; True if anything changed (also truncation)."""


def open_run(path: str | Path) -> Run:
    """Open a log, a compressed log, or one rank of several; a `LogError` says what it is not."""
