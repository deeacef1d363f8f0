"""Which lines a loop goes round, as the bytecode of every Python says, and who is in it now."""

from __future__ import annotations

import dis
import sys
import textwrap
from types import CodeType
from typing import Any

import pytest

from tensortrace.capture.loop.rounds import Rounds

LINES = {
    "a for and what follows it": ("""
        for x in xs:       # 1
            a()            # 1
        b()
        """, "1"),
    "one inside another": ("""
        while True:        # 1
            for x in xs:   # 12
                a()        # 12
            b()            # 1
        """, "12"),
    "what is done before a break is done once": ("""
        for x in xs:       # 1
            if a():        # 1
                b()
                break
        """, "1"),
    "a for that always breaks is none": ("""
        for x in xs:
            a()
            break
        """, ""),
    "a handler that goes on, and one that leaves": ("""
        while True:        # 1
            try:           # 1
                a()        # 1
            except KeyError:
                b()        # 1
            except ValueError:
                c()
                return
            d()            # 1
        """, "1"),
    "a handler that begins the next turn": ("""
        for x in xs:       # 1
            try:           # 1
                a()        # 1
            except KeyError:
                b()        # 1
                continue   # 1
            with c:        # 1
                d()        # 1
        """, "1"),
    "no loop, though a handler jumps back": ("""
        try:
            a()
        except KeyError:
            b()
        c()
        """, ""),
    "what is awaited is no loop": ("""
        async for x in xs: # 1
            await a()      # 1
        await b()
        """, "1"),
}  # fmt: skip


def code_of(text: str) -> CodeType:
    lines = ["async def function(xs):", *textwrap.indent(text, "    ").splitlines()]
    space: dict[str, Any] = {}
    exec("\n".join(lines), space)
    code: CodeType = space["function"].__code__
    return code


def calls_by_line(code: CodeType) -> dict[int, list[int]]:
    """The instructions of each line that call something."""
    line, found = 0, {}
    for each in dis.get_instructions(code):
        line = dict(dis.findlinestarts(code)).get(each.offset, line)
        if each.opname.startswith("CALL"):
            found.setdefault(line, []).append(each.offset)
    return found


def calls_by_name(code: CodeType) -> dict[str, int]:
    """The first instruction that calls each function."""
    names: list[str] = []
    found: dict[str, int] = {}
    for each in dis.get_instructions(code):
        if each.opname.startswith("LOAD_") and each.argval in ("then", "now", "later", "a", "b"):
            names.append(each.argval)
        if each.opname.startswith("CALL") and names:
            found.setdefault(names.pop(), each.offset)
    return found


@pytest.mark.parametrize("name", LINES)
def test_a_loop_is_round_the_lines_that_run_again(name: str) -> None:
    text, _ = LINES[name]
    text = textwrap.dedent(text)
    code, rounds = code_of(text), Rounds(lambda code: True)
    for number, line in enumerate(text.splitlines(), start=2):
        _, _, mark = line.partition("# ")
        calls = calls_by_line(code).get(number, []) if "()" in line else []
        for at in calls:
            found = rounds.of(code, at)
            around = {r for r in rounds._of(code).rounds if at in r}
            assert len(around) == len(mark.strip()), (line, at)
            assert (found is None) == (not around)
            assert found is None or all(found <= other for other in around)


SURE = {
    "it follows": ("now()\nlater()", True),
    # Python 3.12 has a short end of a function once for each branch.
    "on both branches": ("now()\nif xs:\n    a()\nelse:\n    b()\nlater()\na()\nb()", True),
    "after a loop": ("for x in xs:\n    now()\nlater()", True),
    "in the same turn": ("while True:\n    now()\n    a()\n    later()", True),
    "unless something is raised": ("now()\nif xs:\n    raise KeyError\nlater()", True),
    "behind what is handled": ("try:\n    now()\nexcept KeyError:\n    a()\nlater()", True),
    "only sometimes": ("now()\nif xs:\n    later()", False),
    "in a loop that may be empty": ("now()\nfor x in xs:\n    later()", False),
    "in the next turn": ("for x in xs:\n    later()\n    now()", False),
    "not after a return": ("now()\nif xs:\n    return\nlater()", False),
    "not after a continue": ("for x in xs:\n    now()\n    if x: continue\n    later()", False),
    "not after a break": ("for x in xs:\n    now()\n    if x: break\n    later()", False),
    "it is over": ("later()\nnow()", False),
    "it is this very call": ("later(now())", True),
}  # fmt: skip


