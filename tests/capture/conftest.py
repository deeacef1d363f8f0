"""Where tests of decorated functions run, and packages that pip has installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
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


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Make a package of a text, where pip leaves one."""

    def write(text: str) -> ModuleType:
        file = tmp_path / "site-packages" / "package.py"
        file.parent.mkdir()
        file.write_text(text, "utf-8")
        spec = importlib.util.spec_from_file_location("package", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "package", module)
        spec.loader.exec_module(module)
        return module

    return write
