"""Exceptions that are raised by a signal handler of the program's, whatever runs at that moment."""

from __future__ import annotations

import functools
import signal
from types import CodeType
from typing import Any


def is_of_handler(error: BaseException) -> bool:
    """Whether an exception came through a signal handler: a time limit, a worker that has died.

    Python calls the handler between any two instructions, ours included, where its exception looks
    like a failure of ours. It is the program's all the same.
    """
    codes = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


def let_through(error: BaseException) -> None:
    """Raise an exception again that came through a signal handler; any other is the caller's."""
    if is_of_handler(error):
        raise error


def _code(handler: Any) -> CodeType | None:
    """The code of a handler that is written in Python; None of the default."""
    if isinstance(handler, signal.Handlers):
        return None  # an Enum, which Python code would be said to call
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__code__") and not hasattr(handler, "__func__"):
        handler = type(handler).__call__
    code = getattr(getattr(handler, "__func__", handler), "__code__", None)
    return code if isinstance(code, CodeType) else None
