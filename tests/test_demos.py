"""Every demo runs in a process of its own and is held to the `Expect:` lines of its docstring.

A line reads `Expect: CODE PLACE step N`, one for each error or warning in the log, in order, or
`Expect: nothing`. The place is the parameter, else the module, else the op; `(root)` is the model.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tensortrace.records import Finding
from tensortrace.run import open_run

ROOT = Path(__file__).parent.parent
DEMOS = sorted((ROOT / "demos").glob("*.py"))
# What README shows of a demo: the command, and all that it prints.
README = (ROOT / "README.md").read_text("utf-8")
STORIES = re.findall(
    r"^```text\n\$ python (demos/\w+\.py)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
)
LONGEST = 60


def docstring(demo: Path) -> str:
    return ast.get_docstring(ast.parse(demo.read_text("utf-8"))) or ""


def expected(demo: Path) -> list[str]:
    lines = re.findall(r"^Expect: (.+)$", docstring(demo), re.MULTILINE)
    return [] if lines == ["nothing"] else lines


def found(finding: Finding) -> str:
    place = finding.param or (
        finding.module or "(root)" if finding.module is not None else finding.op
    )
    return f"{finding.code} {place or '-'} step {finding.step}"


# torch 2.6 leaves a temporary folder to the end of the process.
TORCHS_OWN = "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"


def run(demo: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, demo, *arguments, stderr=bool(arguments))


def python(
    folder: Path, *command: str | Path, stderr: bool = False
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-u", "-W", "error", "-W", TORCHS_OWN, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if stderr else subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.stem)
def test_demo_finds_what_it_expects_and_nothing_else(demo: Path, tmp_path: Path) -> None:
    done = run(demo, tmp_path, "run.jsonl")
    # A demo of TT801 ends as its program would without tracing: by an exception.
    raises = any(line.startswith("TT801") for line in expected(demo))
    assert done.returncode == int(raises), done.stderr
    assert ("Traceback (most recent call last)" in done.stderr) == raises

    log = open_run(tmp_path / "run.jsonl")
    list(log.index())
    assert log.end is not None
    assert log.end.why == ("exception" if raises else "exit")
    serious = [finding for finding in log.findings if finding.severity != "note"]
    assert [found(finding) for finding in serious] == expected(demo)
    for finding in serious:
        assert finding.message in done.stderr


@pytest.mark.parametrize(("demo", "shown"), STORIES, ids=[demo for demo, _ in STORIES])
def test_readme_shows_what_a_demo_prints_line_for_line(
    demo: str, shown: str, tmp_path: Path
) -> None:
    printed = run(ROOT / demo, tmp_path).stdout.replace(f"{ROOT}{os.sep}", ".../")
    assert printed.splitlines() == shown.splitlines()


def test_readme_tells_three_stories() -> None:
    assert len(STORIES) == 3


def shown(head: str) -> str:
    """The first text that a section of README shows."""
    found = re.search(rf"^#+ {head}\n.*?^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_readme_shows_what_the_demo_of_the_package_prints(tmp_path: Path) -> None:
    printed = python(tmp_path, "-m", "tensortrace", "demo").stdout
    assert printed.replace(f"{ROOT}{os.sep}", ".../") == shown("In two commands")


def test_readme_shows_the_listing_of_a_demo(tmp_path: Path) -> None:
    def timeless(listing: str) -> str:
        return re.sub(r"[\d.]+ [num]?s +\d+(?=  )", lambda time: " " * len(time[0]), listing)

    run(ROOT / "demos/lines_padding.py", tmp_path, "log.jsonl")
    asked, written = shown("Line by line").split("\n", 1)
    printed = python(tmp_path, "-m", *asked.removeprefix("$ ").split()).stdout
    assert timeless(printed.replace(f"{ROOT}{os.sep}", "")) == timeless(written)


def test_readme_shows_lines_of_a_demo_as_they_are_told(tmp_path: Path) -> None:
    def timeless(text: str) -> str:
        return re.sub(r"\d\d:\d\d:\d\d\.\d{6}", "", text)

    (told,) = re.findall(r"`demos/lines_depth.py` prints:\n\n```text\n(.*?)```", README, re.DOTALL)
    assert timeless(told) in timeless(run(ROOT / "demos/lines_depth.py", tmp_path).stdout)


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.stem)
def test_demo_is_short_and_says_last_what_to_expect(demo: Path) -> None:
    assert len(demo.read_text("utf-8").splitlines()) <= LONGEST
    assert re.search(r"\n\n(Expect: .+\n?)+$", docstring(demo)), "no Expect line at the end"


def test_demos_cover_faults_and_healthy_programs() -> None:
    codes = {line.split()[0] for demo in DEMOS for line in expected(demo)}
    assert codes >= {"TT101", "TT102", "TT201", "TT202", "TT401", "TT801"}
    assert sum(expected(demo) == [] for demo in DEMOS) >= 4
