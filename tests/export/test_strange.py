"""Logs that another program wrote, or nobody meant: every exporter makes something of them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tensortrace.export.csv import NAMES
from tensortrace.export.exporter import Wanted, all_exporters
from tensortrace.log import encode
from tensortrace.run import open_run
from tests.export.canonical import make_canonical
from tests.export.page import assert_harmless

LINES = [json.loads(encode(record)) for record in make_canonical()]
VALUES = [
    None, 0, -1, 1e308, -1e308, 5e-324, 1e-300, 2**53, 10**30, -(2**60), 3.5, True, "NaN",
    "Infinity", "-Infinity", "", "<b>", "\x1b[31m", "a.b.c", [], {}, [None], [["a", 1]], {"a": 1},
]  # fmt: skip


def changed(value: Any, choice: random.Random, share: float) -> Any:
    """Put something else in the place of some values of a line."""
    if choice.random() < share:
        return choice.choice(VALUES)
    if isinstance(value, dict):
        return {k: v if k == "kind" else changed(v, choice, share) for k, v in value.items()}
    return [changed(v, choice, share) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_log_holds_every_exporter_writes(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    share = choice.choice([0.003, 0.01, 0.03])
    lines = [LINES[0], *(changed(line, choice, share) for line in LINES[1:])]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    run = open_run(log)
    for exporter in all_exporters():
        for what in exporter.parts or (None,):
            out = io.StringIO()
            exporter.write([run], Wanted(what=what), out)
            if exporter.suffix == ".html":
                assert_harmless(out.getvalue())
            if what in NAMES:
                assert out.getvalue().startswith(",".join(NAMES[what]))


def test_numbers_at_the_ends_of_their_range_are_drawn(tmp_path: Path) -> None:
    line: dict[str, Any] = {"kind": "step", "seq": 1, "modules": {
        "path": ["a", "b", "c"], "grad_rms": [1.7976931348623157e308, 5e-324, 1.0],
        "zero_frac": [1e308, -1e308, 0.5], "flags": ["", "", ""]}}  # fmt: skip
    ends = [line | {"step": i, "loss": x} for i, x in enumerate([1.7976931348623157e308, 5e-324])]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(x, separators=(",", ":")) + "\n" for x in [LINES[0], *ends]))
    out = io.StringIO()
    choose = next(one for one in all_exporters() if one.suffix == ".html")
    choose.write([open_run(log)], Wanted(), out)
    assert assert_harmless(out.getvalue()).text().count("log scale") >= 2
