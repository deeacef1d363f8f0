from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortrace import cli
from tensortrace.records import Location, Variable
from tests.builders import make_header, make_run
from tests.export.canonical import make_step, write_log
from tests.export.hostile import FORBIDDEN, PAYLOADS
from tests.export.listed import FILE, TEXT, make_line, make_listed, make_plain
from tests.test_cli import COMMAND, environment, in_a_terminal


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def log() -> Path:
    return write_log(Path("log.jsonl"), make_listed())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["lines", *argv])
        return code, *capsys.readouterr()

    return call


def test_lines_of_the_newest_log_are_printed_although_it_has_an_error(log: Path, run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out.startswith("log.jsonl: steps 0 to 2, 3 of them with lines\n")
    assert "logits [8, 128→97, 64] f32" in out


def test_a_step_a_range_and_a_function_can_be_chosen(log: Path, run) -> None:
    assert "logits [8, 97, 64] f32" in run("log.jsonl", "--step", "2")[1]
    assert "logits [8, 128, 64] f32" in run("log.jsonl", "--step", "0:1")[1]
    out = run("log.jsonl", "--function", "forward")[1]
    assert "Net.forward" in out
    assert "train_step" not in out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--step", "9"], "no step 9 in log.jsonl: it has steps 0 to 2."),
        (["--step", "x"], "neither a step nor a range of steps"),
        (["--step", "3:"], "neither a step nor a range of steps"),
        (["--step", "-1"], "neither a step nor a range"),
        (["--step", "²"], "neither a step nor a range"),
        (["--step", "2:1"], "holds no step"),
        (["--step", "9" * 30], "holds no step"),
        (["--function", "foward"], "Closest: Net.forward."),
        (["--function", "\x1b]0;x\x07"], "no function '\\x1b]0;x\\x07'"),
        (["--write", "log.jsonl"], "log.jsonl is a file: name the log first"),
        (["gone.jsonl"], "gone.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(
    log: Path, run, argv: list[str], sentence: str
) -> None:
    code, out, err = run(
        *(["log.jsonl"] if argv[0].startswith("--") and "write" not in argv[0] else []), *argv
    )
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not FORBIDDEN.search(err)


def test_the_json_document_is_one(log: Path, run) -> None:
    code, out, _ = run("log.jsonl", "--json")
    assert code == 0
    assert [f["name"] for f in json.loads(out)["functions"]] == ["train_step", "Net.forward"]


def test_a_log_without_lines_says_how_to_get_them(run) -> None:
    write_log(Path("log.jsonl"), make_plain())
    code, out, _ = run("log.jsonl")
    assert code == 0
    assert "trace(lines=True)" in out


def test_write_names_the_copies(log: Path, run) -> None:
    Path(FILE).write_text(TEXT)
    assert run("log.jsonl", "--write") == (0, "model.annotated.py\n", "")
    assert run("log.jsonl", "--write", "out")[:2] == (0, "out/model.annotated.py\n")
    assert Path(FILE).read_text() == TEXT


def test_write_here_is_a_folder_like_any_other(log: Path, run) -> None:
    Path("deep").mkdir()
    Path("deep/model.py").write_text("x = 1\n")
    place = Location("deep/model.py", 1, "f", "x = 1")
    write_log(Path("log.jsonl"), make_run([make_header(cwd=""), make_line(0, place)]))
    code, _, err = run("log.jsonl", "--write", ".")
    assert code == 2
    assert "the log does not hold its text" in err


def test_write_refuses_a_file_that_changed_with_exit_2(log: Path, run) -> None:
    Path(FILE).write_text(TEXT.replace("mean", "sum"))
    code, out, err = run("log.jsonl", "--write")
    assert (code, out) == (2, "")
    assert err == (
        "tensortrace: no copy of model.py: line 16 of model.py is not what was recorded: it "
        "changed since the run.\n"
    )


def write_ranks(folder: Path = Path()) -> None:
    for rank in (0, 1):
        records = [make_header(rank=rank, world_size=2), *make_listed()[1:]]
        write_log(folder / f"log.rank{rank}.jsonl", records)


def test_of_several_ranks_the_first_is_shown_and_the_others_are_named(run) -> None:
    write_ranks()
    code, out, err = run("log.jsonl")
    assert code == 0
    assert out.startswith("log.rank0.jsonl, rank 0: steps 0 to 2")
    assert err == "tensortrace: this is rank 0 of ranks 0, 1; --rank shows another.\n"


@pytest.mark.parametrize(
    "named", [["log.jsonl"], ["runs"], ["log.rank1.jsonl", "log.rank0.jsonl"], ["log.rank0.jsonl"]]
)
def test_a_rank_can_be_chosen_however_the_run_is_named(run, named: list[str]) -> None:
    Path("runs").mkdir()
    write_ranks()
    write_ranks(Path("runs"))
    code, out, err = run(*named, "--rank", "1")
    assert (code, err) == (0, "")
    assert "log.rank1.jsonl, rank 1: steps 0 to 2" in out.split("\n")[0]


def test_a_rank_that_is_not_there_is_refused_with_those_that_are(run) -> None:
    write_ranks()
    code, out, err = run("log.jsonl", "--rank", "7")
    assert (code, out) == (2, "")
    assert err == "tensortrace: --rank 7: the run has ranks 0, 1.\n"


def test_copies_and_a_document_at_once_are_refused(log: Path, run) -> None:
    code, out, err = run("log.jsonl", "--json", "--write")
    assert (code, out) == (2, "")
    assert err == (
        "tensortrace: --write makes copies and --json prints a document: choose one of them.\n"
    )


def test_a_terminal_gets_colour_unless_it_does_not_want_it(log: Path) -> None:
    assert "\x1b[1;31m" in in_a_terminal("lines", "log.jsonl")[1]
    for changes in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in in_a_terminal("lines", "log.jsonl", **changes)[1]


def test_a_pipe_gets_plain_text_of_the_width_it_asks_for(log: Path) -> None:
    for columns in ("60", "120"):
        done = subprocess.run(
            [*COMMAND, "lines", "log.jsonl"], capture_output=True, text=True, check=False,
            encoding="utf-8", env=environment(COLUMNS=columns, PYTHONUTF8="1"),
        )  # fmt: skip
        assert not FORBIDDEN.search(done.stdout)
        assert max(map(len, done.stdout.split("\n"))) <= int(columns)


def test_an_ascii_terminal_gets_ascii(log: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "lines", "log.jsonl"], capture_output=True, check=False,
        env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"logits [8, 128->97, 64] f32" in done.stdout


def test_a_reader_that_goes_away_ends_the_command_quietly(log: Path) -> None:
    records = [make_line(i, Location("m.py", i, "f"), Variable("n", "1")) for i in range(20_000)]
    write_log(Path("long.jsonl"), make_run([*records, make_step(0)]))
    read, write = os.pipe()
    process = subprocess.Popen(
        [*COMMAND, "lines", "long.jsonl"], stdout=write, stderr=subprocess.PIPE, env=environment()
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_hostile_names_are_shown_and_never_obeyed(run, payload: str) -> None:
    place = Location(payload, 2, payload, payload)
    write_log(Path("log.jsonl"), [make_header(), make_line(0, place, Variable(payload, payload))])
    for argv in ([], ["--function", "no such"], ["--write"], ["--json"]):
        _, out, err = run("log.jsonl", *argv)
        assert not FORBIDDEN.search(out + err)
