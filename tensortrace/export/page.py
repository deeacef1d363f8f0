"""The page of a check, as `tensortrace explain TT201` prints it."""

from __future__ import annotations

import textwrap

from tensortrace.checks import CODE, SECTIONS, Check, When

_MOMENTS: dict[When, str] = {
    "gate": "before the optimizer steps",
    "step": "when a step ends",
    "full": "when a full step ends",
}


def explain(one: Check) -> str:
    """Write a check's page as plain text: what it says, when, why, and its settings."""
    page = one.doc
    lines = [f"{one.code} {one.name} ({one.severity}, decided {_MOMENTS[one.when]})", page.summary]
    for name in SECTIONS:
        text = getattr(page, name.lower())
        lines += ["", name, *textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="  ")]
    for name in CODE:
        if code := getattr(page, name.lower()):
            lines += ["", name, *textwrap.indent(code, "  ").splitlines()]
    if one.thresholds:
        lines += ["", "Settings"]
        lines += [f"  {one.code}.{key} = {value}" for key, value in one.thresholds.items()]
    return "\n".join(lines) + "\n"
