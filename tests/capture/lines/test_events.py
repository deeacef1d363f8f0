"""What Python's trace function tells means the same on every Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tensortrace import trace
from tests.capture.lines.lines_of import Seen

pytestmark = pytest.mark.usefixtures("closing_folder")


def traced(seen: Seen) -> Any:
    return trace(out=seen.take, lines=True, every=1)


def values(seen: Seen) -> list[tuple[str, str]]:
    assert not seen.faults
    return [(line.value.name, line.value.text) for line in seen.lines if line.value]


def test_what_another_iterator_gives_is_a_yield_also_where_it_is_none() -> None:
    seen = Seen()

    @traced(seen)
    def numbers() -> Iterator[Any]:
        yield from [1, None]
        yield None

    assert list(numbers()) == [1, None, None]
    assert values(seen) == [
        ("yield", "1"), ("yield", "None"), ("yield", "None"), ("return", "None"),
    ]  # fmt: skip


@pytest.mark.parametrize("others", [False, True])
def test_an_exception_thrown_into_a_generator_is_no_yield(others: bool) -> None:
    seen = Seen()

    @traced(seen)
    def numbers() -> Iterator[int]:
        if others:
            yield from [1]
        yield 1

    generator = numbers()
    assert next(generator) == 1
    with pytest.raises(KeyError, match="mine"):
        generator.throw(KeyError("mine"))
    assert values(seen) == [("yield", "1"), ("exception", "KeyError: 'mine'")]


async def test_a_coroutine_that_an_exception_leaves_does_not_wait() -> None:
    seen = Seen()

    async def fails() -> int:
        raise KeyError("mine")

    @traced(seen)
    async def function() -> int:
        return await fails() + 1

    with pytest.raises(KeyError, match="mine"):
        await function()
    assert values(seen) == [("exception", "KeyError: 'mine'")]
    assert seen.whats() == ["call", "line", "exception"]


async def test_an_exception_that_a_coroutine_catches_lets_it_return() -> None:
    seen = Seen()

    async def fails() -> int:
        raise KeyError("mine")

    @traced(seen)
    async def function() -> None:
        try:
            await fails()
        except KeyError:
            return None

    assert await function() is None
    assert values(seen) == [("exception", "KeyError: 'mine'"), ("return", "None")]
