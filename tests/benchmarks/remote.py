"""The viewer over a slow line: ``python -m tests.benchmarks.remote big.jsonl``.

Between the keys and the viewer lies a relay that holds back every byte for 100 ms in each
direction, as ssh to another continent does. A key may cost one round trip and what the viewer
takes, and few bytes.
"""

from __future__ import annotations

import argparse
import collections
import os
import pty
import select
import statistics
import sys
import threading
import time
import tty
from contextlib import closing
from pathlib import Path

from tests.benchmarks.terminal import Terminal

KEYS = {"j": b"j", "k": b"k", "pgdn": b"\x1b[6~", "pgup": b"\x1b[5~", "]": b"]", "[": b"[",
        "e": b"e", "2": b"2", "l": b"l", "3": b"3", "m": b"m", "7": b"7", "1": b"1"}  # fmt: skip
ROUND_TRIP_S = 0.2


class Relay(threading.Thread):
    """Hands bytes on between two descriptors, each after `delay` seconds."""

    def __init__(self, near: int, far: int, delay: float) -> None:
        super().__init__(daemon=True)
        self.ends, self.delay = {near: far, far: near}, delay
        self.over = False

    def run(self) -> None:
        """Until an end is closed."""
        held: collections.deque[tuple[float, int, bytes]] = collections.deque()
        while not self.over:
            wait = max(0.0, held[0][0] - time.perf_counter()) if held else 0.2
            try:
                for end in select.select(list(self.ends), [], [], wait)[0]:
                    data = os.read(end, 1 << 16)
                    held.append((time.perf_counter() + self.delay, self.ends[end], data))
                while held and held[0][0] <= time.perf_counter():
                    _, end, data = held.popleft()
                    while data:
                        data = data[os.write(end, data) :]
            except OSError:
                return


def main() -> int:
    """Press each key some times and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--size", default="200x60")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    columns, lines = map(int, args.size.split("x"))
    with closing(Terminal(["view", str(args.log)], columns=columns, lines=lines)) as terminal:
        near, far = pty.openpty()
        for end in (near, far):
            tty.setraw(end)
        relay = Relay(far, terminal.fd, ROUND_TRIP_S / 2)
        terminal.fd, viewer = near, terminal.fd
        relay.start()
        assert terminal.wait("Sequential|zero_grad", 60) is not None
        terminal.wait(r"(?:Findings \d+|No findings) [^,]", 120)
        terminal.settle(1.0)
        told = "| key | answered, without the round trip | bytes |\n|---|---|---|\n"
        for name, sent in KEYS.items():
            took, nbytes = [], []
            for _ in range(args.turns):
                terminal.nbytes = 0
                answer = terminal.answer(sent, 2.0, quiet=0.4)
                if answer is not None:
                    took.append(answer.first - ROUND_TRIP_S)
                    nbytes.append(terminal.nbytes)
            if took:
                told += (
                    f"| `{name}` | {statistics.median(took) * 1e3:.0f} ms, at most "
                    f"{max(took) * 1e3:.0f} ms | {statistics.median(nbytes):.0f}, at most "
                    f"{max(nbytes)} |\n"
                )
        sys.stdout.write(told)
        relay.over = True
        relay.join()
        terminal.fd = viewer
        for end in (near, far):
            os.close(end)
    return 0


if __name__ == "__main__":
    sys.exit(main())
