"""What an import drags in: recording knows no screen, reading knows no torch.

The import contracts in pyproject.toml are about the text of the imports; these tests import in a
fresh interpreter and look at what is there afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import walk_packages

import pytest

import tensortrace

ROOT = Path(__file__).parent.parent
PROGRAM = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(*names: str, then: str = "") -> set[str]:
    """Import modules in a fresh interpreter; returns the top-level packages that are loaded."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("\nprint", f"\n{then}\nprint"), *names],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(*packages: str) -> list[str]:
    """The modules of some packages, those that need an optional framework left out."""
    found = walk_packages(tensortrace.__path__, "tensortrace.")
    return [m.name for m in found if f"{m.name}.".startswith(tuple(f"{p}." for p in packages))]


READING = modules_of(
    "tensortrace.records", "tensortrace.text", "tensortrace.log", "tensortrace.run",
    "tensortrace.checks", "tensortrace.export", "tensortrace.cli",
)  # fmt: skip


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = imported("tensortrace")
    assert not loaded & {"torch", "textual", "rich", "numpy", "msgspec", "pysnooper"}


def test_reading_loads_neither_torch_nor_textual() -> None:
    assert len(READING) >= 7
    assert not imported(*READING) & {"torch", "textual", "pysnooper", "torchsnooper"}


def test_the_viewer_does_not_load_torch() -> None:
    assert not imported(*modules_of("tensortrace.tui")) & {"torch", "pysnooper", "torchsnooper"}


def test_recording_loads_no_screen() -> None:
    # The one that needs Triton is imported when the first CUDA tensor is met.
    recording = [m for m in modules_of("tensortrace.capture") if not m.endswith(".cuda.kernel")]
    loaded = imported(*recording, then="from tensortrace import trace")
    assert "torch" in loaded
    assert not loaded & {"textual", "rich"}


def test_command_line_says_its_help_without_torch_textual_or_rich() -> None:
    quiet = "with contextlib.redirect_stdout(None): tensortrace.cli.main(['--help'])"
    loaded = imported("tensortrace.cli", then=f"import contextlib, tensortrace.cli\n{quiet}")
    assert not loaded & {"torch", "textual", "rich"}


@pytest.mark.parametrize(
    ("line", "package"),
    [("import torch", "torch"), ("import textual.app", "textual"), ("import rich", "rich")],
)
def test_these_tests_would_see_an_import(line: str, package: str) -> None:
    assert package in imported("tensortrace", then=line)
