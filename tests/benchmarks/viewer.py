"""How fast the viewer is on a large log: ``python -m tests.benchmarks.viewer --gb 1``.

`tensortrace view` runs in a real pseudo terminal; a time is from a key that is sent to the first
byte that comes back. Every key of the table of keys is pressed. The log is written first and
deleted in the end.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tensortrace.tui.bindings import KEYS
from tests.benchmarks.biglog import write_big_log
from tests.benchmarks.terminal import Terminal

BYTES = {
    "down": b"\x1b[B", "up": b"\x1b[A", "right": b"\x1b[C", "left": b"\x1b[D", "space": b" ",
    "pagedown": b"\x1b[6~", "pageup": b"\x1b[5~", "home": b"\x1b[H", "end": b"\x1b[F",
    "enter": b"\r", "escape": b"\x1b", "tab": b"\t", "shift+tab": b"\x1b[Z", "backspace": b"\x7f",
    "right_square_bracket": b"]", "left_square_bracket": b"[", "colon": b":", "slash": b"/",
    "plus": b"+", "minus": b"-", "equals_sign": b"=", "question_mark": b"?", "f1": b"\x1bOP",
    "full_stop": b".", "comma": b",", "less_than_sign": b"<", "greater_than_sign": b">",
    "left_parenthesis": b"(", "right_parenthesis": b")", "underscore": b"_",
    "left_curly_bracket": b"{", "right_curly_bracket": b"}",
}  # fmt: skip
PAGE_DOWN = b"\x1b[6~"
TARGET_KEY_S, TARGET_SCREEN_S, TARGET_MB, TARGET_IDLE = 0.05, 0.5, 150, 0.01
INDEXED = re.compile(r"(?:Findings \d+|No findings) [^,]")
# Pressed in turn while the index is read; each of them always changes the screen.
WALK = {"]": b"]", "j": b"j", "space": PAGE_DOWN, "e": b"e", "k": b"k", "G": b"G", "[": b"[",
        "pgup": b"\x1b[5~", "g": b"g", "E": b"E"}  # fmt: skip


def bytes_of(key: str) -> bytes | None:
    """What a terminal sends for a key as Textual names it."""
    if len(key) == 1:
        return key.encode()
    if key.startswith("ctrl+") and len(key) == 6:
        return bytes([ord(key[5]) & 0x1F])
    return BYTES.get(key)


@dataclass
class Times:
    """Seconds by key."""

    by_key: dict[str, list[float]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def add(self, key: str, took: float | None) -> None:
        """Note one press; None: nothing came back, since there was nothing to change."""
        if took is None:
            self.silent.add(key)
        else:
            self.by_key.setdefault(key, []).append(took)

    @property
    def all(self) -> list[float]:
        """Every time."""
        return [t for times in self.by_key.values() for t in times]

    def worst(self) -> tuple[str, float]:
        """The slowest press."""
        slowest = ((max(times), key) for key, times in self.by_key.items())
        took, key = max(slowest, default=(0.0, "none"))
        return key, took


def keys() -> list[tuple[str, bytes]]:
    """Every key that does something in the step view but the one that ends it."""
    found = []
    for key in KEYS:
        sent = bytes_of(key.keys.split(",")[0])
        idle = key.action in ("quit", "view('step')") or (key.views and "step" not in key.views)
        if not idle:
            assert sent is not None, f"what does a terminal send for {key.keys}?"
            found.append((key.shown.split()[0], sent))
    return found


def first_screen(log: Path) -> float:
    """Seconds from the start of the process until a row of the log is on the terminal."""
    with closing(Terminal(["view", str(log)])) as terminal:
        assert terminal.wait("Sequential|zero_grad", 60) is not None, terminal.seen[-2000:]
        return time.perf_counter() - terminal.began


def press_all(terminal: Terminal, times: Times, steps: int, turn: int) -> None:
    """Press every key once, each from the middle of the table of another step."""
    for nth, (name, sent) in enumerate(keys()):
        number = 1 + (nth * 37 + turn * 1009) % (steps - 2)
        jump(terminal, b":%d\r" % number, rf"Step {number}\b")
        terminal.press(PAGE_DOWN)
        terminal.settle(0.1)
        times.add(name, terminal.answer(sent, 1.0))
        terminal.settle(0.05)
        for _ in range(2):  # close what it has opened (the palette in two goes), leave its pane
            terminal.press(b"\x1b")
            terminal.settle(0.15)


def while_reading(log: Path, presses: int) -> Times:
    """Press keys while the index is read, in as many runs of the viewer as that takes."""
    times = Times()
    for _ in range(12):
        with closing(Terminal(["view", str(log)])) as terminal:
            terminal.wait(r"% read", 20)
            for name, sent in itertools.cycle(WALK.items()):
                took = terminal.answer(sent, 0.5)
                terminal.settle(0.02, 0.2)
                if INDEXED.search(terminal.seen):
                    break  # the key may have been pressed after the end
                times.add(name, took)
        if len(times.all) >= presses:
            break
    return times


@dataclass
class Result:
    """What was measured on one log; times in seconds."""

    nbytes: int
    steps: int
    screens: list[float]
    reading: Times
    after: Times
    jumps: dict[str, list[float]]
    index_s: float
    search_s: float
    cancel_s: float
    rss_mb: float
    peak_mb: float
    idle: float


def jump(terminal: Terminal, keys: bytes, expect: str) -> float:
    """Send keys that go far away; seconds from the last one until the screen says it is there."""
    terminal.settle()
    for _ in range(3 if len(keys) > 1 else 0):
        terminal.press(keys[:1])
        # On a busy machine the key may be taken together with an escape that came before it.
        if terminal.wait(rf"\n ?{re.escape(keys[:1].decode())}\s*\Z", 2) is not None:
            break
    terminal.press(keys[1:-1])  # a burst would not wait for the line that takes it
    terminal.settle()
    began = time.perf_counter()
    terminal.press(keys[-1:])
    assert terminal.wait(expect, 30) is not None, f"{keys!r}: no {expect} in\n{terminal.seen}"
    return time.perf_counter() - began


def measure(log: Path, steps: int, *, turns: int = 3, idle_s: float = 20.0) -> Result:
    """Measure everything on one log."""
    tell("first screen")
    screens = [first_screen(log) for _ in range(turns + 2)]
    tell("keys while the index is read")
    reading = while_reading(log, 60)
    with closing(Terminal(["view", str(log)])) as terminal:
        terminal.wait(r"% read", 20)
        index_s = terminal.wait(INDEXED.pattern, 120) or float("nan")
        terminal.settle(0.5)
        tell("keys afterwards")
        after = Times()
        jump(terminal, b"/linear1\r", "Detail: .*linear1")  # there is something to find again
        for turn in range(turns):
            press_all(terminal, after, steps, turn)
        tell("jumps")
        jumps: dict[str, list[float]] = {}
        for turn in range(turns):
            for name, sent, expect in jumps_of(steps, turn):
                jumps.setdefault(name, []).append(jump(terminal, sent, expect))
        tell("search")
        terminal.settle(0.3)
        search_s = jump(terminal, b"/no such text anywhere\r", "nowhere in this log")
        jump(terminal, b"/nowhere at all\r", "searching")
        time.sleep(0.1)
        cancel_s = jump(terminal, b"\x1b", "search given up")
        tell("idle")
        terminal.settle(0.5, 2)
        rss, peak = terminal.rss_mb(), terminal.rss_mb("VmHWM")
        idle = idle_share(terminal, idle_s)
    size = log.stat().st_size
    return Result(size, steps, screens, reading, after, jumps, index_s, search_s, cancel_s,
                  rss, peak, idle)  # fmt: skip


def jumps_of(steps: int, turn: int) -> Iterable[tuple[str, bytes, str]]:
    """Far jumps: what they are called, the keys, what the screen says at the end."""
    middle = steps * (turn + 1) // 5 + turn
    yield "to a step by its number", b":%d\r" % middle, rf"Step {middle}\b"
    yield "to the last step", b":%d\r" % (steps - 1), rf"Step {steps - 1}\b"
    yield "to the first step", b":0\r", r"Step 0\b"
    yield "to the next finding", b"e", r"Step [1-9]"


def idle_share(terminal: Terminal, seconds: float) -> float:
    """The share of one core that the viewer takes when nothing happens."""
    began = time.perf_counter()
    while time.perf_counter() - began < 12:  # polling backs off
        terminal.read(0.5)
    cpu, began = terminal.cpu_s(), time.perf_counter()
    while time.perf_counter() - began < seconds:
        terminal.read(0.5)
    return (terminal.cpu_s() - cpu) / (time.perf_counter() - began)


def table(result: Result) -> str:
    """Lay the numbers out as Markdown, the target beside each."""
    gb = result.nbytes / 1e9

    def ms(times: list[float]) -> str:
        if not times:
            return "-"
        last = sorted(times)[int(len(times) * 0.99)]
        told = [statistics.median(times), last, max(times)]
        return "{:.0f} ms, 99 in 100 within {:.0f} ms, at most {:.0f} ms".format(
            *(one * 1e3 for one in told)
        )

    rows = [
        ("first screen", f"{statistics.median(result.screens):.2f} s, at most "
                         f"{max(result.screens):.2f} s", "0.5 s"),
        ("any key while the index is read", ms(result.reading.all), "50 ms"),
        ("any key afterwards", ms(result.after.all), "50 ms"),
        *((name, ms(times), "50 ms") for name, times in result.jumps.items()),
        ("index complete", f"{result.index_s:.1f} s after the first screen", ""),
        ("search of everything", f"{result.search_s:.1f} s, {gb / result.search_s:.2f} GB/s", ""),
        ("search given up", f"{result.cancel_s * 1e3:.0f} ms", "50 ms"),
        ("memory", f"{result.rss_mb:.0f} MB, at most {result.peak_mb:.0f} MB", "150 MB"),
        ("idle", f"{result.idle:.1%} of a core", "1 %"),
    ]  # fmt: skip
    head = f"| {gb:.2f} GB, {result.steps:,} steps | measured | target |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def slowest(times: Times, count: int = 8) -> str:
    """The slowest keys, for whoever wants to mend them."""
    by_worst = sorted(times.by_key.items(), key=lambda pair: -max(pair[1]))[:count]
    return ", ".join(
        f"{key} {statistics.median(took) * 1e3:.0f}/{max(took) * 1e3:.0f} ms"
        for key, took in by_worst
    )


def tell(what: str) -> None:
    """Say on stderr what is being measured."""
    sys.stderr.write(f"{what} ...\n")


def main() -> int:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the log (default: 1)")
    parser.add_argument("--thin", type=int, default=0, help="thinned steps after each full one")
    parser.add_argument("--log", type=Path, help="measure on this log of `biglog` instead")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--packed", choices=("gz", "zst"), help="measure how a packed log opens")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tensortrace-") as folder:
        log = args.log or Path(folder, "big.jsonl")
        if args.log is None:
            tell("writing the log")
            write_big_log(log, int(args.gb * 1e9), thin=args.thin)
        if args.packed:
            sys.stdout.write(packed_table(log, args.packed))
            return 0
        result = measure(log, last_step(log) + 1, turns=args.turns)
    sys.stdout.write(table(result))
    sys.stdout.write(f"\nslowest while reading (median/most): {slowest(result.reading)}\n")
    sys.stdout.write(f"slowest afterwards: {slowest(result.after)}\n")
    sys.stdout.write(f"no answer: {' '.join(sorted(result.after.silent)) or 'none'}\n")
    return 0


def packed_table(log: Path, ending: str) -> str:
    """Pack a log and open it: when the first rows and the first share stand, when all is there."""
    with tempfile.TemporaryDirectory(prefix="tensortrace-") as folder:
        packed = Path(folder, f"{log.name}.{ending}")
        tell("packing")
        pack(log, packed)
        tell("opening")
        with closing(Terminal(["view", str(packed)])) as terminal:
            assert terminal.wait("Sequential|zero_grad", 60) is not None
            screen_s = time.perf_counter() - terminal.began
            progress = terminal.wait(r"unpacked \d+%", 10)
            assert terminal.wait("ended", 600) is not None
            whole_s = time.perf_counter() - terminal.began
            jump(terminal, b":7\r", r"Step 7\b")
            rss = terminal.rss_mb("VmHWM")
        size = packed.stat().st_size
    told = "-" if progress is None else "yes"
    return (
        f"| {log.stat().st_size / 1e9:.2f} GB as .{ending}, {size / 1e6:.0f} MB | measured |\n"
        f"|---|---|\n| first screen | {screen_s:.2f} s |\n| progress is shown | {told} |\n"
        f"| all unpacked | {whole_s:.1f} s |\n| memory | at most {rss:.0f} MB |\n"
    )


def pack(log: Path, packed: Path) -> None:
    """Compress a log by the program of that name, fast rather than small."""
    program = {".gz": ["gzip", "-1", "-c"], ".zst": ["zstd", "-1", "-q", "-c"]}[packed.suffix]
    with packed.open("wb") as file:
        subprocess.run([*program, str(log)], stdout=file, check=True)


def last_step(log: Path) -> int:
    """The last step of a log."""
    from tensortrace.run import open_run

    run = open_run(log)
    try:
        return run.last_step()
    finally:
        run.close()


if __name__ == "__main__":
    sys.exit(main())
