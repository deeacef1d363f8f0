"""Places on the command line that the log does not have: one sentence before there is a screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tensortrace.cli import main
from tensortrace.errors import UsageError
from tensortrace.records import Module
from tensortrace.run import Run, open_run
from tensortrace.tui import asked
from tensortrace.tui.asked import check_place
from tests.benchmarks.terminal import Terminal
from tests.builders import write_log
from tests.tui.samples import BAD_STEP, make_log, records


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with closing(open_run(make_log(tmp_path))) as opened:
        yield opened


@pytest.mark.parametrize(
    ("step", "finding", "module"),
    [(0, None, None), (9, None, None), (None, "tt402", None), (None, f"f{BAD_STEP}-10", None),
     (None, None, "blocks.0.mlp"), (None, None, ""), (3, "TT101", "head"), (None, None, None)],
)  # fmt: skip
def test_what_the_log_has_is_opened(
    run: Run, step: int | None, finding: str | None, module: str | None
) -> None:
    check_place([run], step, finding, module)


@pytest.mark.parametrize(
    ("step", "finding", "module", "told"),
    [
        (10, None, None, "no step 10 in .*: it has steps 0 to 9"),
        (-1, None, None, "no step -1 in "),
        (None, "TT999", None, "no finding 'TT999' in .*: `tensortrace report` lists"),
        (None, None, "block.0.mlp", "no module 'block.0.mlp' in .* Closest: 'blocks.0.mlp'"),
        (None, None, "\x1b]0;x", r"no module '\\x1b\]0;x' in "),
    ],
)
def test_what_the_log_does_not_have_is_refused_in_a_sentence(
    run: Run, step: int | None, finding: str | None, module: str | None, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        check_place([run], step, finding, module)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_a_module_is_found_wherever_its_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    late = Module(step=9, path='late "one"\x1b', cls="Linear")
    with closing(open_run(make_log(tmp_path, late))) as run:
        monkeypatch.setattr(asked, "CHUNK", chunk)
        monkeypatch.setattr(Run, "modules", {})
        check_place([run], None, None, late.path)
        with pytest.raises(UsageError):
            check_place([run], None, None, "late")


def test_one_rank_that_has_the_place_is_enough(tmp_path: Path, run: Run) -> None:
    (tmp_path / "other").mkdir()
    with closing(open_run(make_log(tmp_path / "other", steps=20))) as other:
        check_place([run, other], 19, None, None)


def test_of_a_run_that_is_not_over_the_place_may_come(tmp_path: Path) -> None:
    with closing(open_run(write_log(tmp_path / "live.jsonl", records()))) as live:
        check_place([live], 99, "TT999", "nowhere")


@pytest.mark.parametrize("place", ["--step=99", "--module=nope", "--finding=TT999"])
def test_without_a_terminal_it_is_refused_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    assert main(["view", str(make_log(tmp_path)), place]) == 2
    told = capsys.readouterr()
    assert re.fullmatch("tensortrace: no [^\n]*\n", told.err)
    assert not told.out


def test_on_a_terminal_the_sentence_is_all_that_is_written(tmp_path: Path) -> None:
    terminal = Terminal(["view", str(make_log(tmp_path)), "--step", "99"])
    assert terminal.wait("tensortrace: no step 99 in ", 30) is not None
    assert terminal.close() == 2
