"""Let Python's trace function rest while our own code runs.

While source lines are followed Python calls a trace function at every call, ours included, which
made recording an op twice as dear (tests/benchmarks/lines.py). CPython has a pair of functions that
stop that for a thread; where they are missing (Python 3.10) the trace function is taken off and put
back. Wherever `here.busy` is positive the trace function rests, but for where it was put on.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from tensortrace.capture.active import Ours, here


class _Aside:
    """The trace functions that were taken off, for each rest that lasts."""

    def __init__(self) -> None:
        self.functions: list[Any] = []

    def rest(self) -> None:
        self.functions.append(sys.gettrace())
        sys.settrace(None)

    def go_on(self) -> None:
        if self.functions:
            sys.settrace(self.functions.pop())


# A trace function that saw one of these begin would not see it end: it goes to rest inside.
BEGIN_REST = (Ours.__enter__.__code__, _Aside.rest.__code__)


def follow_thread(beside: bool) -> None:
    """Give `here.rest` and `here.go_on` their effect in this thread, whose trace function is on.

    Args:
        beside: whether ours tells another one, which may keep a stack of the frames that it sees
            begin, as coverage does: it must see them end before it rests.
    """
    try:
        api = ctypes.pythonapi
        state, enter, leave = (
            api.PyThreadState_Get, api.PyThreadState_EnterTracing, api.PyThreadState_LeaveTracing,
        )  # fmt: skip
    except (AttributeError, ImportError):
        aside = _Aside()
        here.rest, here.go_on = aside.rest, aside.go_on
    else:
        state.restype, state.argtypes = ctypes.c_void_p, ()
        for one in (enter, leave):
            one.restype, one.argtypes = None, (ctypes.c_void_p,)
        this = ctypes.c_void_p(state())
        here.rest, here.go_on = functools.partial(enter, this), functools.partial(leave, this)
    # Our code is running. What the other one saw begin of it must end first: the first rest that
    # counts is the next one from outside.
    if beside and here.busy:
        rest, go_on = here.rest, here.go_on

        def begin() -> None:
            if not here.busy:
                here.rest, here.go_on = rest, go_on

        here.rest, here.go_on = bool, begin
        return
    for _ in range(here.busy):  # what has begun will end
        here.rest()


def forget_thread() -> None:
    """The opposite of `follow_thread`."""
    for _ in range(here.busy):
        here.go_on()
    here.rest = here.go_on = bool
