"""Looks that are put off: what lines are said to have changed is what they changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor, nn

from tensortrace import Lines
from tensortrace.capture import compiled
from tensortrace.capture.lines.deferred import find_stores
from tensortrace.capture.lines.frames import FrameTrace
from tests.capture.lines.lines_of import lines_of

pytestmark = pytest.mark.usefixtures("closing_folder")

N = 40


def overlapping() -> Tensor:
    x = y = torch.ones(2)
    for i in range(N):
        y = x + i
        x = y * 0.5
        y = y - 1
        x, y = y, x
    return x


def in_place() -> Tensor:
    x = torch.ones(2)
    total = torch.zeros(2)
    for i in range(N):
        y = x + i
        y.add_(1)
        total += y
        alias = total
        alias[0] = i
    return total


def members() -> list[Any]:
    found: list[Any] = []
    pair = {"a": torch.ones(2)}
    for i in range(N):
        y = pair["a"] + i
        found.append(i)
        pair["a"] = y
        found[0] = y
    return found


def closures() -> int:
    count = 0
    last = torch.ones(1)

    def add(i: int) -> None:
        nonlocal count, last
        count += i
        last = last + 1

    for i in range(N):
        y = torch.ones(2) + i
        add(i)
        z = y * 2
    return count + len(z)


def branches() -> Any:
    x: Any = torch.ones(2)
    for i in range(N):
        if i % 3 == 0:
            x = x + 1
        elif i % 7 == 0:
            x = torch.cat([x, x])[:2]
        else:
            rare = x * 2
            del rare
        with contextlib.suppress(ValueError):
            if i % 5 == 0:
                raise ValueError
            x = x.clone()
        z = (
            x
            - 1
        )  # fmt: skip
        while (w := z.sum()) > 3:
            z = z / 2
    return w


def modules() -> Tensor:
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    for _ in range(N):
        y = x * 1
        with torch.no_grad():
            layer.weight.mul_(0.9)
        weight = layer.weight
        x = layer(y).detach()
    return x + weight


def foreach() -> list[Tensor]:
    x, z = torch.ones(2), torch.ones(2)
    for i in range(N):
        y = z + i
        torch._foreach_add_([x, y], 1.0)
        z = y - 1
    return [x, z]


def shapes() -> Tensor:
    x = torch.ones(2)
    for i in range(N):
        y = torch.ones(3 if i in (20, 21) else 2)
        n = float("nan") if i == 25 else float(i)
        x = y + 1
    return x + n


def generator() -> int:
    def numbers() -> Any:
        x = torch.ones(2)
        for i in range(N):
            y = x + i
            x = y - 1
            yield y

    return len(list(numbers()))


def raising() -> None:
    x = torch.ones(2)
    for i in range(N):
        y = x + i
        try:
            z = y.reshape(2 if i % 4 else 3)
        except RuntimeError as error:
            z = y
            text = str(error)
        x = z
    del text


PROGRAMS: list[Callable[[], Any]] = [
    overlapping, in_place, members, closures, branches, modules, foreach, shapes, generator,
    raising,
]  # fmt: skip


def told(program: Callable[[], Any], depth: int) -> list[Any]:
    """All that lines said, but the time that they took."""
    torch.manual_seed(0)
    seen = lines_of(program, lines=Lines(depth=depth, normalize=True))
    assert program is generator or any(line.passed_over for line in seen.lines)
    return [structs.replace(line, host_ns=0) for line in seen.lines]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_log_is_the_same_whether_looks_are_put_off_or_not(
    program: Callable[[], Any], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_off = told(program, depth)
    monkeypatch.setattr(compiled, "turns", None)
    assert put_off == told(program, depth)
    monkeypatch.setattr(FrameTrace, "_may_wait", lambda self, recorder: False)
    assert put_off == told(program, depth)


def test_most_looks_of_a_loop_of_tensor_ops_are_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> Tensor:
        x = torch.ones(2)
        for _ in range(200):
            y = x * 0.5
            x = y + 1
        return x

    function_of_look = FrameTrace._look
    looks: list[int] = []

    def look(self: Any, frame: FrameType) -> Any:
        looks.append(frame.f_lineno)
        return function_of_look(self, frame)

    monkeypatch.setattr(FrameTrace, "_look", look)
    lines_of(function)
    assert len(looks) < 60


def test_names_that_lines_store_are_found() -> None:
    def function(a: Any) -> Any:
        x, (y, *z) = a
        for i in x:
            del y
            print(i)
        with a as b:
            c = d = 1
        e = (f := 2)
        import os as g

        return lambda: (c, d, e, f, z, b, g)

    first = function.__code__.co_firstlineno
    found = {line - first: set(names) for line, names in find_stores(function.__code__).items()}
    assert found[1] == {"x", "y", "z"}
    assert found[2] == {"i"}
    assert found[3] == {"y"}
    assert found[5] == {"b"}
    assert found[6] == {"c", "d"}
    assert found[7] == {"e", "f"}
    assert found[8] == {"g"}
