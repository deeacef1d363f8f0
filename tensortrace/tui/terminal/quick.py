"""Settings of the interpreter with which a key is answered soon while threads read the log."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from textual.timer import Timer

# A thread that computes keeps the interpreter for 5 ms by default, each time that the screen waits
# for anything: answering one key waits several times.
SWITCH_S = 0.0005
# Objects between two collections: one of 20,000 takes 6 ms, in the middle of an answer. They are
# collected between the keys instead, as soon as it is worth it: the young, every third time what
# has survived that once. All takes 20 ms and more: now and then, if nothing was pressed for long.
THRESHOLD = (100_000, 20, 50)
WORTH, OLDER_EVERY, ALL_EVERY = 2_000, 3, 20
TIDY_EVERY_S, TIDY_AFTER_S, TIDY_ALL_AFTER_S = 0.5, 0.15, 5.0
# Between two pieces of work of a thread the interpreter's lock is free for a moment: one that is
# released and taken again at once is not handed to the thread that waits.
BREATHE_S = 0.0005
# What a key brings to the screen is there by then; threads stand still so long, but not for ever
# where a key is held down.
ANSWERED_S, LONGEST_S, LOOK_EVERY_S = 0.05, 0.15, 0.005
STILL_S = 1.0


class Turns:
    """Who may use the interpreter: threads that read give way to a key that was just pressed."""

    def __init__(self) -> None:
        self.asked_at = time.monotonic()
        self.tidied = 0
        # What calls `tidy`; it rests where nobody does anything.
        self.tidying: Timer | None = None

    @property
    def still(self) -> bool:
        """Whether no key was pressed for a while: what is made ahead may take a moment."""
        return time.monotonic() - self.asked_at > STILL_S

    def asked(self) -> None:
        """A key was pressed."""
        self.asked_at = time.monotonic()
        self.changed()

    def changed(self) -> None:
        """Something was drawn or read, so there may be garbage."""
        if self.tidying is not None:
            self.tidying.resume()

    def breathe(self) -> None:
        """Give way; a thread calls this between two pieces of work, a few milliseconds each."""
        time.sleep(BREATHE_S)
        self.give_way()

    def give_way(self) -> None:
        """Give way to a key alone; for work that lets go of the lock by itself."""
        longest = time.monotonic() + LONGEST_S
        while time.monotonic() < min(longest, self.asked_at + ANSWERED_S):
            time.sleep(LOOK_EVERY_S)

    def tidy(self) -> None:
        """Collect garbage if there is some and no key was just pressed; called now and then."""
        rested_s = time.monotonic() - self.asked_at
        if self.tidied >= ALL_EVERY and rested_s > TIDY_ALL_AFTER_S:
            self.tidied = 0
            gc.collect(2)
        elif rested_s > TIDY_AFTER_S and gc.get_count()[0] >= WORTH:
            self.tidied += 1
            gc.collect(0 if self.tidied % OLDER_EVERY else 1)
        elif rested_s > TIDY_ALL_AFTER_S and self.tidying is not None:
            self.tidying.pause()


@contextmanager
def answering_soon() -> Iterator[None]:
    """Let threads take turns more often and collect garbage more rarely; undone at the end."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(*THRESHOLD)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.unfreeze()


def keep_what_is_there() -> None:
    """Leave what was made so far out of every later collection: modules and widgets stay."""
    gc.freeze()
