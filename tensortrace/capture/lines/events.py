"""What an event of Python's trace function means: a return, a yield, an await or an exception."""

from __future__ import annotations

import inspect
import opcode
import sys
from types import FrameType
from typing import Any

from tensortrace.signal_handlers import let_through

_ASYNCHRONOUS = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR
# After a return event with the value None, the instruction tells whether there was a return.
_YIELDS = "YIELD_VALUE"
_RETURNS = frozenset({_YIELDS, "RETURN_VALUE", "RETURN_CONST", "RETURN_GENERATOR"})
_ENDS_OF_LOOPS = frozenset({"FOR_ITER", "SEND", "YIELD_FROM", "END_ASYNC_FOR", "END_SEND"})
_STOPS = (StopIteration, StopAsyncIteration, GeneratorExit)


def is_left(frame: FrameType, value: Any) -> bool:
    """Whether what Python calls a return is a frame that an exception leaves."""
    return value is None and _last_of(frame) not in _RETURNS


def yields(frame: FrameType) -> bool:
    """Whether what Python calls a return is a yield."""
    return _last_of(frame) == _YIELDS


def is_await(frame: FrameType, value: Any) -> bool:
    """Whether what Python calls a return is a coroutine that waits."""
    flags = frame.f_code.co_flags
    if not flags & _ASYNCHRONOUS or _last_of(frame) != _YIELDS:
        return False
    # What an async generator yields is wrapped; whatever else comes out of it is an await's.
    wrapped = type(value).__name__ == "async_generator_wrapped_value"
    return not (wrapped and flags & inspect.CO_ASYNC_GENERATOR)


def ends_a_loop(frame: FrameType, kind: Any) -> bool:
    """Whether an exception is how a loop ends, and no news."""
    return issubclass(kind, _STOPS) and _instruction(frame, frame.f_lasti) in _ENDS_OF_LOOPS


def exception_text(kind: Any, error: Any) -> str:
    """The class of an exception and its message."""
    name = getattr(kind, "__name__", str(kind))
    text = message_of(error)
    return f"{name}: {text}" if text else name


def message_of(error: Any) -> str:
    """The message of an exception, or that the user's own `__str__` has failed."""
    try:
        return str(error)
    except Exception as err:
        let_through(err)
        return "(its message cannot be read)"


def _last_of(frame: FrameType) -> str:
    """The name of the instruction with which a frame is left.

    Python 3.10 waits for another iterator before the instruction that asks it, and 3.13 gives a
    value out from the instruction behind the one that yields.
    """
    at = frame.f_lasti
    name = _instruction(frame, at)
    if sys.version_info < (3, 11) and _instruction(frame, at + 2) == "YIELD_FROM":
        return _YIELDS
    if sys.version_info >= (3, 13) and name == "RESUME":
        return _instruction(frame, at - 2)
    return name


def _instruction(frame: FrameType, at: int) -> str:
    code = frame.f_code.co_code
    name = opcode.opname[code[at]] if 0 <= at < len(code) else ""
    return name.removeprefix("INSTRUMENTED_")
