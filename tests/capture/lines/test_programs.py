"""Edge programs with every line of theirs followed: same results to the bit, no fault of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensortrace import Lines, trace
from tests.capture.lines.lines_of import Seen
from tests.test_edge_programs import compare, parameters

# Live text too, so that every value is put into words at once.
LINES = Lines(depth=6, statistics=True, output=lambda text: None)


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", parameters())
def test_an_edge_program_runs_the_same_line_by_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = Seen()

    def tracer() -> Any:
        return trace(out=seen.take, lines=LINES, every=1)

    compare(name, tracer)
    assert not seen.faults, seen.faults[0]
