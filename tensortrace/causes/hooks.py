"""Forward hooks of the user's, which no replay runs: those that ran where something went bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tensortrace.causes.held import is_below
from tensortrace.records import Call, Location
from tensortrace.step_view import StepView
from tensortrace.text import location_text

ADVICE = "look at what the hook divides by, or takes the root or the logarithm of"


def ran_between(
    step: StepView,
    replay: Mapping[str, Any],
    around: Call | None,
    after: Call | None,
    before: Call | None,
) -> list[Location]:
    """List where the hooks are defined that ran in a call, between two of those inside it.

    A hook runs inside of the call for which it is, but after its entry or exit was recorded.

    Args:
        replay: what the action of the replay says.
        around: the call whose own code ran there; None outside every module.
        after: the call inside it that had ended, None at its beginning.
        before: the call inside it that had begun, if a hook of that may have run.
    """
    found: list[Location] = []
    outer = around.module if around is not None else ""
    entered = around if after is None else before
    for hook in replay.get("forward_hooks", ()):
        ahead, behind = set(hook["before"]), set(hook["after"])
        unseen = (p for p in ahead | behind if is_below(p, outer) and step.passed_over(p))
        here = entered is not None and entered.module in ahead
        if here or any(unseen) or (after is not None and after.module in behind):
            found.append(msgspec.convert(hook["at"], Location))
    return found


def named(hooks: Iterable[Location]) -> str:
    """The functions and where they are, for a sentence."""
    return ", ".join(f"{at.function} ({location_text(at)})" for at in hooks)
