"""Drafts become records in the order of their step, and go to the journal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tensortrace.capture.drafts import Draft, StepMark, Unfinished
from tensortrace.capture.journal import Journal
from tensortrace.capture.source import SourceLines

if TYPE_CHECKING:
    from tensortrace.capture.lines.tracer import LineTracer


class Outbox:
    """Gives the journal what was pending, once its statistics are known."""

    def __init__(self, journal: Journal, sources: SourceLines) -> None:
        self._journal, self._sources = journal, sources

    def send(self, pending: Sequence[Draft | StepMark], lines: LineTracer | None) -> None:
        """Hand on drafts in the order of their step, and close the steps whose marks are there."""
        batch: list[Draft] = []
        for item in pending:
            if isinstance(item, StepMark):
                self._send_batch(batch, lines)
                batch = []
                self._journal.close_step(
                    number=item.step, seq=item.seq, update=item.update, host_ns=item.host_ns,
                    passed_over=item.passed_over, rested=item.rested,
                )  # fmt: skip
            else:
                batch.append(item)
        self._send_batch(batch, lines)

    def _send_batch(self, batch: list[Draft], lines: LineTracer | None) -> None:
        if not batch:
            return
        ended = list(batch) if lines is not None else []
        batch.sort(key=_order)
        sources = self._sources.take_sources(batch[0].step)
        if lines is None and not self._journal.needs_finished():
            thin = [d if isinstance(d, Unfinished) else d.record() for d in batch]
            self._journal.take([*sources, *thin])
            return
        records = [draft.record() for draft in batch]
        if lines is not None:
            records = lines.mark(ended, batch, records)
        self._journal.take([*sources, *records])


def _order(draft: Draft) -> int:
    return draft.seq
