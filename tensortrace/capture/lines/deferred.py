"""Looks at variables that can wait, while lines run over and over that are not recorded.

To ask a frame what its variables are takes longer than most lines do. A line that is passed over
need not be looked at when it ends if all that it can have changed are the names that its own code
stores, until a line comes that stores one of them too, or one that is recorded. Others can have
changed where anything but plain ops of torch's was recorded meanwhile, where a function with
variables of an outer one was called, and while a container is among the variables.
"""

from __future__ import annotations

import dis
from types import CodeType

from tensortrace.capture.compiled import base_of

_STORES = ("STORE_FAST", "STORE_DEREF", "DELETE_FAST", "DELETE_DEREF")
_NONE: frozenset[str] = frozenset()

Stores = dict[int, frozenset[str]]
# Its seq, which execution it is, its time, and the first seq that no call inside it has.
Execution = tuple[int, int, int, int]


def find_stores(code: CodeType) -> Stores:
    """The names that the instructions of each line of a function give another value."""
    lines: dict[int, int] = {}
    for start, end, line in code.co_lines():
        lines.update(dict.fromkeys(range(start, end, 2), line or 0))
    found: dict[int, set[str]] = {}
    for one in dis.get_instructions(code):
        if one.opname.startswith(_STORES):
            names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
            found.setdefault(lines.get(one.offset, 0), set()).update(names)
    return {line: frozenset(names) for line, names in found.items()}


_HOT, _OWN = ("_names", "_stores", "disturbed", "lines"), ()


class Deferred(base_of("Deferred", _HOT)):  # type: ignore[misc] # compiled where it can be
    """The lines of one frame that have ended and were not looked at yet.

    Args:
        stores: of the frame's code.
    """

    __slots__ = tuple(_OWN)

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._names: set[str] = set()
        # In the order in which they ran, with the names that they store.
        self.lines: dict[int, tuple[frozenset[str], Execution]] = {}
        # Lines in which more than plain ops happened the last time.
        self.disturbed: set[int] = set()

    def add(self, ended: int, execution: Execution, begun: int) -> bool:
        """Put off the look at a line that has ended. Hot.

        Returns:
            Whether those that wait have to be looked at before the line runs that begins.
        """
        stores, lines = self._stores, self.lines
        names = stores.get(ended, _NONE)
        lines[ended] = names, execution
        self._names.update(names)
        if begun in lines or begun in self.disturbed:
            return True
        stored = stores.get(begun)
        return stored is not None and not self._names.isdisjoint(stored)

    def take(self) -> dict[int, tuple[frozenset[str], Execution]]:
        """The lines that wait; none waits any more."""
        lines, self.lines = self.lines, {}
        self._names.clear()
        return lines
