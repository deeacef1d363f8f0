"""The viewer in a real terminal: the bytes that reach it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensortrace.tui.layout import FINDINGS_FROM
from tests.benchmarks.terminal import Shown, Terminal, set_size, terminal_environ
from tests.builders import write_log
from tests.tui.samples import make_log
from tests.tui.test_hostile import PAYLOADS, hostile_records

# All that Textual itself writes: CSI sequences, and OSC 22, which names the shape of the pointer.
OURS = re.compile(rb"\x1b\[[0-9;?=<>]*[$ ]?[a-zA-Z]|\x1b\]22;[a-z]*(?:\x1b\\|\x07)|\x1b[78=>]")
PROGRAM = """\
import sys
from tensortrace.tui.app import view
code = view(sys.argv[1])
assert "torch" not in sys.modules
sys.exit(code)
"""


def talk(
    path: Path, until: str, keys: bytes | int, *, program: str = PROGRAM, **environ: str
) -> tuple[bytes, int, str]:
    """Open a log on a pseudo terminal, wait for a text, press keys or send a signal.

    Returns:
        All output, the exit code, the screen as it was when the text came.
    """
    pid, fd = pty.fork()
    if pid == 0:
        set_size(0, 120, 40)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        environ = terminal_environ(XDG_STATE_HOME=str(path.parent / "state"), **environ)
        os.execve(sys.executable, [sys.executable, "-c", program, str(path)], environ)
    seen, sent, shown, text = b"", False, Shown(120, 40), ""
    while select.select([fd], [], [], 60)[0]:
        try:
            data = os.read(fd, 1 << 16)
        except OSError:
            break
        if not data:
            break
        seen += data
        shown.feed(data)
        if not sent and until in shown.text:
            sent, text = True, shown.text
            _ = os.kill(pid, keys) if isinstance(keys, int) else os.write(fd, keys)
    os.close(fd)
    return seen, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_text_is_on_the_terminal_and_q_ends_with_zero(tmp_path: Path) -> None:
    seen, code, text = talk(make_log(tmp_path), "use log_softmax", b"jjkq")
    assert code == 0
    assert "log makes 12 of 640 elements -inf" in text
    assert "train.py" in text
    assert seen.endswith(b"\x1b[?1049l\x1b[?25h") or b"\x1b[?1049l" in seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(tmp_path: Path, number: int) -> None:
    seen, code, _ = talk(make_log(tmp_path), "use log_softmax", number)
    assert code == 128 + number
    assert b"\x1b[?1049l" in seen and b"\x1b[?25h" in seen and b"\x1b[?1003l" in seen
    assert list((tmp_path / "state").rglob("*.json"))


@pytest.mark.parametrize("payload", [0, 1, 5])
def test_no_escape_of_the_log_reaches_the_terminal(tmp_path: Path, payload: int) -> None:
    path = write_log(tmp_path / "log.jsonl", hostile_records(PAYLOADS[payload] + PAYLOADS[3]))
    seen, code, text = talk(path, "Detail", b"jjjjjjj\tjj\x1b[Bq")
    assert code == 0
    rest = OURS.sub(b"", seen)
    assert "\\x1b[2J" in text
    assert not set(rest) & ({*range(32), 0x7F} - {10, 13})
    assert not re.search("[\x80-\x9f]", rest.decode())
    # A CSI of the log would pass for one of Textual's: of these it writes no erase of its own.
    assert b"\x1b[2J" not in seen


def test_without_colour_the_signs_still_speak(tmp_path: Path) -> None:
    seen, _, text = talk(make_log(tmp_path), "use log_softmax", b"q", NO_COLOR="1")
    colours = re.findall(rb"[34]8;2;(\d+);(\d+);(\d+)", seen)
    assert all(r == g == b for r, g, b in colours)
    assert "x TT101" in text
    assert "x nan" in text
    assert "▶" in text


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(["view", str(make_log(tmp_path))])
    yield opened
    opened.close()


def test_a_key_is_answered_before_the_next_one_comes(terminal: Terminal) -> None:
    assert terminal.wait("use log_softmax") is not None
    walk = [
        (b"g", "▶    0 fwd"), (b"j", "▶    1 "), (b"\x1b[B", "▶    2 "), (b"k", "▶    1 "),
        (b"2", r"\[2 Timeline\]"), (b"1", r"\[1 Step\]"), (b"?", "Keys"), (b"\x1b", "▶    1 "),
    ]  # fmt: skip
    for key, pattern in walk:
        terminal.press(key)
        assert terminal.wait(pattern, 20) is not None, (key, terminal.seen)


def frame_of(seen: str) -> list[str]:
    """What is wrong with the layout of a screen: it fits it and reaches into its corners."""
    rows = seen.split("\n")
    wrong = [] if "train.py" in rows[0] else [f"no program in the first row: {rows[0]!r}"]
    if not rows[0].endswith("ended  "):
        wrong.append(f"the state is not at the right: {rows[0]!r}")
    if "q Quit" not in rows[-1]:
        wrong.append(f"no keys in the last row: {rows[-1]!r}")
    if not (rows[-2].startswith("╰") and rows[-2].endswith("╯")):
        wrong.append(f"no lower edge of the frame above the keys: {rows[-2]!r}")
    wrong += [f"a row has no right edge: {row!r}" for row in rows[5:-2] if row[-1] not in "│╮╯"]
    if "The logarithm of zero is minus infinity." not in seen:
        wrong.append("the detail is wrapped for another width")
    if ("─ Findings 2 ─" in seen) != (len(rows[0]) >= FINDINGS_FROM):
        wrong.append("the findings have a pane where there is room for one, and only there")
    for once in ("[1 Step]", "Detail: log", "Step 7 ─"):
        wrong += [f"not once there: {once}"] if seen.count(once) != 1 else []
    return wrong


def test_the_frame_fits_the_terminal_whenever_it_has_another_size(terminal: Terminal) -> None:
    assert terminal.wait("use log_softmax") is not None
    for columns, lines in ((80, 24), (200, 60), (80, 24), (120, 40)):
        terminal.resize(columns, lines)
        fits = terminal.until(lambda seen: not frame_of(seen), 20)
        assert fits is not None, "\n".join([*frame_of(terminal.seen), terminal.seen])


def test_a_log_through_a_pipe_is_walked_with_the_keys_of_the_terminal(tmp_path: Path) -> None:
    program = f"cat {make_log(tmp_path)} | {sys.executable} -m tensortrace view -"
    piped = f"import os, sys; os.execvp('sh', ['sh', '-c', {program!r}])"
    seen, code, text = talk(tmp_path / "log.jsonl", "use log_softmax", b"jjkq", program=piped)
    assert code == 0
    assert "x TT101" in text
    assert b"this is the report" not in seen