STAYS = {
    "further on": ("while True:\n    then()\n    now()\n    later()", True),
    "again, in a loop inside": ("for x in xs:\n    for y in x: now(then())\n    later()", True),
    "back, in a loop inside": ("for x in xs:\n    while x: now(); then()\n    later()", True),
    "in the next turn": ("for x in xs:\n    now()\n    then()\n    later()", False),
    "behind it, in the next turn": ("for x in xs:\n    now()\n    later()\n    then()", False),
    "without a loop": ("now()\nthen()\nlater()", False),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_frame_stays_in_the_turn_of_a_later_call(name: str) -> None:
    text, stays = STAYS[name]
    code, rounds = code_of(text), Rounds(lambda code: True)
    calls = calls_by_name(code)
    assert rounds.stays(code, calls["then"], calls["now"], calls["later"]) == stays


@pytest.mark.parametrize("name", SURE)
def test_a_later_call_is_come_to_for_sure(name: str) -> None:
    text, sure = SURE[name]
    code, rounds = code_of(text), Rounds(lambda code: True)
    calls = calls_by_name(code)
    assert rounds.comes_to(code, calls["now"], calls["later"]) == sure
    assert not rounds.comes_to(code, calls["now"], calls["now"])


def test_the_head_of_a_for_is_known_from_a_call() -> None:
    code, rounds = code_of("for x in xs:\n    a()\nnext(xs)\n"), Rounds(lambda code: True)
    heads = [each.offset for each in dis.get_instructions(code) if each.opname == "FOR_ITER"]
    calls = [at for found in calls_by_line(code).values() for at in found]
    assert [rounds.is_head(code, at) for at in heads] == [True]
    assert not any(rounds.is_head(code, at) for at in calls)


def test_a_call_is_the_same_wherever_python_says_that_it_is() -> None:
    rounds = Rounds(lambda code: True)
    here, seen = sys._getframe(), set()

    class Asked:
        def __len__(self) -> int:
            seen.add(rounds.call(here.f_code, here.f_lasti))
            return 0

    for asked in [Asked(), *[()] * 100, Asked()]:  # before Python has specialized it, and after
        len(asked)
    len(Asked())
    assert len(seen) == 2


def test_what_happened_before_and_what_happens_now_share_a_loop() -> None:
    rounds, found = Rounds(lambda code: True), []
    here = sys._getframe()

    def look(then: Any) -> Any:
        return rounds.shared(then, sys._getframe(1))

    def in_a_loop_of_its_own(then: Any) -> Any:
        for _ in range(1):
            shared = look(then)
        return shared

    then = rounds.frames(sys._getframe())
    found.append(look(then))
    for _ in range(2):
        then = rounds.frames(sys._getframe())
        found.append(look(then))
        for _ in range(1):
            found.append(look(then))
        found.append(in_a_loop_of_its_own(then))
    found.append(look(then))
    assert [each and each[0] is here for each in found[1:]] == [
        True, True, True, True, True, True, None,
    ]  # fmt: skip
    assert rounds.of(*then[id(here)]) == found[1][1]


@pytest.mark.parametrize("own", [True, False])
def test_a_trainer_of_another_package_goes_round_whatever_loops_are_the_users(own: bool) -> None:
    rounds, found = Rounds(lambda code: code.co_filename != "trainer.py"), []

    def turn(then: Any) -> Any:
        for _ in range(1):
            shared = rounds.shared(then, sys._getframe())
        return shared

    def advance() -> Any:
        return turn(rounds.frames(sys._getframe()))

    def run() -> None:
        for _ in range(2):
            found.append(advance())

    for each in () if own else (advance, run):
        each.__code__ = each.__code__.replace(co_filename="trainer.py")
    run()
    expected = None if own else True
    assert [each and each[0].f_code is run.__code__ for each in found] == [expected] * 2


def test_nothing_further_out_than_where_a_trace_begins_is_looked_at() -> None:
    rounds = Rounds(lambda code: True)
    here = sys._getframe()
    assert len(rounds.frames(here)) > 1
    rounds.enter(here)
    assert list(rounds.frames(here)) == [id(here)]

    def deeper() -> Any:
        return rounds.frames(sys._getframe())

    assert list(deeper())[1:] == [id(here)]
    rounds.enter(None)
    assert len(rounds.frames(here)) > 1
