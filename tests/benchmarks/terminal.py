"""A program in a real pseudo terminal: press keys, time the bytes that come back."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len

# All that Textual writes around its text.
ESCAPES = re.compile(rb"\x1b\[[0-9;?=<>]*[$ ]?[a-zA-Z]|\x1b\]22;[a-z]*(?:\x1b\\|\x07)|\x1b[78=>]")
TICK = os.sysconf("SC_CLK_TCK")
_PIECE = re.compile(
    r"\x1b\[([0-9;?=<>]*)[$ ]?([a-zA-Z])|" + ESCAPES.pattern.decode() + r"|[\r\n]|[^\x1b\r\n]+"
)
_CUT = re.compile(r"\x1b[^a-zA-Z]*\Z")


class Shown:
    """What a terminal shows of the bytes that it is sent, as text without colours."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns = columns
        self.cells = [[" "] * columns for _ in range(lines)]
        self.y = self.x = 0
        # Letters that were written, as against what places the cursor or chooses colours.
        self.letters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """Take in what was written; a sequence that is cut waits for its end."""
        text = self._rest + self._decoder.decode(data)
        cut = _CUT.search(text)
        stop = len(text) if cut is None or len(text) - cut.start() > 40 else cut.start()
        self._rest = text[stop:]
        for found in _PIECE.finditer(text[:stop]):
            piece = found[0]
            if found[2] == "H":
                y, _, x = (found[1] or "1;1").partition(";")
                self.y, self.x = int(y or 1) - 1, int(x or 1) - 1
            elif piece == "\r":
                self.x = 0
            elif piece == "\n":
                self.y, self.x = self.y + 1, 0
            elif piece[:1] != "\x1b":
                self._write(piece)

    def _write(self, text: str) -> None:
        self.letters += len(text)
        for letter in text:
            wide = cell_len(letter)
            if self.y < len(self.cells) and self.x + wide <= self.columns:
                line = self.cells[self.y]
                if wide:
                    line[self.x : self.x + wide] = [letter, *[""] * (wide - 1)]
                elif self.x:
                    line[self.x - 1] += letter
            self.x += wide

    @property
    def text(self) -> str:
        """The lines of the screen."""
        return "\n".join(map("".join, self.cells))


def set_size(fd: int, columns: int, lines: int) -> None:
    """Give a terminal a size."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def terminal_environ(**more: str) -> dict[str, str]:
    """The environment of a program on a terminal of its own: the size is the terminal's alone.

    Readline, which pytest loads, writes that of ours where `os.environ` does not show it but
    `os.execv` passes it on: to be given to `os.execve`.
    """
    held = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return {**held, "TERM": "xterm-256color", "COLORTERM": "truecolor", **more}


@dataclass(frozen=True, slots=True)
class Answer:
    """When the screen showed what a key does, in seconds from the key: its begin, and all of it."""

    first: float
    whole: float


class Terminal:
    """The viewer on a pseudo terminal of its own, to be closed.

    `seen` is what its screen shows, `nbytes` how much it has written since it was last set to 0.
    """

    def __init__(
        self, arguments: Sequence[str], *, columns: int = 120, lines: int = 40, **environ: str
    ) -> None:
        # Where the viewer would remember the place: each opens as if it were the first.
        self._state = tempfile.TemporaryDirectory(prefix="tensortrace-")
        environ = {"XDG_STATE_HOME": self._state.name, **environ}
        self.began = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            set_size(0, columns, lines)
            program = [sys.executable, "-m", "tensortrace", *arguments]
            os.execve(program[0], program, terminal_environ(**environ))
        self.shown = Shown(columns, lines)
        self.nbytes = 0

    @property
    def seen(self) -> str:
        """The text on its screen."""
        return self.shown.text

    def read(self, seconds: float) -> bool:
        """Read what comes within some seconds; False if nothing did, or the program has ended."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:
            return False
        self.nbytes += len(data)
        self.shown.feed(data)
        return bool(data)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size; the kernel tells the program, which draws all anew."""
        self.shown = Shown(columns, lines)
        set_size(self.fd, columns, lines)

    def wait(self, pattern: str, seconds: float = 60.0) -> float | None:
        """Read until a regular expression is seen; the seconds it took, None if it never came."""
        return self.until(re.compile(pattern).search, seconds)

    def until(self, holds: Callable[[str], object], seconds: float = 60.0) -> float | None:
        """Read until something holds of the text on the screen; the seconds as `wait` has them."""
        began = time.perf_counter()
        while (left := began + seconds - time.perf_counter()) > 0:
            if holds(self.seen):
                return time.perf_counter() - began
            if not self.read(min(left, 0.25)) and self.ended:
                return None
        return None

    def settle(self, quiet: float = 0.05, most: float = 5.0) -> None:
        """Read until nothing comes for a moment."""
        end = time.perf_counter() + most
        while time.perf_counter() < end and self.read(quiet):
            pass

    def press(self, keys: bytes) -> None:
        """Send keys."""
        os.write(self.fd, keys)

    def answer(
        self,
        keys: bytes,
        seconds: float = 1.0,
        *,
        part: Callable[[str], object] | None = None,
        quiet: float = 0.15,
    ) -> Answer | None:
        """Send keys and wait until nothing more comes.

        Args:
            seconds: for so long the screen may stay as it is; then the answer is None.
            part: what of the screen the keys change, where other parts change by themselves; its
                change is the whole answer. By default whatever is written is one, but for codes
                that only place the cursor.
            quiet: after so long without a byte the answer is whole.
        """
        while self.read(0):
            pass
        before, letters = part and part(self.seen), self.shown.letters
        first, whole = None, 0.0
        began = time.perf_counter()
        self.press(keys)
        while (now := time.perf_counter() - began) < seconds:
            if not self.read(min(quiet, seconds - now)):
                if first is not None or self.ended:
                    break
                continue
            if letters == self.shown.letters:
                continue
            whole, letters = time.perf_counter() - began, self.shown.letters
            if part is None:
                first = whole if first is None else first
            elif part(self.seen) != before:
                return Answer(whole, whole)
        return None if first is None else Answer(first, whole)

    @property
    def ended(self) -> bool:
        """Whether the program is gone."""
        return self.rss_mb() == 0.0

    def rss_mb(self, field: str = "VmRSS") -> float:
        """Resident memory now (`VmHWM`: at its peak) in MB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", text)
        return int(found[1]) / 1024 if found else 0.0

    def cpu_s(self) -> float:
        """Seconds of processor time used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def close(self) -> int | None:
        """Quit; the exit code."""
        if self.fd < 0:
            return None
        try:
            for _ in range(3):  # a prompt or the help may be open
                self.press(b"\x1b")
                self.settle(0.15, 1.0)
            self.press(b"q")
            until = time.perf_counter() + 10
            while time.perf_counter() < until and self.read(1.0):
                pass
        except OSError:
            pass
        finally:
            os.close(self.fd)
            self.fd = -1
            self._state.cleanup()
        for _ in range(100):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return None
