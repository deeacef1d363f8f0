"""Functions that ask for their variables as a dict, whose dict is theirs alone.

Until Python 3.12 a frame has one dict of its variables, which is filled anew each time somebody
asks: whoever has kept it sees it grow, and what `exec` has put there stays. So that of such a
function is not asked for.
"""

from __future__ import annotations

import dis
import sys
from inspect import CO_OPTIMIZED
from types import CodeType

# Later ones hand out a view, or a copy, each time.
HAS_ONE_DICT = sys.version_info < (3, 13)
_ASKING = frozenset({"locals", "exec"})
_CALLS = frozenset({"CALL", "CALL_FUNCTION", "PRECALL"})


def asks_for_locals(code: CodeType) -> bool:
    """Whether a function calls locals(), exec(), or vars() without an argument."""
    if not HAS_ONE_DICT or not code.co_flags & CO_OPTIMIZED:
        return False
    if not _ASKING.isdisjoint(names := code.co_names) or "vars" in names:
        return _asks(code)
    return False


def _asks(code: CodeType) -> bool:
    instructions = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
    for i, one in enumerate(instructions):
        if one.opname != "LOAD_GLOBAL":
            continue
        called = instructions[i + 1] if i + 1 < len(instructions) else one
        bare = called.opname in _CALLS and called.arg == 0
        if one.argval in _ASKING or (one.argval == "vars" and bare):
            return True
    return False
