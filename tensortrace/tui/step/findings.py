"""The list of findings: three lines each, and the walk from one to the next."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len

from tensortrace.records import SEVERITIES, Finding, Module, Severity
from tensortrace.run.ranks import RANK
from tensortrace.text import SEVERITY_SIGN, escape, module_text
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled, clip, clip_path

LINES = 3
# Lines of a message where there is room.
MOST_MESSAGE = 5


def finding_line(
    finding: Finding,
    part: int,
    modules: Mapping[str, Module],
    width: int,
    *,
    here: bool = False,
    glyphs: Glyphs = UNICODE,
    height: int = LINES,
) -> Styled:
    """Write one of the `height` lines of a finding: what, where, the message."""
    sign = glyphs.cursor if here and part == 0 else " "
    if part == 0:
        head = f"{SEVERITY_SIGN[finding.severity]} {escape(finding.code)}"
        rank = finding.evidence.get(RANK)
        at = f" rank {rank}" if isinstance(rank, int) else ""
        place = f"{at} step {finding.step} "
        check = clip(escape(finding.check), max(0, width - 1 - len(head) - len(place)), glyphs)
        return [(sign, ""), (head, finding.severity), (place, ""), (check, "op")]
    if part == 1:
        module = modules.get(finding.module) if finding.module is not None else None
        where = module_text(finding.module, module.cls if module else None)
        told = escape(finding.param) if finding.param else where
        op = "" if not finding.op else f" {escape(finding.op)}"
        if op and finding.module is None:
            return [("   ", ""), (clip(op[1:], width - 3, glyphs), "")]
        told = clip_path(where if op else told, max(8, width - 3 - cell_len(op)), glyphs)
        return [("   ", ""), (clip(told + op, width - 3, glyphs), "")]
    lines = message_lines(finding, width - 3)
    if part - 2 >= len(lines):
        return []
    # The last line that there is room for holds the rest, so that its end says it was cut.
    text = " ".join(lines[part - 2 :]) if part == height - 1 else lines[part - 2]
    return [("   ", ""), (clip(text, width - 3, glyphs), "faint")]


def message_lines(finding: Finding, width: int) -> list[str]:
    """Break the message of a finding into lines of a width in terminal cells."""
    text = escape(finding.message[:500])
    return textwrap.wrap(text, max(10, width), break_on_hyphens=False) or [""]


def lines_each(findings: Sequence[Finding], width: int, height: int) -> int:
    """How many lines each finding takes in a pane: up to five of its message if all have room."""
    room = height // max(1, len(findings))
    if room <= LINES:
        return LINES
    longest = max((len(message_lines(f, width - 3)) for f in findings), default=1)
    return min(room, LINES - 1 + min(MOST_MESSAGE, longest))


def position(finding: Finding) -> tuple[int, int]:
    """Where a finding is in the run; one without a place in its step comes after the others."""
    return finding.step, finding.seq if finding.seq is not None else 1 << 62


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by their place in the run."""
    return sorted(findings, key=position)


def neighbour(
    findings: Sequence[Finding],
    current: Finding | None,
    here: tuple[int, int],
    direction: int,
    only: Severity | None = None,
) -> Finding | None:
    """The next (+1) or previous (-1) finding, None past the end.

    Args:
        findings: in order.
        current: the finding that the cursor came to last, if it is still there.
        here: (step, seq) of the cursor.
        only: skip the other severities.
    """
    if current is not None and current in findings:
        at = findings.index(current) + direction
        rest = findings[at:] if direction > 0 else findings[: at + 1][::-1] if at >= 0 else []
    elif direction > 0:
        rest = [f for f in findings if position(f) > here]
    else:
        rest = [f for f in findings if position(f) < here][::-1]
    return next((f for f in rest if only in (None, f.severity)), None)


def count_by_severity(findings: Iterable[Finding]) -> dict[Severity, int]:
    """Count findings, worst first, without the severities that there are none of."""
    found = [finding.severity for finding in findings]
    return {severity: found.count(severity) for severity in SEVERITIES if severity in found}


def worst_by_step(findings: Iterable[Finding]) -> dict[int, Severity]:
    """The worst severity of each step that has a finding."""
    marks: dict[int, Severity] = {}
    for finding in findings:
        held = marks.get(finding.step)
        if held is None or SEVERITIES.index(finding.severity) < SEVERITIES.index(held):
            marks[finding.step] = finding.severity
    return marks


def first_error(findings: Sequence[Finding]) -> Finding | None:
    """The first finding that is an error."""
    return first_of(findings, "error")


def first_of(findings: Sequence[Finding], severity: Severity) -> Finding | None:
    """The first finding of a severity."""
    return next((finding for finding in findings if finding.severity == severity), None)
