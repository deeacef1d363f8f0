"""Keys as a terminal sends them."""

from __future__ import annotations

import gc
import os
import queue
import select
import selectors
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from textual import constants, events
from textual.message import Message

from tensortrace.tui.terminal import keyboard
from tensortrace.tui.terminal.keyboard import Ending, Keyboard


class Typed(Keyboard):
    """Reads a pipe instead of a terminal."""

    def __init__(self) -> None:
        self.fileno, self.end = os.pipe()
        self.exit_event = Ending()
        self.messages: queue.Queue[Message] = queue.Queue()

    def process_message(self, message: Message) -> None:
        self.messages.put(message)

    def keys(self, count: int) -> list[str]:
        """The next keys, however long they take."""
        found = [self.messages.get(timeout=60) for _ in range(count)]
        return [one.key for one in found if isinstance(one, events.Key)]

    def close(self) -> None:
        """Close the pipe."""
        for end in (self.fileno, self.end):
            os.close(end)

    def send(self, keys: bytes) -> None:
        """Type something."""
        os.write(self.end, keys)


@pytest.fixture
def typed() -> Iterator[Typed]:
    driver = Typed()
    reader = threading.Thread(target=driver.run_input_thread)
    reader.start()
    yield driver
    driver.exit_event.set()
    reader.join()
    driver.close()


class Waits(selectors.SelectSelector):
    """Notes how long somebody waits."""

    waits: ClassVar[list[float | None]] = []

    def select(self, timeout: float | None = None) -> Any:
        self.waits.append(timeout)
        return super().select(timeout)


def test_nobody_looks_for_keys_while_none_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyboard.selectors, "SelectSelector", Waits)
    monkeypatch.setattr(Waits, "waits", [])
    driver = Typed()
    reader = threading.Thread(target=driver.run_input_thread)
    reader.start()
    driver.send(b"j")
    assert driver.keys(1) == ["j"]
    driver.exit_event.set()
    reader.join()
    driver.close()
    assert Waits.waits[0] is None
    assert set(Waits.waits) <= {None, constants.ESCAPE_DELAY}


def test_an_end_is_seen_by_who_waits_and_may_be_taken_back() -> None:
    ending = Ending()

    def seen() -> bool:
        return bool(select.select([ending.seen], [], [], 0)[0])

    assert not seen()
    for _ in range(2):
        ending.set()
        ending.set()
        assert ending.is_set()
        assert seen()
        ending.clear()
        ending.clear()
        assert not ending.is_set()
        assert not seen()


def test_an_end_leaves_no_file_open() -> None:
    ending = Ending()
    seen = ending.seen
    os.fstat(seen)
    del ending
    gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(seen)


def test_esc_alone_needs_no_other_key(typed: Typed) -> None:
    typed.send(b"\x1b")
    assert typed.keys(1) == ["escape"]
    typed.send(b":")
    assert typed.keys(1) == ["colon"]


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        (b"\x1b:", ["escape", "colon"]),
        (b"\x1b1:", ["escape", "1", "colon"]),
        (b"\x1b\x1bq", ["escape", "escape", "q"]),
        (b"\x1bG", ["escape", "G"]),
        (b"\x1b[Aj\x1b[6~", ["up", "j", "pagedown"]),
        (b"\x1bOP", ["f1"]),
        (b"]\r\x7f\t\x1b[Z", ["right_square_bracket", "enter", "backspace", "tab", "shift+tab"]),
        ("ü€".encode(), ["ü", "euro_sign"]),
    ],
)
def test_keys_that_come_at_once_are_all_there(typed: Typed, sent: bytes, keys: list[str]) -> None:
    typed.send(sent)
    assert typed.keys(len(keys)) == keys


def test_a_letter_of_two_bytes_may_come_in_two_pieces(typed: Typed) -> None:
    typed.send(b"j\xc3")
    assert typed.keys(1) == ["j"]
    typed.send(b"\xbc")
    assert typed.keys(1) == ["ü"]


def test_what_is_pasted_is_one_message(typed: Typed) -> None:
    typed.send(b"\x1b[200~layers.3\x1b[201~")
    pasted = typed.messages.get(timeout=60)
    assert isinstance(pasted, events.Paste)
    assert pasted.text == "layers.3"
