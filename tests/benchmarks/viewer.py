"""How fast the viewer is on a large log: ``python -m tests.benchmarks.viewer --gb 1``.

`tensortrace view` runs in a real pseudo terminal, its modules compiled as pip leaves them. The log
is written first and deleted in the end. How a key is timed stands in `presses`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.biglog import write_big_log
from tests.benchmarks.presses import (
    ESCAPE,
    INDEXED,
    Times,
    go_back,
    jump,
    press_all,
    rest,
    while_reading,
)
from tests.benchmarks.terminal import Terminal

VIEWS = "1234567"


def first_screen(log: Path) -> float:
    """Seconds from the start of the process until a row of the log is on the terminal."""
    with closing(Terminal(["view", str(log)])) as terminal:
        assert terminal.wait("Sequential|zero_grad", 60) is not None, terminal.seen[-2000:]
        return time.perf_counter() - terminal.began


def bare_start() -> float:
    """Seconds of a process that imports what the viewer is built on and does nothing else."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import textual.app"], check=True)
    return time.perf_counter() - began


@dataclass
class Result:
    """What was measured on one log; times in seconds."""

    nbytes: int
    steps: int
    # Each beside a start of what it is built on, for the machine is noisy.
    screens: list[tuple[float, float]]
    reading: Times
    after: Times
    jumps: dict[str, list[float]]
    index_s: float
    search_s: float
    cancels: list[float]
    rss_mb: float
    peak_mb: float
    idle: dict[str, float]


def measure(log: Path, steps: int, *, turns: int = 3, idle_s: float = 10.0) -> Result:
    """Measure everything on one log."""
    tell("first screen")
    first_screen(log)  # its modules are compiled
    screens = [(first_screen(log), bare_start()) for _ in range(turns * 3)]
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
            press_all(terminal, after, steps, turn, lambda: keep_in_memory(log))
        go_back(terminal)
        tell("jumps")
        keep_in_memory(log)
        jumps: dict[str, list[float]] = {}
        for turn in range(turns):
            for name, sent, expect in jumps_of(steps, turn):
                jumps.setdefault(name, []).append(jump(terminal, sent, expect))
        tell("search")
        rest(terminal)
        keep_in_memory(log)
        search_s = jump(terminal, b"/no such text anywhere\r", "nowhere in this log")
        cancels = [cancel(terminal) for _ in range(turns)]
        tell("idle")
        rest(terminal)
        rss, peak = terminal.rss_mb(), terminal.rss_mb("VmHWM")
        idle = idle_shares(terminal, idle_s)
    size = log.stat().st_size
    return Result(size, steps, screens, reading, after, jumps, index_s, search_s, cancels,
                  rss, peak, idle)  # fmt: skip


def keep_in_memory(log: Path) -> None:
    """Read a log once: minutes after the last reading it may be on the disk alone.

    Then a far jump waits for the disk, which is no time of the viewer's: 80 to 260 ms, once 635,
    on a machine that takes idle pages out of memory.
    """
    with log.open("rb") as file:
        while file.read(1 << 24):
            pass


def cancel(terminal: Terminal) -> float:
    """Give up a search that has begun; seconds until the screen says so."""
    rest(terminal)
    jump(terminal, b"/nowhere at all\r", r"searched \d+%")
    began = time.perf_counter()
    terminal.press(ESCAPE)
    while "searched" in terminal.seen and terminal.read(5.0):
        pass
    return time.perf_counter() - began


def jumps_of(steps: int, turn: int) -> Iterable[tuple[str, bytes, str]]:
    """Far jumps: what they are called, the keys, what the screen says at the end."""
    middle = steps * (turn + 1) // 5 + turn
    yield "to a step by its number", b":%d\r" % middle, rf"Step {middle}\b"
    yield "to the last step", b":%d\r" % (steps - 1), rf"Step {steps - 1}\b"
    yield "to the first step", b":0\r", r"Step 0\b"
    yield "to the next finding", b"e", r"Step [1-9]"


def idle_shares(terminal: Terminal, seconds: float) -> dict[str, float]:
    """The share of one core that the viewer takes when nothing happens, by the key of the view."""
    began = time.perf_counter()
    while time.perf_counter() - began < 12:  # polling backs off
        terminal.read(0.5)
    shares = {}
    for view in VIEWS:
        terminal.press(view.encode())
        rest(terminal)
        terminal.settle(0.5)
        cpu, began = terminal.cpu_s(), time.perf_counter()
        while time.perf_counter() - began < seconds:
            terminal.read(0.5)
        shares[view] = (terminal.cpu_s() - cpu) / (time.perf_counter() - began)
    return shares


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

    screens = [screen for screen, _ in result.screens]
    ratio = statistics.median(screen / bare for screen, bare in result.screens)
    worst = max(result.idle, key=lambda view: result.idle[view])
    rows = [
        ("first screen", f"{statistics.median(screens):.2f} s, {min(screens):.2f} to "
                         f"{max(screens):.2f} s", "0.5 s"),
        ("beside it `import textual.app`", f"the first screen takes {ratio:.2f} times as long", ""),
        ("any key while the index is read", ms(result.reading.firsts), "50 ms"),
        ("any key afterwards", ms(result.after.firsts), "50 ms"),
        ("all that the key brings", ms(result.after.wholes), ""),
        *((name, ms(times), "50 ms") for name, times in result.jumps.items()),
        ("index complete", f"{result.index_s:.1f} s after the first screen", ""),
        ("search of everything", f"{result.search_s:.1f} s, {gb / result.search_s:.2f} GB/s", ""),
        ("search given up", ms(result.cancels), "50 ms"),
        ("memory", f"{result.rss_mb:.0f} MB, at most {result.peak_mb:.0f} MB", "150 MB"),
        ("idle", f"{statistics.median(result.idle.values()):.1%} of a core, at most "
                 f"{result.idle[worst]:.1%} (view {worst})", "1 %"),
    ]  # fmt: skip
    head = f"| {gb:.2f} GB, {result.steps:,} steps | measured | target |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def slowest(times: Times, count: int = 12) -> str:
    """The slowest keys, for whoever wants to mend them: half of the presses, then the slowest."""
    held = {key: [one.first for one in answers] for key, answers in times.by_key.items()}
    by_worst = sorted(held.items(), key=lambda pair: -max(pair[1]))[:count]
    return ", ".join(
        f"{key} {statistics.median(took) * 1e3:.0f}/{max(took) * 1e3:.0f} ms"
        for key, took in by_worst
    )


@contextmanager
def compiled(folder: Path) -> Iterator[None]:
    """Have every process keep its compiled modules, as pip does, whatever it is told here."""
    before = dict(os.environ)
    os.environ.update(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(folder / "compiled"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def load() -> str:
    """How busy the machine is, beside every number."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def tell(what: str) -> None:
    """Say on stderr what is being measured."""
    sys.stderr.write(f"{what} ... ({load()})\n")


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
        before = load()
        with compiled(Path(folder)):
            result = measure(log, last_step(log) + 1, turns=args.turns)
    sys.stdout.write(table(result))
    sys.stdout.write(f"\nat first {before}, at last {load()}")
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
