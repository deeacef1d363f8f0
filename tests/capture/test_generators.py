"""States of generators, in several threads: each program ends, or the test waits for a minute."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
from collections.abc import Callable
from types import CodeType

import numpy as np
import pytest
import torch

from tensortrace.capture.generators import set_state, state_of

# A callback of the collector's sleeps, so that Python goes to another thread in the middle of a
# collection. What is made is kept, so that one begins wherever an object is made.
_IN_THREADS = """
import faulthandler, gc, threading, time
faulthandler.dump_traceback_later(60, exit=True)
import torch
from tensortrace.capture.generators import set_state, state_of

generator, kept = torch.default_generator, []
gc.callbacks.append(lambda phase, info: time.sleep(0.001))
gc.set_threshold(10)

def work(act):
    for _ in range(60):
        kept.append(act())

state = generator.get_state()
acts = [lambda: state_of(generator), {other}]
threads = [threading.Thread(target=work, args=(act,)) for act in acts]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.callbacks.clear()
"""


@pytest.mark.parametrize(
    "other",
    ["lambda: state_of(generator)", "lambda: set_state(generator, state)", "lambda: torch.rand(2)"],
)
def test_threads_do_not_wait_for_each_other_for_ever(other: str) -> None:
    script = _IN_THREADS.format(other=other)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the collector runs between instructions")
def test_nothing_is_collected_while_torch_holds_the_generator() -> None:
    generator, kept = torch.default_generator, []
    bare = lambda generator: generator.get_state()  # noqa: E731 as the last line of the other
    assert _collections_inside(lambda: kept.append(bare(generator)), bare.__code__)
    assert not _collections_inside(lambda: kept.append(state_of(generator)), state_of.__code__)


def _collections_inside(act: Callable[[], None], code: CodeType) -> int:
    """How often the collector ran, by itself, in the line that asks torch for the state."""
    lines, start = inspect.getsourcelines(code)
    asks = next(start + i for i, line in enumerate(lines) if "generator.get_state()" in line)
    inside = []

    def note(phase: str, info: dict[str, int]) -> None:
        frame = sys._getframe(1)
        inside.append(frame.f_code is code and frame.f_lineno == asks)

    most = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(20)
    try:
        for _ in range(300):
            act()
    finally:
        gc.set_threshold(*most)
        gc.callbacks.remove(note)
    assert inside
    return sum(inside)


def test_a_finalizer_that_asks_while_a_state_is_asked_for_gets_one() -> None:
    script = """
import faulthandler, gc
faulthandler.dump_traceback_later(60, exit=True)
import torch
from tensortrace.capture.generators import state_of

class Asks:
    def __init__(self):
        self.me = self
    def __del__(self):
        asked.append(state_of(torch.default_generator))

asked, kept = [], []
gc.set_threshold(20)
for _ in range(100):
    Asks()
    kept.append(state_of(torch.default_generator))
assert asked
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_state_that_is_set_gives_the_same_numbers_again() -> None:
    generator = torch.Generator().manual_seed(3)
    state = state_of(generator)
    assert np.array_equal(state.numpy(), generator.get_state().numpy())
    first = torch.rand(5, generator=generator)
    set_state(generator, state)
    assert torch.equal(torch.rand(5, generator=generator), first)
