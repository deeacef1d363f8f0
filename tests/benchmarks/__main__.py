"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import (
    ENVIRONMENT,
    Cell,
    Way,
    compare,
    tracing,
    untraced,
    without_exponents,
    without_kernel,
)
from tests.benchmarks.table import render, replace_between_markers
from tests.benchmarks.workloads import NAMES, build, gpt2_origin

_README = Path(__file__).parent.parent.parent / "README.md"
_EXAMPLES = """examples:
  python -m tests.benchmarks --quick                  three pairs each, a minute or two
  python -m tests.benchmarks --workloads lstm --rows full auto
  python -m tests.benchmarks --peers --json all.json  other tools too, where installed
  python -m tests.benchmarks --readme --pairs 5       into the README
  python -m tests.benchmarks --kernel                 the statistics alone, both kernels
  python -m tests.benchmarks --lines                  source lines, beside the snoopers
  python -m tests.benchmarks --curve docs/cost.svg    by how long a step takes, a picture
  python -m tests.benchmarks --gpu                    the same on a GPU, launches and waits too

Ratios are CPU time, one thread: median and quartiles over pairs of turns. Differences below those
of the first row (nothing against nothing) are noise. The table goes to stdout, progress to stderr.
"""
_ROWS: dict[str, tuple[str, Way]] = {
    "aa": ("nothing against nothing (noise)", untraced),
    "full": ("`trace(every=1)`", tracing(every=1)),
    "op": ('`trace(every=1, level="op")`', tracing(every=1, level="op")),
    "auto": ('`trace()`, `every="auto"`, after step 1000', tracing(every="auto", after=1001)),
    "torch": ("`trace(every=1)` without the compiled kernel", without_kernel(tracing(every=1))),
    "plain": ("`trace(every=1)` without `exponents`", without_exponents(tracing(every=1))),
    "light": ('`trace(every=1, stats="light")`', tracing(every=1, stats="light")),
    "minmax": ('`trace(every=1, stats="minmax")`', tracing(every=1, stats="minmax")),
    "none": ('`trace(every=1, stats="none")`', tracing(every=1, stats="none")),
    "every": ("`trace(every=10)`, after step 1000", tracing(every=10, after=1001)),
    "steps": ("`trace(steps=range(100))`, after step 1000", tracing(steps=range(100), after=1001)),
    "modules": ('`trace(every=1, modules="")`, the model alone', tracing(every=1, modules="")),
}


def main() -> int:
    """Measure what was asked for and print it."""
    args = _parse()
    if args.gpu and not _has_gpu():
        return 2
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # Allocator settings hold from the start of a process only.
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]])
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.kernel:
        return _print_kernels()
    if args.lines:
        from tests.benchmarks.lines import print_lines

        print_lines(args.pairs or (3 if args.quick else 12))
        print(f"CPU time, one thread, {_processor()}")
        return 0
    pairs = args.pairs or (3 if args.quick else 12)
    if args.gpu:
        from tests.benchmarks.gpu import machine, print_gpu

        print_gpu(args.workloads, pairs)
        print(f"wall time, median and quartiles of {pairs} pairs; {machine()}, {_processor()}")
        return 0
    if args.curve:
        return _draw_curve(args.curve, pairs)
    cells, extra = _measure(args, pairs)
    table = render(cells, extra)
    words = _words(pairs)
    print(f"{table}\n{words}")
    result = {"machine": words, "cells": [cell.as_json() for cell in cells], **extra}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if args.readme:
        text = replace_between_markers(_README.read_text("utf-8"), f"{table}\n{words}\n")
        _README.write_text(text, "utf-8")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure what tracing costs, side by side with untraced training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="three pairs instead of twelve")
    parser.add_argument("--pairs", type=int, help="how many pairs a cell has")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rows", nargs="*", choices=tuple(_ROWS), default=tuple(_ROWS))
    parser.add_argument("--peers", action="store_true", help="other tools too, where installed")
    parser.add_argument("--no-extra", action="store_true", help="neither memory nor checks")
    parser.add_argument("--lines", action="store_true", help="source lines, beside the snoopers")
    parser.add_argument("--kernel", action="store_true", help="the statistics alone")
    parser.add_argument("--gpu", action="store_true", help="on a GPU: time, launches, waits")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="draw cost by step time: SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    return parser.parse_args()


