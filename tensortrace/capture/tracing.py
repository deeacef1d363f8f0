"""Let Python's trace function rest while our own code runs.

While source lines are followed Python calls a trace function at every call, ours included, which
made recording an op twice as dear (tests/benchmarks/lines.py). CPython has a pair of functions that
stop that for a thread; where they are missing (Python 3.10) the trace function is taken off and put
back. Wherever `here.busy` is positive the trace function rests.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from tensortrace.capture.active import here


def follow_thread(function: Any) -> None:
    """Give `here.rest` and `here.go_on` their effect in this thread.

    Args:
        function: the trace function that is in place.
    """
    try:
        api = ctypes.pythonapi
        state, enter, leave = (
            api.PyThreadState_Get, api.PyThreadState_EnterTracing, api.PyThreadState_LeaveTracing,
        )  # fmt: skip
    except (AttributeError, ImportError):
        here.rest = functools.partial(sys.settrace, None)
        here.go_on = functools.partial(sys.settrace, function)
        return
    state.restype, state.argtypes = ctypes.c_void_p, ()
    for one in (enter, leave):
        one.restype, one.argtypes = None, (ctypes.c_void_p,)
    this = ctypes.c_void_p(state())
    here.rest, here.go_on = functools.partial(enter, this), functools.partial(leave, this)
    for _ in range(here.busy):  # what has begun will end
        here.rest()


def forget_thread() -> None:
    """The opposite of `follow_thread`."""
    for _ in range(here.busy):
        here.go_on()
    here.rest = here.go_on = bool
