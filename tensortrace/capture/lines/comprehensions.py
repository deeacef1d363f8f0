"""Where a function's own code holds comprehensions, which have no frame from Python 3.12 on.

PEP 709. Python's trace function hears of each of their turns as of a line of the function, and
finds their variables among its own. Up to Python 3.11 one comprehension was one call in its line.
"""

from __future__ import annotations

import dis
from types import CodeType

_CLEAR = dis.opmap.get("LOAD_FAST_AND_CLEAR")
_HEADS = frozenset({"FOR_ITER", "GET_ANEXT"})
_ENDS = frozenset({"END_FOR", "END_ASYNC_FOR"})

Ranges = tuple[tuple[int, int], ...]


def find_comprehensions(code: CodeType) -> Ranges:
    """Find the instructions of comprehensions, and those that clean up when one raises.

    Args:
        code: of a function or a file.
    Returns:
        Pairs of the offsets before the first instruction and of the last; none before Python 3.12.
    """
    if _CLEAR is None or _CLEAR not in code.co_code[::2]:
        return ()
    try:
        return _find(list(dis.get_instructions(code)))
    except (IndexError, StopIteration, ValueError):
        return ()  # a Python that makes other instructions of them


def is_inside(ranges: Ranges | list[tuple[int, int]], offset: int) -> bool:
    """Whether an instruction is one of a comprehension."""
    return any(first < offset <= last for first, last in ranges)


def _find(instructions: list[dis.Instruction]) -> Ranges:
    found: list[tuple[int, int]] = []
    names: set[str] = set()
    for i, one in enumerate(instructions):
        if one.opname != "LOAD_FAST_AND_CLEAR":
            continue
        names.add(one.argval)
        if instructions[i + 1].opname != one.opname and not is_inside(found, one.offset):
            found.append((one.offset, _last(instructions, i, one.argval)))
    return (*found, *_cleanups(instructions, names))


def _last(instructions: list[dis.Instruction], at: int, name: str) -> int:
    """The instruction that gives a variable of a comprehension back what it was outside."""
    turns = range(at, len(instructions))
    head = next(i for i in turns if instructions[i].opname in _HEADS)
    while instructions[head - 1].opname == "EXTENDED_ARG":
        head -= 1
    target = instructions[head].offset
    back = max(
        i for i in turns
        if instructions[i].opname == "JUMP_BACKWARD" and instructions[i].argval == target
    )  # fmt: skip
    end = next(i for i in range(back, len(instructions)) if instructions[i].opname in _ENDS)
    if instructions[end].opname == "END_ASYNC_FOR":
        return instructions[end].offset  # what comes after it may stand elsewhere
    return next(one.offset for one in instructions[end:] if name in _stored(one))


def _stored(one: dis.Instruction) -> tuple[str, ...]:
    if not one.opname.startswith("STORE_FAST"):
        return ()
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


def _cleanups(instructions: list[dis.Instruction], names: set[str]) -> list[tuple[int, int]]:
    found = []
    for i, one in enumerate(instructions):
        if one.opname != "RERAISE":
            continue
        first = i
        while first and names.issuperset(_stored(instructions[first - 1])) and (
            instructions[first - 1].opname.startswith("STORE_FAST")
        ):  # fmt: skip
            first -= 1
        if first < i and instructions[first - 1].opname == "SWAP":
            found.append((instructions[first - 1].offset - 1, one.offset))
    return found
