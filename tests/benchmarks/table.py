"""The table of the README, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tests.benchmarks.measure import Cell
from tests.benchmarks.workloads import NAMES

BEGIN = "<!-- benchmarks: written by `python -m tests.benchmarks --readme` -->"
END = "<!-- end of benchmarks -->"
_HEADS = {"mlp": "MLP", "resnet": "ResNet-18", "gpt2": "GPT-2", "lstm": "LSTM, unrolled"}


def render(cells: Iterable[Cell], extra: Mapping[str, Any]) -> str:
    """Lay out the cells, a row per way, median and quartiles; Markdown."""
    by_place = {(cell.way, cell.workload): cell for cell in cells}
    names = [name for name in NAMES if any(at[1] == name for at in by_place)]
    lines = [
        f"| step time traced / untraced | {' | '.join(_HEADS[name] for name in names)} |",
        "|---|" + "---|" * len(names),
    ]
    for way in dict.fromkeys(at[0] for at in by_place):
        texts = [_ratio(by_place.get((way, name))) for name in names]
        lines.append(f"| {way} | {' | '.join(texts)} |")
    for title, values in _rows(list(by_place.values()), extra).items():
        lines.append(f"| {title} | {' | '.join(values.get(name, '-') for name in names)} |")
    return "\n".join(lines) + "\n"


def replace_between_markers(text: str, table: str) -> str:
    """Put a table where an older one is.

    Raises:
        ValueError: the markers are not there, or not once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs one line {BEGIN!r} and one {END!r}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def _ratio(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    low, high = cell.quartiles
    return f"**{cell.median:.2f}** {low:.2f}-{high:.2f}"


def _rows(cells: list[Cell], extra: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What is no ratio: the step itself, the log, memory, the checks."""
    full = {cell.workload: cell for cell in cells if cell.way == "`trace(every=1)`"}
    thin = {cell.workload: cell for cell in cells if 'every="auto"' in cell.way}
    rows = {
        "untraced step, ms": {n: f"{c.base_ms:.3g}" for n, c in full.items()},
        "log, kB a step, `every=1`": {n: f"{c.bytes_per_step / 1e3:.3g}" for n, c in full.items()},
        "log, kB a step, thinned": {n: f"{c.bytes_per_step / 1e3:.3g}" for n, c in thin.items()},
    }
    peaks = extra.get("peak_mib", {})
    rows["peak memory, MiB more"] = {
        n: f"{traced - untraced:.0f} (of {untraced:.0f})" for n, (untraced, traced) in peaks.items()
    }
    checks = extra.get("check_ms", {})
    rows["all checks, share of the step"] = {
        n: f"{sum(values.values()) / full[n].base_ms:.1%}"
        for n, values in checks.items()
        if n in full
    }
    return {title: values for title, values in rows.items() if values}
