"""Where tests of decorated functions run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortrace.capture.tracer import Trace


@pytest.fixture
def closing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own; decorated functions keep hooks, which are taken away at the end."""
    monkeypatch.chdir(tmp_path)
    made: list[Trace] = []
    real = Trace.__init__

    def init(self: Trace, options: Any) -> None:
        made.append(self)
        real(self, options)

    monkeypatch.setattr(Trace, "__init__", init)
    yield tmp_path
    for one in made:
        one.close()
