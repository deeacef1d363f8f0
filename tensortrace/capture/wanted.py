"""Which modules are recorded: those whose path matches a pattern of the user's."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


class Wanted:
    """The modules to record.

    Args:
        patterns: globs of their paths; None wants all.
    """

    def __init__(self, patterns: Iterable[str] | None) -> None:
        self._patterns = None if patterns is None else list(patterns)
        self._met: dict[str, bool] = {}

    def has(self, path: str) -> bool:
        """Whether the module of a path is one of them. Hot."""
        if self._patterns is None:
            return True
        found = self._met.get(path)
        if found is None:
            found = any(fnmatch.fnmatchcase(path, pattern) for pattern in self._patterns)
            self._met[path] = found
        return found

    def matched_nothing(self) -> list[str]:
        """Those patterns that no module which ran has a path for; none if no module ran."""
        if not self._met:
            return []
        return [
            pattern
            for pattern in self._patterns or ()
            if not any(fnmatch.fnmatchcase(path, pattern) for path in self._met)
        ]
