"""Installing from source, with a C compiler and without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = "from tensortrace.capture import compiled; print(compiled.kernel_name())"

pytestmark = pytest.mark.slow
pytest.importorskip("setuptools")

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
HAS_COMPILER = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tree as it would be cloned: nothing built in it."""
    left_out = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "*.so", "*.pyd", "__pycache__", "tests"
    )
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    return tmp_path / "source"


def run(*command: str, cwd: Path, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TENSORTRACE_KERNEL"}
    environment = {**kept, **variables}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(source: Path, **variables: str) -> str:
    """Install into a folder of its own, and say which kernel a program there has."""
    target = str(source.parent / "installed")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--target", target)
    run("-m", "pip", "install", *options, str(source), cwd=source.parent, **variables)
    return run("-c", PROGRAM, cwd=source.parent, PYTHONPATH=target).strip()


def test_install_without_a_compiler_succeeds_and_torch_serves(source: Path) -> None:
    nothing = str(shutil.which("false"))
    assert install(source, CC=nothing, CXX=nothing, LDSHARED=nothing) == "torch"


@HAS_COMPILER
def test_install_with_a_compiler_has_the_kernel(source: Path) -> None:
    assert install(source) == "compiled"
    built = (source.parent / "installed").rglob("*.so")
    assert sorted(path.name for path in built) == ["_statistics.abi3.so", "_turns.abi3.so"]


@HAS_COMPILER
@pytest.mark.parametrize(
    ("flags", "instructions"),
    [("-DTENSORTRACE_NO_AVX2", "any"), ("-DTENSORTRACE_NO_VECTORS", "none")],
)
def test_what_other_machines_would_run_passes_the_same_tests(
    source: Path, flags: str, instructions: str
) -> None:
    assert install(source, CFLAGS=flags) == "compiled"
    installed = str(source.parent / "installed")
    program = "from tensortrace.capture.compiled import _statistics as s; print(s.INSTRUCTIONS)"
    said = run("-c", program, cwd=source.parent, PYTHONPATH=installed)
    assert said.strip() == instructions
    copy = shutil.copy(ROOT / "tests/capture/compiled/test_compiled.py", source.parent)
    # Without the project's settings pytest-asyncio warns that it has none.
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error")
    run("-m", "pytest", *options, str(copy), cwd=source.parent, PYTHONPATH=installed)


def test_source_distribution_holds_the_c_source(source: Path) -> None:
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=source)
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folder = "tensortrace/capture/compiled"
    wanted = {"setup.py", f"{folder}/_statistics.h"}
    for part in ("_statistics", "_turns"):
        wanted |= {f"{folder}/{part}.c", f"{folder}/{part}.pyi"}
    assert wanted <= names