def _has_gpu() -> bool:
    import torch

    from tests.benchmarks.gpu import NO_GPU

    found = torch.cuda.is_available()
    if not found:
        _say(NO_GPU)
    return found


def _print_kernels() -> int:
    from tensortrace.capture import compiled
    from tests.benchmarks.kernel import kernel_call_us, kernel_table

    print(kernel_table())
    call = kernel_call_us()
    if compiled.kernel is not None and call is not None:
        print(f"compiled ({compiled.kernel.INSTRUCTIONS}): {call:.2f} us a call by itself")
    print(f"one thread, {_processor()}")
    return 0


def _draw_curve(file: Path, pairs: int) -> int:
    from tests.benchmarks.curve import draw, measure_curve

    ways = [("every=1", _ROWS["full"][1]), ("auto, after step 1000", _ROWS["auto"][1])]
    points = []
    for point in measure_curve(ways, pairs):
        points.append(point)
        _say(f"{point.family}, {point.way}: {point.ratio:.3f} of {point.base_ms:.3g} ms")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(draw(points, _words(pairs)), "utf-8")
    return 0


def _measure(args: argparse.Namespace, pairs: int) -> tuple[list[Cell], dict[str, Any]]:
    ways = [_ROWS[key] for key in args.rows] + (_peers() if args.peers else [])
    cells = []
    for title, way in ways:
        for name in args.workloads:
            start = time.monotonic()
            try:
                cell = compare(partial(build, name), title, way, pairs)
            except ImportError as error:
                _say(f"{title}: skipped, {error}")
                break
            except Exception as error:
                if way in {row[1] for row in _ROWS.values()}:
                    raise
                _say(f"{name:7s} {title}: failed, {type(error).__name__}: {error!s:.200}")
                continue
            cells.append(cell)
            low, high = cell.quartiles
            _say(
                f"{name:7s} {title}: {cell.median:.3f} [{low:.3f}-{high:.3f}] of "
                f"{cell.base_ms:.1f} ms, {cell.bytes_per_step / 1e3:.1f} kB a step "
                f"({time.monotonic() - start:.0f} s)"
            )
    extra: dict[str, Any] = {}
    if not args.no_extra:
        extra = _measure_extra(args.workloads)
    return cells, extra


def _measure_extra(names: list[str]) -> dict[str, Any]:
    from tests.benchmarks.costs import check_ms, peak_mib

    peaks, checks = {}, {}
    for name in names:
        peaks[name] = (peak_mib(name, False), peak_mib(name, True))
        plain, traced = peaks[name]
        _say(f"{name:7s} peak memory, MiB: {plain:.0f} untraced, {traced:.0f} traced")
        checks[name] = check_ms(name)
        parts = ", ".join(f"{code} {ms:.3f}" for code, ms in checks[name].items())
        _say(f"{name:7s} ms a step by check: {parts}")
    return {"peak_mib": peaks, "check_ms": checks}


def _peers() -> list[tuple[str, Way]]:
    peers = importlib.import_module("tests.benchmarks.peers").PEERS
    for peer in peers:
        if peer.missing:
            _say(f"{peer.name}: skipped, {peer.needs} is not installed")
    return [(peer.name, peer.way) for peer in peers if not peer.missing]


def _words(pairs: int) -> str:
    import torch

    from tensortrace.capture.compiled import kernel_name

    return (
        f"CPU time, one thread, median and quartiles of {pairs} pairs; {_processor()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; GPT-2 {gpt2_origin()}; "
        f"statistics by the {kernel_name()} kernel."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
