"""Finished records on their way out: checks see all of them, the log gets those of its tier.

Every step writes its step line, findings, actions and optimizer records; full steps write all the
rest. A step that turns out to have a finding is full, and so is the one before it, whose records
are kept in memory until then. Once full steps have taken half of `max_bytes`, only those with a
finding are full: the other half is for the step lines of a long run. What was left out is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from typing import Literal

import msgspec

from tensortrace.capture.drafts import Unfinished
from tensortrace.capture.summary import StepSummary
from tensortrace.engine import Engine, is_quiet
from tensortrace.errors import LogError
from tensortrace.log import Sink, encode, encode_all
from tensortrace.records import (
    Action,
    End,
    Failure,
    Finding,
    Header,
    Module,
    Optimizer,
    Record,
    Severity,
    Source,
    Step,
)

_LEAN = frozenset({Header, Module, Source, Action, Optimizer, Finding, Step, End})
_FIRST_FULL = 20
# Shares of max_bytes. Once full steps have taken so much, no others are but those with a finding,
# so that the step lines of a long run have room.
_SHARE_OF_STEPS = 0.5
# Where whatever a thin step leaves out ends altogether, and where everything but findings does.
_SHARE_OF_FULL = 0.8
_SHARE_OF_LEAN = 0.95
# What findings and the end have to themselves in a small log, in bytes.
_FOR_FINDINGS = 4096
_FOR_END = 1024
_LARGE_RECORD = 1 << 20
# So many are encoded at once: some 100 kB.
_TOGETHER = 256


def is_full(
    step: int,
    every: int | Literal["auto"],
    steps: Container[int] | None,
    brings_update: Callable[[int, int], bool] = lambda step, stride: False,
) -> bool:
    """Whether a step writes all its records.

    "auto": steps 0 to 19, then 1 in 10 up to 200, 1 in 100 up to 2000, and so on, so that the log
    grows with the logarithm of the run; and after each of those the next with an update, as
    `Engine.brings_update` says, where not every step has one.
    """
    if steps is not None and step not in steps:
        return False
    if every != "auto":
        return step % every == 0
    if steps is not None or step < _FIRST_FULL:
        return True
    stride = 10
    while step >= 20 * stride:
        stride *= 10
    return step % stride == 0 or brings_update(step, stride)


class Journal:
    """Feed the checks, choose what to write, and write it.

    Args:
        sink: where finished records go.
        engine: the checks.
        full: says whether a step is full.
        max_bytes: what the log may grow to.
        on_finding: called with each finding as it is made.
        warn: called once with a sentence when something is lost.
    """

    def __init__(
        self,
        sink: Sink,
        engine: Engine,
        *,
        full: Callable[[int], bool],
        max_bytes: int,
        on_finding: Callable[[Finding], None],
        warn: Callable[[str], None],
    ) -> None:
        self.sink = sink
        self.engine = engine
        self._in_tier = full
        self._max_bytes = max_bytes
        self._lean_limit = min(max_bytes * _SHARE_OF_LEAN, max_bytes - _FOR_FINDINGS)
        self._full_limit = min(max_bytes * _SHARE_OF_FULL, self._lean_limit)
        self._on_finding = on_finding
        self._warn = warn
        self.full = full(0)
        # The step in flight, as far as this knows, and that for which all below was set.
        self.number = self._begun = 0
        self.findings: list[Finding] = []
        self.counts: dict[Severity, int] = {"error": 0, "warning": 0, "note": 0}
        self.steps = 0
        self.written = self.thinned = self.dropped = 0
        self.writable = True
        self.stopped = False
        # What full steps have taken, where the step in flight began, and whether there is no room
        # for it to be full; whether even step lines have none any more.
        self._full_nbytes = self._began = 0
        self._refused = self._before_refused = False
        self._said_thin = self._over = False
        self._order: dict[str, int] = {}
        self._summary = StepSummary(self._order)
        self._held: list[Record | Unfinished] = []
        self._before: list[Record | Unfinished] = []
        # What the engine puts aside, unfinished; None of a step whose calls it looks at.
        self._aside: list[Unfinished] | None = None
        self._thinned_in_step = 0
        self._started_ns = time.perf_counter_ns()
        self._reported_problems = 0

    def will_be_full(self, number: int) -> bool:
        """Whether a step that is to come writes all its records, as far as one can say."""
        return self._has_room() and self._in_tier(number)

    def _has_room(self) -> bool:
        most = self._max_bytes * _SHARE_OF_STEPS
        return self._full_nbytes < most and self.sink.nbytes < self._full_limit

    def begin_step(self, number: int) -> None:
        """Say which step is in flight: its number decides who looks at it and what is written."""
        wanted, room = self._in_tier(number), self._has_room()
        self.number, self.full, self._refused = number, wanted and room, wanted and not room
        if self._refused:
            self._say_thin()
        self._began = self.sink.nbytes
        self._aside = None if self.engine.looks_at(number) else []
        self._summary = StepSummary(self._order)
        self._thinned_in_step = 0
        self._begun = number

    def needs_finished(self) -> bool:
        """Whether somebody looks at the calls and parameters of the step in flight for certain."""
        return self._aside is None or self.full

    def take(self, records: Sequence[Record | Unfinished]) -> None:
        """Take records of the step in flight, in order, all finished if it `needs_finished`."""
        if self.stopped:
            return
        if self._begun != self.number:  # a signal handler raised while it began
            self.begin_step(self.number)
        found = False
        self._summary.describe(records)
        add = self._summary.add
        for record in records:
            add(record)
            self._held.append(record)
            for finding in self._feed(record):
                found = True
                self._keep(finding)
        self._report_problems(records[-1])
        if found and not self.full:
            self._upgrade()
        if self.full:
            self._write_held()
            if found:
                self.flush()

    def _feed(self, record: Record | Unfinished) -> list[Finding]:
        """Show a record to the checks, or put aside what they would. Hot."""
        if not isinstance(record, Unfinished):
            return self._show(record)
        if self._aside is not None and record.is_quiet():
            self._aside.append(record)
            return []
        return self._show(record.record())

    def _show(self, finished: Record) -> list[Finding]:
        if self._aside is None:
            return self.engine.feed(finished)
        found = [] if is_quiet(finished) else self._take_up()
        return found + self.engine.feed(finished)

    def _take_up(self) -> list[Finding]:
        aside, self._aside = self._aside or (), None
        return [finding for earlier in aside for finding in self.engine.feed(earlier.record())]

    def attend(self) -> None:
        """Have the step in flight looked at whole: not all is finite, and no record says so yet.

        What was put aside is finite: checks have hardly anything to say of it before the gate.
        """
        for finding in self._take_up():
            self._keep(finding)
        self.engine.attend()

    def close_step(
        self, *, number: int, seq: int, update: int, host_ns: int, passed_over: int = 0,
        rested: bool = False,
    ) -> None:  # fmt: skip
        """Write the step line and begin the next step; some calls were never looked at."""
        self.thinned += passed_over
        step = self._summary.step(
            number=number, seq=seq, update=update, host_ns=host_ns, time_ns=time.time_ns(),
            rested=rested,
        )  # fmt: skip
        step = msgspec.structs.replace(
            step,
            full=self.full and not self._thinned_in_step,
            repeats=self.engine.take_repeats(),
            dropped=self._leave_out() + passed_over,
        )
        try:
            self.take([step])
            if not self.full:
                self._write_lean()
            else:
                self._before = []
            self.flush()
        finally:  # a signal handler may raise meanwhile: the step is over all the same
            self.number = number + 1  # before any call, in which it may raise as well
            self.steps += 1
            if self.full:
                self._full_nbytes += self.sink.nbytes - self._began
            self.begin_step(number + 1)

    def part(self) -> None:
        """Write what a very long step holds so far; only a thin step must let go of its calls."""
        if not self.full:
            self._write_lean()
            self._before = []
        self._summary.forget_tensors()
        if self._aside:
            self._aside = []

    def end(
        self, *, step: int, update: int, why: Literal["exit", "exception", "interrupt"],
        failure: Failure | None,
    ) -> int:  # fmt: skip
        """Write the last line; returns the byte at which it begins."""
        self._write_held()
        start = self.sink.nbytes
        end = End(
            step=step,
            why=why,
            steps=self.steps,
            updates=update,
            findings=dict(self.counts),
            records=self.written,
            thinned=self.thinned,
            dropped=self.dropped,
            elapsed_ns=time.perf_counter_ns() - self._started_ns,
            failure=failure,
        )
        for finding in self.engine.feed(end):
            self._keep(finding)
            self._write(finding)
        self._write(end)
        self.flush()
        return start

    def reopen(self) -> None:
        """Go on after the last line, which was taken back."""
        self.written -= 1

    def write(self, record: Record) -> None:
        """Write one record past the tiers: the header."""
        self.engine.feed(record)
        self._write(record)

    def flush(self) -> None:
        """Hand the buffered bytes to the operating system."""
        if self.writable:
            self._try(self.sink.flush)

    def _keep(self, finding: Finding) -> None:
        self._held.append(finding)
        self._summary.add(finding)
        self.findings.append(finding)
        self.counts[finding.severity] += 1
        self._on_finding(finding)

    def _report_problems(self, after: Record | Unfinished) -> None:
        problems = self.engine.problems
        for problem in problems[self._reported_problems :]:
            self._warn(f"a check failed and is off: {problem}")
            detail = {"where": "checks", "error": problem}
            seq = getattr(after, "seq", 0)
            self._held.append(
                Action(step=after.step, seq=seq, action="tracer_error", detail=detail)
            )
        self._reported_problems = len(problems)

    def _upgrade(self) -> None:
        """The step has a finding: it becomes full, and so does the one before."""
        self.full = True
        self._count(-len(self._before), self._before_refused)
        for record in self._before:
            self._write(record)
        self._before = []

    def _write_held(self) -> None:
        held, self._held = self._held, []
        for start in range(0, len(held), _TOGETHER):
            self._write_all(held[start : start + _TOGETHER])

    def _write_lean(self) -> None:
        held, self._held = self._held, []
        lean: list[Record | Unfinished] = []
        rest: list[Record | Unfinished] = []
        for record in held:
            (lean if type(record) in _LEAN else rest).append(record)
        self._write_all(lean)
        self._before, self._before_refused = rest, self._refused
        self._count(len(rest), self._refused)

    def _count(self, left_out: int, refused: bool) -> None:
        """Count what a thin step leaves out, of its own accord or since the log has no room."""
        if refused:
            self.dropped += left_out
        else:
            self.thinned += left_out

    def _leave_out(self) -> int:
        """How many records of this step its tier leaves out."""
        if self.full:
            return self._thinned_in_step
        return sum(type(record) not in _LEAN for record in self._held)

    def _write_all(self, made: Sequence[Record | Unfinished]) -> None:
        """Write a few records at once, or one by one where a limit is near. Hot."""
        records = [each.record() if isinstance(each, Unfinished) else each for each in made]
        write_raw = self.sink.write_raw
        if self.writable and write_raw is not None:
            lines = encode_all(records)
            if self.sink.nbytes + len(lines) <= self._full_limit - _LARGE_RECORD:
                self.written += len(records)
                self._try(lambda: write_raw(lines))
                return
        for record in records:
            self._write(record)

    def _write(self, made: Record | Unfinished) -> None:
        record = made.record() if isinstance(made, Unfinished) else made
        if not self.writable:
            self.dropped += 1
            return
        # No line is encoded twice to learn its length while the limit is far.
        near = self.sink.nbytes > self._full_limit - _LARGE_RECORD
        if near and not self._fits(record):
            self.dropped += 1
            self._thinned_in_step += 1
            return
        self.written += 1
        try:
            self.sink.write(record)
        except LogError as error:
            self._lose(error)

    def _fits(self, record: Record) -> bool:
        if isinstance(record, (Header, End)):
            return True
        limit = self._lean_limit if type(record) in _LEAN else self._full_limit
        if isinstance(record, Finding):
            limit = self._max_bytes - _FOR_END
        elif self._over:
            return False
        if self.sink.nbytes + len(encode(record)) <= limit:
            return True
        if isinstance(record, Step):
            self._over = True
            self._warn(
                f"the log has grown to {self.sink.nbytes:,} bytes, its limit: from step "
                f"{record.step} on it keeps findings only"
            )
        elif type(record) not in _LEAN:
            self._say_thin()
        return False

    def _say_thin(self) -> None:
        if not self._said_thin:
            self._said_thin = True
            self._warn(
                f"full steps have taken their share of max_bytes ({self._max_bytes:,}): from here "
                "on only steps with a finding are full, the others keep step line, findings, "
                "actions and optimizer records; a larger limit or every=10 leaves room"
            )

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except LogError as error:
            self._lose(error)

    def _lose(self, error: LogError) -> None:
        self.writable = False
        # Only a callable has written no bytes. It gets everything or nothing, while without
        # a file findings are still printed and stop_on still stops.
        self.stopped = not self.sink.nbytes
        what = "tracing stops" if self.stopped else "the log is lost from here on"
        self._warn(f"{what}, training goes on: {error}")
