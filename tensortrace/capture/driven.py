"""A decorated function, traced while it runs, and not while it is suspended."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class Turns:
    """What a trace offers: its block; and what to call at a return or an item, and behind the last.

    Both are called within the block.
    """

    block: AbstractContextManager[Any]
    over: Callable[[], None]
    end: Callable[[], None]


def driven(function: Callable[..., Any], turns: Turns) -> Callable[..., Any]:
    """Make a function of the same kind that runs in the block, and whose turns are told."""
    wrapper: Any
    if inspect.iscoroutinefunction(function):

        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await _Driven(turns, function(*args, **kwargs))

    elif inspect.isasyncgenfunction(function):
        wrapper = _drive_async_generator(function, turns)
    elif inspect.isgeneratorfunction(function):

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # A generator function must stay one for those who ask inspect.
            return (yield from _drive_generator(function(*args, **kwargs), turns))

    else:

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with turns.block:
                result = function(*args, **kwargs)
                turns.over()
            return result

    return functools.wraps(function)(wrapper)


def is_ours(frame: FrameType) -> bool:
    """Tell whether a block is entered for a decorated function, not by the user."""
    return frame.f_code.co_filename == __file__


def _drive_generator(generator: Generator[Any, Any, Any], turns: Turns) -> Generator[Any, Any, Any]:
    """Trace a generator while it runs, not while it is suspended; each item is a step."""
    send: Callable[[], Any] = functools.partial(next, generator)
    while True:
        with turns.block:
            try:
                item = send()
            except StopIteration as stop:
                turns.end()
                return stop.value
            turns.over()
        try:
            sent = yield item
            send = functools.partial(generator.send, sent)
        except GeneratorExit:
            generator.close()
            raise
        except BaseException as error:
            send = functools.partial(generator.throw, error)


def _drive_async_generator(
    function: Callable[..., AsyncGenerator[Any, Any]], turns: Turns
) -> Callable[..., AsyncGenerator[Any, Any]]:
    """As `_drive_generator`, for an async one."""

    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        generator = function(*args, **kwargs)
        step: Any = generator.__anext__()
        while True:
            try:
                item = await _Driven(turns, step)
            except StopAsyncIteration:
                return
            try:
                step = generator.asend((yield item))
            except GeneratorExit:
                await generator.aclose()
                raise
            except BaseException as error:
                step = generator.athrow(error)

    return wrapper


class _Driven:
    """Await something, tracing only while it runs and not while it is suspended."""

    __slots__ = ("awaited", "turns")

    def __init__(self, turns: Turns, awaited: Coroutine[Any, Any, Any]) -> None:
        self.turns, self.awaited = turns, awaited

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self.awaited.__await__()
        send: Callable[[], Any] = functools.partial(next, inner)
        while True:
            over = None
            with self.turns.block:
                try:
                    waited = send()
                except StopIteration as stop:
                    self.turns.over()
                    return stop.value
                except StopAsyncIteration as stop:  # an async generator's end is no failure
                    self.turns.end()
                    over = stop
            if over is not None:
                raise over
            try:
                sent = yield waited
                send = functools.partial(_send, inner, sent)
            except BaseException as error:
                send = functools.partial(inner.throw, error)


def _send(inner: Generator[Any, Any, Any], value: Any) -> Any:
    return next(inner) if value is None else inner.send(value)
