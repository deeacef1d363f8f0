"""What an exception says, as far as it is about values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tensortrace.records import Action, Location

# What PyTorch, its distributions, NumPy and SciPy say of values that are not finite.
_NOT_FINITE = re.compile(
    r"invalid values|invalid numeric|probability tensor|\b(?:non-?)?finite\b|"
    r"\b(?:nans?|infs?|infinity)\b",
    re.IGNORECASE,
)
# And of those that no computation can go on with, which may be what is not finite does to them.
_UNFIT = re.compile(r"converge|singular|positive-definite", re.IGNORECASE)
# Few assertions say anything; their line does.
_ASKS = re.compile(r"\bis_?(?:nan|inf|finite)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Said:
    """The class of an exception, its message and the line that raised it."""

    kind: str
    message: str
    code: str | None

    def is_of_values(self) -> bool:
        """Whether it is about values that are not finite."""
        asks = self.kind == "AssertionError" and _ASKS.search(self.code or "") is not None
        return asks or _NOT_FINITE.search(self.message) is not None

    def may_be_of_values(self) -> bool:
        """Whether such values may be what it is about."""
        return self.is_of_values() or _UNFIT.search(self.message) is not None


def said(kind: str, message: str, location: Location | None) -> Said:
    """What an exception says that was raised somewhere."""
    return Said(kind, message, location.code if location is not None else None)


def said_by(action: Action) -> Said:
    """What the exception of an action says."""
    kind, message = (str(action.detail.get(key, "")) for key in ("type", "message"))
    return said(kind, message, action.location)
