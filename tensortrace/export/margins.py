"""What is wrong at a source line, in words: flags, gradients, exceptions, findings."""

from __future__ import annotations

from collections.abc import Iterator

from tensortrace.export.flows import LISTED, LineFlow
from tensortrace.export.lines import Listing
from tensortrace.records import SEVERITIES, Finding
from tensortrace.text import SEVERITY_SIGN, escape, shorten

LONGEST_MESSAGE = 400


def margin(listing: Listing, file: str, line: LineFlow) -> Iterator[tuple[str, str]]:
    """Tell what is wrong at a line, worst first: one escaped text each with its style."""
    for name, step in line.gradient.items():
        yield f"x {name} in a gradient (step {step})", "error"
    made = _first_nonfinite(listing, file, line)
    if made:
        yield made, "error"
    if "broadcast" in line.flags:
        yield f"! shapes were broadcast (step {line.flags['broadcast']})", "warning"
    for text, count in list(line.raised.items())[:LISTED]:
        times = f" ({count} times)" if count > 1 else ""
        yield f"x raised {escape(shorten(_first_line(text), LONGEST_MESSAGE))}{times}", "error"
    found = sorted(line.findings.values(), key=lambda one: SEVERITIES.index(one[0].severity))
    for finding, count in found[:LISTED]:
        yield _finding(finding, count), finding.severity
    if len(found) > LISTED:
        yield f"and {len(found) - LISTED} more findings", "faint"


def _first_nonfinite(listing: Listing, file: str, line: LineFlow) -> str:
    """The mark of the line that made the first NaN or infinity; empty for any other line."""
    step, first = line.flags.get("nonfinite"), listing.first_bad
    if step is None or first is None:
        return ""
    if (first.step, first.location.file, first.location.line) == (step, file, line.number):
        return f"x made the first NaN or infinity (step {step})"
    # In later steps others are the first: what came of it. Unless that is all one asked for.
    alone = first.step < listing.steps[0] and step == listing.first_bad_here
    return f"x made the first NaN or infinity of step {step}" if alone else ""


def _finding(finding: Finding, count: int) -> str:
    times = f", and {count - 1} more" if count > 1 else ""
    message = escape(shorten(_first_line(finding.message), LONGEST_MESSAGE))
    sign, code = SEVERITY_SIGN[finding.severity], escape(shorten(finding.code, 40))
    return f"{sign} {code} {finding.severity}: {message} (step {finding.step}{times})"


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
