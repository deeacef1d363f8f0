"""Every key of the viewer pressed on a terminal, and when the screen showed what it does.

A time is from the key that is sent to the first text that it brings: never to what the screen
would have shown by itself. So a key is pressed once the screen is at rest, with no message on it
that will go by itself; while the log is read, only a change of the place in the run counts.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tensortrace.tui.bindings import KEYS
from tensortrace.tui.tabs import TABS
from tests.benchmarks.terminal import Answer, Terminal

BYTES = {
    "down": b"\x1b[B", "up": b"\x1b[A", "right": b"\x1b[C", "left": b"\x1b[D", "space": b" ",
    "pagedown": b"\x1b[6~", "pageup": b"\x1b[5~", "home": b"\x1b[H", "end": b"\x1b[F",
    "enter": b"\r", "escape": b"\x1b", "tab": b"\t", "shift+tab": b"\x1b[Z", "backspace": b"\x7f",
    "right_square_bracket": b"]", "left_square_bracket": b"[", "colon": b":", "slash": b"/",
    "plus": b"+", "minus": b"-", "equals_sign": b"=", "question_mark": b"?", "f1": b"\x1bOP",
    "full_stop": b".", "comma": b",", "less_than_sign": b"<", "greater_than_sign": b">",
    "left_parenthesis": b"(", "right_parenthesis": b")", "underscore": b"_",
    "left_curly_bracket": b"{", "right_curly_bracket": b"}",
}  # fmt: skip
PAGE_DOWN, ESCAPE = b"\x1b[6~", b"\x1b"
QUIET_S = 0.3
_WARM_EVERY = 4
INDEXED = re.compile(r"(?:Findings \d+|No findings) [^,]")
# Pressed in turn while the index is read; each of them always changes the place.
WALK = {"]": b"]", "j": b"j", "space": PAGE_DOWN, "e": b"e", "k": b"k", "G": b"G", "[": b"[",
        "pgup": b"\x1b[5~", "g": b"g", "E": b"E"}  # fmt: skip
# What the keys of a view are pressed beside.
EVERYWHERE = ("j", "k", "space", "right_square_bracket", "e")
# The step that the table shows, and the line of it that the cursor is on.
_PLACE = re.compile(r"─ Step \d+|││▶[^│]*")
# The edge of a message that goes by itself.
_MESSAGE = "▌"


def bytes_of(key: str) -> bytes | None:
    """What a terminal sends for a key as Textual names it."""
    if len(key) == 1:
        return key.encode()
    if key.startswith("ctrl+") and len(key) == 6:
        return bytes([ord(key[5]) & 0x1F])
    return BYTES.get(key)


def keys(view: str = "step") -> list[tuple[str, bytes]]:
    """Every key that does something in the step view but the one that ends it.

    Of another view: the keys that are its own, and some that are everywhere.
    """
    found = []
    for key in KEYS:
        first = key.keys.split(",")[0]
        sent = bytes_of(first)
        here = view in key.views or (not key.views and (view == "step" or first in EVERYWHERE))
        if here and key.action not in ("quit", "view('step')"):
            assert sent is not None, f"what does a terminal send for {key.keys}?"
            found.append((key.shown.split()[0], sent))
    return found


@dataclass
class Times:
    """Answers by key."""

    by_key: dict[str, list[Answer]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def add(self, key: str, answer: Answer | None) -> None:
        """Note one press; None: nothing came back, since there was nothing to change."""
        if answer is None:
            self.silent.add(key)
        else:
            self.by_key.setdefault(key, []).append(answer)

    @property
    def firsts(self) -> list[float]:
        """Seconds until the screen began to show it, of every press."""
        return [one.first for answers in self.by_key.values() for one in answers]

    @property
    def wholes(self) -> list[float]:
        """Seconds until all of it was shown, of every press."""
        return [one.whole for answers in self.by_key.values() for one in answers]


def place(seen: str) -> object:
    """The step and the row that a screen shows."""
    return _PLACE.findall(seen)


def rest(terminal: Terminal) -> None:
    """Wait until the screen would stay as it is, but for what a key does.

    What is read in threads is drawn four times a second.
    """
    terminal.settle(QUIET_S)
    until = time.perf_counter() + 5
    while _MESSAGE in terminal.seen and time.perf_counter() < until:
        terminal.read(0.1)
    terminal.settle(QUIET_S)


def jump(terminal: Terminal, keys: bytes, expect: str) -> float:
    """Send keys that go far away; seconds from the last one until the screen says it is there."""
    terminal.settle()
    if len(keys) > 1:
        terminal.press(keys[:1])
        asked = terminal.wait(rf"\n ?{re.escape(keys[:1].decode())}\s*\Z", 10)
        assert asked is not None, f"{keys[:1]!r} was not taken in\n{terminal.seen}"
        terminal.press(keys[1:-1])
    terminal.settle()
    began = time.perf_counter()
    terminal.press(keys[-1:])
    assert terminal.wait(expect, 30) is not None, f"{keys!r}: no {expect} in\n{terminal.seen}"
    return time.perf_counter() - began


def press_all(
    terminal: Terminal, times: Times, steps: int, turn: int, warm: Callable[[], None]
) -> None:
    """Press every key of every view once, each from the middle of the table of another step.

    `warm` is called now and then: it sees to it that the log is in memory.
    """
    for nth, (view, name, sent) in enumerate(every_key()):
        if nth % _WARM_EVERY == 0:
            warm()
        go_back(terminal)
        number = 1 + (nth * 37 + turn * 1009) % (steps - 2)
        jump(terminal, b":%d\r" % number, rf"Step {number}\b")
        terminal.press(PAGE_DOWN)
        if view != "step":
            terminal.settle()
            terminal.press(str(TABS.index(view) + 1).encode())
        rest(terminal)
        times.add(name if view == "step" else f"{view} {name}", terminal.answer(sent))


def every_key() -> Iterator[tuple[str, str, bytes]]:
    """Every key of every view, as (view, key, what is sent)."""
    for view in TABS:
        for name, sent in keys(view):
            yield view, name, sent


def go_back(terminal: Terminal) -> None:
    """Close what a key has opened (the palette in two goes), go back to the table of the step."""
    for _ in range(2):
        terminal.press(ESCAPE)
        terminal.settle(0.15)
    terminal.press(b"1")
    terminal.settle(0.1)


def while_reading(log: Path, presses: int) -> Times:
    """Press keys while the index is read, in as many runs of the viewer as that takes."""
    times = Times()
    for _ in range(12):
        with closing(Terminal(["view", str(log)])) as terminal:
            terminal.wait(r"% read", 20)
            for name, sent in itertools.cycle(WALK.items()):
                answer = terminal.answer(sent, 0.5, part=place)
                terminal.settle(0.04, 0.2)
                if INDEXED.search(terminal.seen):
                    break  # the key may have been pressed after the end
                times.add(name, answer)
        if len(times.firsts) >= presses:
            break
    return times
