"""States of random generators, got and set without a deadlock between threads.

torch holds a lock of the generator meanwhile, and does not let go of Python's: where the garbage
collector runs inside and hands Python to another thread, and that asks the same generator or seeds
it, both wait for ever (`torch/csrc/Generator.cpp`; up to Python 3.11, whose collector runs where an
object is made).
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from typing import Any

import torch

from tensortrace.capture.unwrap import quiet

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


class RandomStates:
    """The random states of torch on the CPU, of Python and of NumPy, as they are now."""

    __slots__ = ("_numpy", "_python", "_torch")

    def __init__(self) -> None:
        self._torch, self._python = state_of(torch.default_generator), random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def put_back(self) -> bool:
        """Have them as they were; whether one of them had moved."""
        with quiet():  # modes of the user's count what is compared
            moved = not torch.equal(state_of(torch.default_generator), self._torch)
        if moved:
            set_state(torch.default_generator, self._torch)
        if random.getstate() != self._python:
            random.setstate(self._python)
            moved = True
        if self._numpy is not None and numpy_has_moved(self._numpy):
            sys.modules["numpy"].random.set_state(self._numpy)
            moved = True
        return moved


def numpy_has_moved(then: Any) -> bool:
    """Whether NumPy's random state is another one than it was."""
    now = sys.modules["numpy"].random.get_state()
    return now[2] != then[2] or bool((now[1] != then[1]).any())
