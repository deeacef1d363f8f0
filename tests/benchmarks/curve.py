"""What tracing costs by how long an untraced step takes, as a picture to read one's own cost off.

Two families of models with the same calls and records in every size: few modules (the MLP, 9 calls
a step) and many (the GPT-2, 77). In each the cost of records is the same for all sizes, and that of
statistics grows with the tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from xml.sax.saxutils import escape

from tests.benchmarks.measure import Way, compare
from tests.benchmarks.workloads import GPT2_SIZES, MLP_WIDTHS, Workload, build_gpt2, build_mlp

_TURN_S = 0.2
_FAMILIES: dict[str, Sequence[Callable[[], Workload]]] = {
    "MLP, 9 module calls": [partial(build_mlp, width) for width in MLP_WIDTHS],
    "GPT-2, 77 module calls": [partial(build_gpt2, *size) for size in GPT2_SIZES],
}


@dataclass(frozen=True, slots=True)
class Point:
    """One size of one family: untraced milliseconds a step, and the ratio of CPU time."""

    family: str
    way: str
    base_ms: float
    ratio: float


def measure_curve(ways: Iterable[tuple[str, Way]], pairs: int) -> Iterator[Point]:
    """Compare each way with untraced on all sizes of both families."""
    for way_name, way in ways:
        for family, builders in _FAMILIES.items():
            for build in builders:
                steps = _steps_for(build())
                cell = compare(lambda b=build, n=steps: replace(b(), steps=n), way_name, way, pairs)
                yield Point(family, way_name, cell.base_ms, cell.median)


def _steps_for(work: Workload) -> int:
    """How many steps last long enough to be timed."""
    work.step()
    start = time.process_time()
    work.step()
    return max(1, min(400, round(_TURN_S / (time.process_time() - start + 1e-9))))


# ---- the picture

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 400, 60, 20, 44, 48
_MS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_RATIOS = (1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5)
# Okabe and Ito's colours, told apart by colour-blind readers too; and by dashes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DASHES = ("", "6 4")


def draw(points: Sequence[Point], words: str) -> str:
    """Draw the points as an SVG: overhead upwards, both scales logarithmic.

    Args:
        points: of one line each by family and way.
        words: what was measured on what; below the picture.
    """
    top = max([*(p.ratio for p in points), 1.2])
    ratios = [r for r in _RATIOS if r <= top * 1.3]

    def x(ms: float) -> float:
        share = math.log(ms / _MS[0]) / math.log(_MS[-1] / _MS[0])
        return _LEFT + min(1.0, max(0.0, share)) * (_WIDTH - _LEFT - _RIGHT)

    def y(ratio: float) -> float:
        # Of what is added, so that 2 % and 20 % are as far apart as 20 % and 200 %.
        low, high = math.log(0.01), math.log(max(ratios[-1], top) - 1)
        share = (math.log(max(ratio - 1, 0.01)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" role="img">',
        f"<title>Step time traced / untraced, by untraced step time. {escape(words)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
    ]
    for ms in _MS:
        parts.append(_line((x(ms), _TOP), (x(ms), _HEIGHT - _BOTTOM)))
        text = "1 s" if ms == 1000 else f"{ms:g} ms"
        parts.append(_text(x(ms), _HEIGHT - _BOTTOM + 16, text, "middle"))
    for ratio in ratios:
        parts.append(_line((_LEFT, y(ratio)), (_WIDTH - _RIGHT, y(ratio))))
        parts.append(_text(_LEFT - 6, y(ratio) + 4, f"{ratio:g}", "end"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "untraced step", "middle"))
    lines = list(dict.fromkeys((p.family, p.way) for p in points))
    families, ways = (list(dict.fromkeys(column)) for column in zip(*lines, strict=True))
    for i, (family, way) in enumerate(lines):
        mine = sorted((p.base_ms, p.ratio) for p in points if (p.family, p.way) == (family, way))
        colour = _COLOURS[ways.index(way) % len(_COLOURS)]
        dash = _DASHES[families.index(family) % len(_DASHES)]
        path = " ".join(f"{x(ms):.1f},{y(ratio):.1f}" for ms, ratio in mine)
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {style}/>')
        for ms, ratio in mine:
            told = f"<title>{escape(f'{family}, {way}: {ms:.3g} ms, {ratio:.2f}')}</title>"
            place = f'cx="{x(ms):.1f}" cy="{y(ratio):.1f}" r="3.5"'
            parts.append(f'<circle {place} fill="{colour}">{told}</circle>')
        across, down = _LEFT + (i % 2) * 350, 14 + (i // 2) * 16
        sample = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(_line((across, down - 4), (across + 30, down - 4), sample))
        parts.append(_text(across + 36, down, f"{way}: {family}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(
    start: tuple[float, float], end: tuple[float, float], style: str = 'stroke="#ddd"'
) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
