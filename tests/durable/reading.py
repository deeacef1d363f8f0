"""All that reads a log, over one log: none of it may raise, whatever the log holds."""

from __future__ import annotations

import json
from pathlib import Path

from tensortrace.engine import Engine
from tensortrace.errors import LogError
from tensortrace.export.report_json import report_json
from tensortrace.export.text import render_report
from tensortrace.records import Record
from tensortrace.run import Run, open_run
from tensortrace.tui.header import state_of
from tensortrace.tui.search import seen_text
from tensortrace.tui.step.calls import row_line
from tensortrace.tui.step.detail import detail_lines
from tensortrace.tui.step.findings import finding_line, first_error, in_order, worst_by_step
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.timeline import timeline_lines, window

MANY = 60


def some_steps(run: Run) -> list[int]:
    """The first steps and the last ones; a damaged number can make a range of millions."""
    return sorted({*run.steps[:4], *run.steps[-4:]})


def read_records(run: Run) -> list[Record]:
    found: list[Record] = []
    for number in some_steps(run):
        step = run.step(number)
        found += step.records
        for record in step.records:
            seen_text(record, run.modules)
        for call in step.calls[:MANY]:
            step.producer(next((id for _, id in call.inputs), None))
            step.consumers(next((id for _, id in call.outputs), None))
            step.parent(call)
            step.children(call.seq)
            step.backward_of(call.seq)
        for number_of in list(step.tensors)[:MANY]:
            step.tensor(number_of)
    return found


def draw(run: Run) -> str:
    """Every line that the viewer would show of some steps."""
    lines = [[(" ".join(state_of(run, following=False)), "")]]
    findings = in_order(run.findings)
    first_error(findings)
    for finding in findings[:MANY]:
        lines.append(finding_line(finding, 0, run.modules, 80))
    for number in some_steps(run):
        rows = StepRows(run.step(number))
        for at in range(min(len(rows), MANY)):
            row = rows[at]
            lines.append(row_line(rows, at, run.modules, 100))
            rows.gather(row, lambda: False)
            lines += detail_lines(row, rows, run.modules, None, 80)
        shown = window(number, run.first_step(), run.last_step(), 40)
        steps = {s.step: s for s in run.summaries(shown.start, shown.stop)}
        lines += timeline_lines(steps, worst_by_step(findings), number, shown)
    return "\n".join("".join(text for text, _ in line) for line in lines)


def read_everything(path: Path) -> tuple[str, list[Record]] | None:
    """What all readers show of a log, and its records; None if it is refused in one sentence."""
    try:
        run = open_run(path)
    except LogError as err:
        assert len(str(err).splitlines()) == 1
        return None
    try:
        for _ in run.index():
            pass
        records = read_records(run)
        engine = Engine()
        for record in records:
            engine.feed(record)
        assert engine.problems == [], engine.problems
        shown = render_report(run, notes=True) + draw(run)
        json.loads(report_json(run), parse_constant=float.__truediv__)  # strict: no NaN
    finally:
        run.close()
    return shown, records
