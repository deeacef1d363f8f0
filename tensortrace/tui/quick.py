"""Settings of the interpreter with which a key is answered soon while threads read the log."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# A thread that computes keeps the interpreter for 5 ms by default, each time that the screen waits
# for anything: answering one key waits several times.
SWITCH_S = 0.0005
# Objects between two collections: a row is a hundred, and a walk through all of them takes 40 ms.
THRESHOLD = (20_000, 20, 50)


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
