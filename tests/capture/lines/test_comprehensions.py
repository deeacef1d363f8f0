"""A comprehension is part of its line on every Python, also where it has no frame of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensortrace import trace
from tensortrace.capture.lines.comprehensions import find_comprehensions, is_inside
from tests.capture.lines.lines_of import Seen, all_of

pytestmark = pytest.mark.usefixtures("closing_folder")

inlined = pytest.mark.skipif(sys.version_info < (3, 12), reason="each has a frame of its own")


def one_line(x: Tensor) -> list[Tensor]:
    parts = [part * 2 for part in x]
    return parts


def two_in_a_line(x: Tensor) -> Any:
    parts = [part * 2 for part in x]; names = {n * 2 for n in "ab"}  # fmt: skip  # noqa: E702
    return parts, names


def over_lines(x: Tensor) -> list[Tensor]:
    part = 7
    parts = [
        part * 2
        for part in x
        if part is not None
    ]  # fmt: skip
    return parts if part else []


def nested(x: Tensor) -> dict[int, list[Tensor]]:
    found = {i: [part + i for part in x if part is not None] for i in range(2)}
    return found


def in_a_loop(x: Tensor) -> int:
    n = 0
    for _ in range(2): n += len([part + 1 for part in x])  # fmt: skip  # noqa: E701
    return n


def closure(x: Tensor) -> list[int]:
    makers = [lambda: i + k for i in range(2) for k in range(2)]  # noqa: B023
    return [make() for make in makers]


def caught(x: Tensor) -> str:
    part = "mine"
    try:
        found = [1 // part for part in (1, 0)]
    except ZeroDivisionError:
        found = []
    return part * (len(found) + 1)


def raises(x: Tensor) -> Any:
    return [1 // part for part in (1, 0)]


async def numbers() -> AsyncIterator[int]:
    for n in range(3):
        await asyncio.sleep(0)
        yield n


LONG: dict[str, Any] = {}
exec("def long(x):\n    return [" + "part + " * 400 + "1 for part in [1]]", LONG)
PROGRAMS = [one_line, two_in_a_line, over_lines, nested, in_a_loop, closure, caught]


@pytest.mark.parametrize("function", PROGRAMS)
def test_its_variables_are_not_the_functions(function: Any) -> None:
    seen = all_of(function, torch.ones(3))
    before = [text for text in seen.changes("part") if text not in ("7", "'mine'")]
    assert not before + seen.changes("i") + seen.changes("k")
    assert len(seen.changes("part")) == (function in (over_lines, caught))


@pytest.mark.parametrize(
    ("function", "lines"),
    [
        (one_line, [1, 2]),
        (two_in_a_line, [1, 2]),
        (nested, [1, 2]),
        (closure, [1, 2]),
        (in_a_loop, [1, 2, 2, 2, 3]),
        (caught, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_its_turns_are_one_execution_of_its_line(function: Any, lines: list[int]) -> None:
    seen = all_of(function, torch.ones(3))
    assert not seen.faults
    found = [line.location.line for line in seen.lines if line.what == "line"]
    assert [line - function.__code__.co_firstlineno for line in found] == lines


def test_one_over_lines_is_told_by_the_lines_of_its_statement_alone() -> None:
    seen = all_of(over_lines, torch.ones(3))
    first = over_lines.__code__.co_firstlineno
    found = [line.location.line - first for line in seen.lines if line.what == "line"]
    assert (found[0], found[-1]) == (1, 7)
    assert sorted(set(found[1:-1])) == [2, 4]  # where it begins, what it goes over
    assert len(seen.changes("parts")) == 1


def test_what_it_made_belongs_to_its_line() -> None:
    seen = all_of(one_line, torch.ones(3))
    (made,) = [line for line in seen.lines if any(v.name == "parts" for v in line.changed)]
    assert made.location.line == one_line.__code__.co_firstlineno + 1
    assert made.host_ns > 0


def test_an_exception_in_it_is_one_of_the_function() -> None:
    seen = Seen()
    with pytest.raises(ZeroDivisionError):
        trace(out=seen.take, lines=True)(raises)(torch.ones(1))
    assert seen.whats() == ["call", "line", "exception"]
    assert seen.lines[-1].value.text.startswith("ZeroDivisionError")
    assert not seen.changes("part")


async def test_an_asynchronous_one_is_part_of_its_line_too() -> None:
    async def function() -> list[int]:
        found = [n * 2 async for n in numbers()]
        return found

    seen = Seen()
    assert await trace(out=seen.take, lines=True, every=1)(function)() == [0, 2, 4]
    assert seen.whats() == ["call", "line", "line", "return"]
    assert [v.name for line in seen.lines for v in line.changed] == ["found"]


@inlined
@pytest.mark.parametrize("function", [*PROGRAMS, LONG["long"]])
def test_the_instructions_of_each_are_found(function: Any) -> None:
    import dis

    ranges = find_comprehensions(function.__code__)
    adding = [
        one.offset
        for one in dis.get_instructions(function)
        if one.opname in ("LIST_APPEND", "SET_ADD", "MAP_ADD")
    ]
    assert adding
    assert all(is_inside(ranges, offset) for offset in adding)
    last = max(one.offset for one in dis.get_instructions(function) if "RETURN" in one.opname)
    assert not is_inside(ranges, last)


def test_a_function_without_one_has_none() -> None:
    assert find_comprehensions(Path.exists.__code__) == ()
