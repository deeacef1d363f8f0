"""Functions of the kind that PySnooper's and TorchSnooper's manuals show, for both to trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def to_bits(number: int) -> list[int]:
    if not number:
        return [0]
    bits: list[int] = []
    while number:
        number, remainder = divmod(number, 2)
        bits.insert(0, remainder)
    return bits


def spread() -> float:
    values = [random.Random(seed).randrange(1000) for seed in range(10)]
    lowest = min(values)
    highest = max(values)
    middle = (lowest + highest) / 2
    return middle


class Counter:
    def __init__(self) -> None:
        self.found = {"even": 0, "odd": 0}
        self.last = ""

    def count(self, numbers: list[int]) -> None:
        for number in numbers:
            kind = "odd" if number % 2 else "even"
            self.found[kind] += 1
            self.last = kind


def watched(counter: Counter) -> int:
    counter.count([1, 2])
    total = sum(counter.found.values())
    counter.last = "done"
    return total


def outer(n: int) -> str:
    doubled = double(n)
    text = f"<{doubled}>"
    return text


def double(n: int) -> int:
    result = n * 2
    return result


def countdown(n: int) -> Iterator[int]:
    while n:
        received = yield n
        n -= 1 if received is None else received


def caught() -> str:
    try:
        {}["no such key"]
    except KeyError as error:
        message = str(error)
    return message


def factorial(n: int) -> int:
    if n <= 1:
        return 1
    below = factorial(n - 1)
    return n * below


def closure(n: int) -> tuple[int, list[int]]:
    seen = []

    def add(k: int) -> int:
        nonlocal n
        n += k
        seen.append(n)
        return n

    for k in (1, 2):
        got = add(k)
    return got, seen


def raises_again(x: int) -> str:
    try:
        y = 1 / x
    except ZeroDivisionError as error:
        kind = type(error).__name__
        try:
            raise ValueError(kind) from error
        except ValueError as again:
            text = str(again)
            with contextlib.suppress(RuntimeError):
                raise RuntimeError("inner") from None
    else:
        text = f"fine {y}"
    finally:
        end = 1
    return text * end


def matches(value: Any) -> Any:
    match value:
        case {"kind": kind, **rest}:
            out = kind, rest
        case [x, *others]:
            out = x, others
        case int() | float() as number:
            out = number, None
    return out


def loops() -> int:
    n = 0
    for i in range(3):
        if i == 1:
            continue
        for j in range(3):
            if j == 2:
                break
            n += 1
        else:
            n = -1
    while True:
        n += 1
        if n > 5:
            break
    return n


def over_several_lines(a: int) -> str:
    high = max(
        a,
        a + 1,
    )
    total = (high +
             a)  # fmt: skip
    text = f"""{high}
    {total}"""
    with contextlib.nullcontext(a) as b, \
         contextlib.nullcontext():  # fmt: skip
        first, *rest = [b, a, 3]
    del high
    return text * first * len(rest)


def with_class() -> int:
    class Local:
        a = 1
        b = a + 1

    return Local().b


def mask_loss(x: Tensor) -> Tensor:
    mask = torch.tensor([[True, False], [False, True]])
    picked = x.masked_fill(mask, 0.5)
    values, places = picked.max(1)
    pair = (values, places)
    loss = torch.nn.functional.mse_loss(values, torch.ones(2))
    return loss + pair[1].sum()


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden.relu()
        out = self.second(hidden)
        return out


def regress() -> Any:
    torch.manual_seed(0)
    weight = torch.zeros(2, requires_grad=True)
    inputs, targets = torch.ones(4, 2), torch.full((4,), float("inf"))
    prediction = inputs @ weight
    error = prediction - targets
    loss = (error**2).mean()
    loss.backward()
    gradient = weight.grad
    return gradient
