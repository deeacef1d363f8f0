"""A realistic log of any size: ``python -m tests.benchmarks.biglog big.jsonl --gb 1``.

A small transformer is traced for some steps, as any program is; its steps are then written again
and again under new numbers, with a loss that falls, a gradient norm that wanders and now and then a
finding, until the file is as large as was asked for. So every line is one that the tracer writes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tensortrace.log import decode, encode
from tensortrace.records import End, Finding, Header, Record, Step
from tests.builders import make_finding

# Steps that are traced; the first ones differ, since modules are described in them.
TRACED, STEADY = 12, 4
FINDINGS_EVERY = 97
LOSS_GOES = 0.6
CODES = (("TT201", "exploding-gradient", "warning"), ("TT202", "vanishing-gradient", "note"),
         ("TT403", "bad-initialisation", "warning"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Traced:
    """What was traced: the lines before the steady steps, then each steady step.

    A steady step is its lines split where its number stands, and its step line as a record.
    """

    head: bytes
    full: Sequence[list[bytes]]
    thin: Sequence[list[bytes]]
    last: Sequence[Step]


def traced() -> Traced:
    """Trace a transformer of six layers for a few steps on one thread."""
    import torch
    from torch import nn

    from tensortrace import trace

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    net = nn.Sequential(nn.Linear(16, 64), nn.TransformerEncoder(layer, 6), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    out = io.BytesIO()
    with trace(out=out, every=1, checks=()) as t:
        for _ in range(TRACED):
            optimizer.zero_grad()
            net(torch.randn(4, 10, 16)).square().mean().backward()
            optimizer.step()
            t.step()
    lines = [(decode(line), line + b"\n") for line in out.getvalue().splitlines()]
    steps = [
        [pair for pair in held if not isinstance(pair[0], End)]
        for _, held in (
            (n, list(g)) for n, g in itertools.groupby(lines, lambda pair: step_of(*pair))
        )
    ]
    steady = steps[STEADY:TRACED]
    return Traced(
        b"".join(line for held in steps[:STEADY] for _, line in held),
        [split(held, thin=False) for held in steady],
        [split(held, thin=True) for held in steady],
        [next(r for r, _ in held if isinstance(r, Step)) for held in steady],
    )


def step_of(record: object, line: bytes) -> int:
    """The step that a line says."""
    assert isinstance(record, Record), line
    return record.step


def split(held: Sequence[tuple[object, bytes]], *, thin: bool) -> list[bytes]:
    """Split the lines of a step where its number stands; its step line is left out."""
    text = b"".join(
        line
        for record, line in held
        if not isinstance(record, Step) and (not thin or b'"optimizer"' in line[:30])
    )
    assert isinstance(held[0][0], Record)
    return text.split(b'"step":%d,' % held[0][0].step)


def steps_of(log: Traced, start: int, thin: int, findings_every: int) -> Iterator[bytes]:
    """Write one step after another, for ever: one full, then `thin` that are not."""
    for number in itertools.count(start):
        at = number % len(log.full)
        full = number % (thin + 1) == 0
        pieces = (log.full if full else log.thin)[at]
        yield (b'"step":%d,' % number).join(pieces)
        if number % findings_every == findings_every - 1:
            yield encode(finding(number, number // findings_every))
        yield encode(last_line(log.last[at], number, full))


def finding(number: int, nth: int) -> Finding:
    """One finding; the codes take turns."""
    code, check, severity = CODES[nth % len(CODES)]
    module = f"1.layers.{nth % 6}"
    message = f"norm {1 + nth % 9}.1e3 is {20 + nth % 70}x the median 53 (limit 20x)"
    return make_finding(f"f{nth}", step=number, code=code, check=check, severity=severity,
                        module=module, seq=9, message=message)  # fmt: skip


def last_line(like: Step, number: int, full: bool) -> Step:
    """The step line of a step, like one that was traced."""
    wave = math.sin(number / 40)
    return msgspec.structs.replace(
        like, step=number, update=number + 1, full=full, loss=2 / (1 + number / 200) + 0.1 * wave,
        grad_norm=1 + 0.5 * wave + (8 if number % 331 == 0 else 0),
    )  # fmt: skip


def write_big_log(
    path: Path,
    nbytes: int,
    *,
    thin: int = 0,
    rank: tuple[int, int] = (0, 1),
    every: int | None = None,
) -> int:
    """Write a log of about `nbytes`.

    Args:
        path: is overwritten.
        nbytes: the log ends with the step that reaches it.
        thin: so many thinned steps follow each full one.
        rank: the rank and the world size that its header says.
        every: a finding every so many steps.
    Returns:
        How many steps it has.
    """
    log = traced()
    number = STEADY
    with path.open("wb") as file:
        header = decode(log.head.partition(b"\n")[0])
        assert isinstance(header, Header)
        # A process that is gone, so that the log is no live one.
        header = msgspec.structs.replace(header, rank=rank[0], world_size=rank[1], hostname="node")
        written = file.write(encode(header) + log.head.partition(b"\n")[2])
        for piece in steps_of(log, STEADY, thin, every or FINDINGS_EVERY):
            written += file.write(piece)
            if piece.startswith(b'{"kind":"step"'):
                number += 1
                if written >= nbytes:
                    break
        file.write(encode(End(step=number, why="exit")))
    return number


def main() -> int:
    """Write one log and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--thin", type=int, default=0, help="thinned steps after each full one")
    args = parser.parse_args()
    began = time.monotonic()
    steps = write_big_log(args.path, int(args.gb * 1e9), thin=args.thin)
    told = f"{steps} steps, {args.path.stat().st_size:,} bytes in {time.monotonic() - began:.1f} s"
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
