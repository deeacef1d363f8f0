"""Where an export goes: the right format, whole or not at all, nothing else overwritten."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import pytest

from tensortrace import cli, export
from tensortrace.errors import UsageError
from tensortrace.export.exporter import Exporter, Wanted, all_exporters, choose
from tensortrace.export.saving import save
from tensortrace.run import Run, open_run
from tests.builders import make_header
from tests.export.canonical import make_calls, make_canonical, make_step, write_log

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_log(Path("log.jsonl"), make_canonical())
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["export", *argv])
        return code, *capsys.readouterr()

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- formats


def test_every_exporter_of_the_folder_is_found_and_made_what_it_says(
    folder: Path, run: Command
) -> None:
    exporters = all_exporters()
    assert [one.suffix for one in exporters] == [".csv", ".html", ".json", ".txt"]
    for one in exporters:
        target = f"out{one.suffix}"
        assert run("log.jsonl", "-o", target)[0] == 0
        text = (folder / target).read_text("utf-8")
        assert text.startswith(one.beginnings)
        # Its own product is replaced, that of another format is not.
        assert run("log.jsonl", "-o", target)[0] == 0
        for other in exporters:
            (folder / f"other{other.suffix}").write_text(text, "utf-8")
            assert run("log.jsonl", "-o", f"other{other.suffix}")[0] == (0 if other is one else 2)


def test_a_new_file_in_the_folder_is_a_new_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tsv.py"
    file.write_text(
        "from tensortrace.export.exporter import Exporter\n"
        "EXPORTER = Exporter('.tsv', 'tabs', lambda runs, wanted, out: None, ('rank',))\n"
    )
    monkeypatch.setattr(export, "__path__", [*export.__path__, str(tmp_path)])
    assert choose("x.tsv").summary == "tabs"
    monkeypatch.delitem(sys.modules, "tensortrace.export.tsv")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["-o", "run.pdf"], "run.pdf: no format for .pdf files. There are .csv, .html"),
        (["-o", "run"], "run: no suffix says the format"),
        (["-o", "log.jsonl"], "no format for .jsonl files"),
        (["-o", "run.csv", "--what", "rows"], "it has layers, steps, tensors, findings"),
        (["-o", "run.html", "--what", "steps"], "it has no parts to choose from"),
        (["-o", "folder.html"], "folder.html is a folder: give the name of a file in it"),
        (["-o", "nowhere/run.html"], "cannot write nowhere/run.html: No such file or directory"),
        (["-o", "log.html"], "log.html is a tensortrace log and is never replaced"),
        (["-o", "log.html", "--force"], "log.html is a tensortrace log and is never replaced"),
        (["-o", "mine.html"], "mine.html exists and is no .html export of tensortrace"),
        (["-o", "run.html", "--steps", "5:3"], "holds no step"),
        (["-o", "run.html", "--steps", "a"], "--steps 'a' is neither a step nor a range"),
        (["-o", "run.html", "--steps", "7:9"], "no step 7 to 9 in log.jsonl: it has"),
        (["-o", "x\x1b[31m.pdf"], r"x\x1b[31m.pdf: no format"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_exit_2_and_no_file(
    folder: Path, run: Command, argv: list[str], sentence: str
) -> None:
    Path("folder.html").mkdir()
    write_log(Path("log.html"), make_canonical())
    Path("mine.html").write_text("<p>mine</p>")
    before = names(folder)
    code, out, err = run("log.jsonl", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("tensortrace: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert "\x1b" not in err
    assert names(folder) == before
    assert Path("mine.html").read_text() == "<p>mine</p>"


def test_without_a_target_the_page_has_the_name_of_the_log(folder: Path, run: Command) -> None:
    code, out, _ = run("log.jsonl")
    assert code == 0
    assert out.startswith("log.html: ")
    assert out.endswith(" kB\n")
    assert run()[0] == 0  # the newest log here
    assert names(folder) == ["log.html", "log.jsonl"]


def test_standard_output_gets_csv_and_nothing_else(run: Command) -> None:
    code, out, err = run("-o", "-", "--what", "steps")
    assert (code, err) == (0, "")
    assert out.startswith("rank,step,update,")
    assert out.count("\n") == 4


def test_a_glob_that_matches_nothing_is_said(run: Command) -> None:
    code, out, err = run("-o", "-", "--module", "decoder*")
    assert (code, out) == (2, "")
    assert "matches no module" in err


def test_only_the_steps_that_are_wanted_are_in_any_format(folder: Path, run: Command) -> None:
    assert run("-o", "run.json", "--steps", "0")[0] == 0
    document = json.loads(Path("run.json").read_text())
    assert (document["step"], [f["code"] for f in document["findings"]]) == (0, ["TT202", "TT105"])
    assert run("-o", "run.txt", "--steps", "2:7")[0] == 0
    assert "Layers in step 2" in Path("run.txt").read_text()
    assert "TT101" not in Path("run.txt").read_text()


def test_all_ranks_of_a_run_are_exported_by_the_name_they_share(run: Command) -> None:
    for rank in range(2):
        write_log(Path(f"two.rank{rank}.jsonl"), [
            make_header(rank=rank, world_size=2), *make_calls(0), make_step(0)])  # fmt: skip
    _, out, _ = run("two.jsonl", "-o", "-", "--what", "steps")
    assert [line[:3] for line in out.splitlines()] == ["ran", "0,0", "1,0"]
    assert run("two.jsonl")[1].startswith("two.html: ")
    assert run("two.rank1.jsonl")[1].startswith("two.rank1.html: ")
    assert run("two.rank1.jsonl", "two.rank0.jsonl")[1].startswith("two.html: ")


# -- files


def failing(after: str) -> Exporter:
    def write(runs: Sequence[Run], wanted: Wanted, out: TextIO) -> None:
        out.write(after)
        raise KeyboardInterrupt

    return Exporter(".html", "fails", write, ("old",))


def test_an_export_that_is_interrupted_leaves_what_was_there(folder: Path) -> None:
    Path("run.html").write_text("old page")
    with pytest.raises(KeyboardInterrupt):
        save([open_run("log.jsonl")], failing("half"), "run.html", Wanted(), force=False)
    assert Path("run.html").read_text() == "old page"
    assert names(folder) == ["log.jsonl", "run.html"]


def test_a_file_of_the_users_is_replaced_by_force_only(run: Command) -> None:
    Path("run.csv").write_text("a,b\r\n1,2\r\n")
    assert run("-o", "run.csv")[0] == 2
    assert run("-o", "run.csv", "--force")[0] == 0
    assert Path("run.csv").read_text().startswith("rank,")


def test_a_link_stays_and_what_it_points_to_keeps_its_rights(folder: Path, run: Command) -> None:
    Path("target.html").touch()
    Path("target.html").chmod(0o640)
    Path("run.html").symlink_to("target.html")
    assert run("-o", "run.html")[0] == 0
    assert Path("run.html").is_symlink()
    assert Path("target.html").stat().st_size > 1000
    assert stat.S_IMODE(Path("target.html").stat().st_mode) == 0o640


def test_what_is_no_regular_file_is_written_to_and_stays(folder: Path) -> None:
    os.mkfifo("pipe.txt")
    reader = os.open("pipe.txt", os.O_RDONLY | os.O_NONBLOCK)
    assert save([open_run("log.jsonl")], choose("a.txt"), "pipe.txt", Wanted(), force=False) == 0
    assert os.read(reader, 9) == b"log      "
    os.close(reader)
    assert stat.S_ISFIFO(Path("pipe.txt").stat().st_mode)


def test_a_link_that_leads_back_to_itself_is_a_usage_error(folder: Path) -> None:
    Path("loop.html").symlink_to("loop.html")
    with pytest.raises(UsageError, match=r"cannot write loop\.html"):
        save([open_run("log.jsonl")], choose("a.html"), "loop.html", Wanted(), force=True)
