"""Reading keys from the terminal: Esc is answered at once, and is never joined to the next key.

A terminal sends the same byte for Esc and for the begin of an arrow key's code. Textual's reader
looks whether more has come ten times a second only, so that Esc takes 100 ms, and what is typed
meanwhile is taken for the rest of a code: Esc and then ``:`` lost the Esc (textual 8.2.8).
"""

from __future__ import annotations

import os
import selectors
import weakref
from codecs import getincrementaldecoder
from collections.abc import Iterable
from threading import Event
from typing import Any

from textual import constants, events
from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual._xterm_parser import XTermParser
from textual.app import App
from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message

ESCAPE = "\x1b"
_MOST_NBYTES = 4096


class KeyParser(XTermParser):
    """Makes keys of what a terminal sends; Esc and a letter that come at once are both keys.

    Textual makes ``Alt`` and the letter of them, or the letter that a Macintosh writes for both
    (``¡`` for Esc and ``1``), or drops the Esc where there is no such key.
    """

    def _sequence_to_key_events(self, sequence: str, alt: bool = False) -> Iterable[events.Key]:
        if isinstance(ANSI_SEQUENCES_KEYS.get(sequence), str) and sequence[0] == ESCAPE:
            alt, sequence = True, sequence[1:]
        if alt:
            yield events.Key("escape", ESCAPE)
        yield from super()._sequence_to_key_events(sequence)


class Ending(Event):
    """An event that a thread can wait for together with a file, rather than look at it often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self._told = os.pipe()
        weakref.finalize(self, _close, self.seen, self._told)

    def set(self) -> None:
        """Make `seen` readable."""
        if not self.is_set():
            super().set()
            os.write(self._told, b"x")

    def clear(self) -> None:
        """Make `seen` wait again."""
        if self.is_set():
            os.read(self.seen, 1)
            super().clear()


def _close(*ends: int) -> None:
    for end in ends:
        os.close(end)


class Keyboard(LinuxDriver):
    """Textual's driver of a terminal, but for how it waits."""

    exit_event: Ending

    def __init__(self, app: App[Any], **options: Any) -> None:
        super().__init__(app, **options)
        self.exit_event = Ending()

    def run_input_thread(self) -> None:
        """Hand on keys until the program ends."""
        parser, decode = KeyParser(), getincrementaldecoder("utf-8")("replace").decode
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            selector.register(self.exit_event.seen, selectors.EVENT_READ)
            wait = None
            while not self.exit_event.is_set():
                ready = any(key.fd == self.fileno for key, _ in selector.select(wait))
                # Before what has come since, however long the machine was busy with other things.
                self.hand_on(parser.tick())
                if ready:
                    data = os.read(self.fileno, _MOST_NBYTES)
                    if not data:  # the terminal is gone
                        break
                    self.hand_on(parser.feed(decode(data)))
                wait = constants.ESCAPE_DELAY if ready else None

    def hand_on(self, messages: Iterable[Message]) -> None:
        """Give the program what was read."""
        for message in messages:
            self.process_message(message)
