"""What the benchmark of the viewer takes for the answer to a key."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.benchmarks.presses import Times, place
from tests.benchmarks.terminal import Answer, Shown, Terminal


class Program(Terminal):
    """Stands for a viewer that writes some pieces once a key was pressed."""

    def __init__(self, *pieces: bytes) -> None:
        near, self.far = socket.socketpair()
        self.fd, self.pid, self.nbytes = near.detach(), os.getpid(), 0
        self.shown = Shown(30, 3)
        self.answers = threading.Thread(target=self.write, args=pieces)
        self.answers.start()

    def write(self, *pieces: bytes) -> None:
        self.far.recv(10)
        for piece in pieces:
            self.far.sendall(piece)

    def close(self) -> int | None:
        self.answers.join()
        os.close(self.fd)
        self.far.close()
        return 0


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Program] = []

    def begin(*pieces: bytes) -> Program:
        started.append(Program(*pieces))
        return started[-1]

    yield begin
    for program in started:
        program.close()


def test_the_first_text_is_the_answer(start: Start) -> None:
    program = start(b"\x1b[1;1H", b"\x1b[2;1Hcursor", b"\x1b[3;1Hdetail")
    answer = program.answer(b"j", 60.0)
    assert answer is not None
    assert 0 < answer.first <= answer.whole
    assert "detail" in program.seen


@pytest.mark.parametrize("pieces", [[], [b"\x1b[2;7H"], [b"\x1b[?25l\x1b[0m"]])
def test_what_writes_no_text_is_none(start: Start, pieces: list[bytes]) -> None:
    assert start(*pieces).answer(b"h", 0.01) is None


def test_while_the_log_is_read_only_another_place_is_an_answer(start: Start) -> None:
    program = start(b"\x1b[1;1H 7% read", b"\x1b[2;1H\xe2\x94\x80 Step 12 ")
    answer = program.answer(b"]", 60.0, part=place)
    assert answer is not None
    assert place(program.seen) == ["─ Step 12"]
    assert start(b"\x1b[1;1H 8% read").answer(b"j", 0.01, part=place) is None


def test_the_line_of_the_cursor_is_a_place() -> None:
    one, other = "││▶   10 fwd dropout │", "││▶   11 fwd linear2 │"
    assert place(one) != place(other)
    assert place(f"{one} 12% read") == place(f"{one} 13% read")


def test_silent_keys_have_no_time() -> None:
    times = Times()
    times.add("j", Answer(0.01, 0.03))
    times.add("j", Answer(0.02, 0.02))
    times.add("h", None)
    assert (times.firsts, times.wholes, times.silent) == ([0.01, 0.02], [0.03, 0.02], {"h"})
