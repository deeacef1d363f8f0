"""States of random generators, got and set without a deadlock between threads.

torch holds a lock of the generator meanwhile, and does not let go of Python's: where the garbage
collector runs inside and hands Python to another thread, and that asks the same generator or seeds
it, both wait for ever (`torch/csrc/Generator.cpp`; up to Python 3.11, whose collector runs where an
object is made).
"""

from __future__ import annotations

import gc
import sys
import threading

import torch

# Taken again by its own thread where the end of a run is met by garbage collection.
_alone = threading.RLock()
_COLLECTS_ANYWHERE = sys.version_info < (3, 12)
# Objects that may be made between the look at the collector and the state that is handed out.
_SPARE = 8


def state_of(generator: torch.Generator) -> torch.Tensor:
    """The state of a generator, u8: 5 kB on the CPU. Hot."""
    with _alone:
        # For threads of the user's, who do not wait here: what is due is collected before.
        if _COLLECTS_ANYWHERE and gc.isenabled():
            most = gc.get_threshold()[0]
            if 0 < most < gc.get_count()[0] + _SPARE:
                gc.collect(0)
        return generator.get_state()


def set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    """Give a generator a state that it had."""
    with _alone:
        generator.set_state(state)
