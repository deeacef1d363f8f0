"""Reading keys from the terminal: Esc is answered at once, and is never joined to the next key.

A terminal sends the same byte for Esc and for the begin of an arrow key's code. Textual's reader
looks whether more has come ten times a second only, so that Esc takes 100 ms, and what is typed
meanwhile is taken for the rest of a code: Esc and then ``:`` lost the Esc (textual 8.2.8).
"""

from __future__ import annotations

import os
import selectors
from codecs import getincrementaldecoder
from collections.abc import Iterable

from textual import constants, events
from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message

ESCAPE = "\x1b"
# How often the end of the program is looked for.
IDLE_S = 0.1
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


class Keyboard(LinuxDriver):
    """Textual's driver of a terminal, but for how it waits."""

    def run_input_thread(self) -> None:
        """Hand on keys until the program ends."""
        parser, decode = KeyParser(), getincrementaldecoder("utf-8")("replace").decode
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            wait = IDLE_S
            while not self.exit_event.is_set():
                ready = selector.select(wait)
                # Before what has come since, however long the machine was busy with other things.
                self.hand_on(parser.tick())
                if ready:
                    data = os.read(self.fileno, _MOST_NBYTES)
                    if not data:  # the terminal is gone
                        break
                    self.hand_on(parser.feed(decode(data)))
                wait = constants.ESCAPE_DELAY if ready else IDLE_S

    def hand_on(self, messages: Iterable[Message]) -> None:
        """Give the program what was read."""
        for message in messages:
            self.process_message(message)
