from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortrace import cli
from tensortrace.checks import all_checks
from tensortrace.errors import UsageError
from tensortrace.log.claim import claim
from tensortrace.records import Module
from tensortrace.run.run import TAIL
from tensortrace.tui.opening import Opening
from tensortrace.version import __version__
from tests.builders import make_header, make_run
from tests.export.canonical import (
    make_calls,
    make_canonical,
    make_finding,
    make_step,
    write_log,
)
from tests.export.hostile import FORBIDDEN, PAYLOADS

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "tensortrace"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def log() -> Path:
    return write_log(Path("log.jsonl"), make_canonical())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: str) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "TERM")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def in_a_terminal(*argv: str, **changes: str) -> tuple[int, str]:
    """Run the command with a pseudo-terminal as stdin, stdout and stderr."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *argv], stdin=slave, stdout=slave, stderr=slave,
        env=environment(**{"TERM": "xterm-256color", **changes}),
    )  # fmt: skip
    os.close(slave)
    data = b""
    try:
        while chunk := os.read(master, 65536):
            data += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(master)
    return process.wait(), data.decode()


# -- report


def test_a_log_with_an_error_is_reported_and_exits_with_1(log: Path, run) -> None:
    code, out, err = run("report", "log.jsonl")
    assert (code, err) == (1, "")
    assert out.startswith("log       log.jsonl\n")
    assert "error TT101 nonfinite-forward" in out


def test_a_log_without_an_error_exits_with_0(run) -> None:
    warning = make_finding(severity="warning", step=0)
    write_log(Path("log.jsonl"), make_run([*make_calls(0), warning, make_step(0)]))
    code, out, _ = run("report", "log.jsonl")
    assert code == 0
    assert "1 warning." in out


def test_without_an_argument_the_newest_log_here_is_reported(log: Path, run) -> None:
    other = write_log(Path("other.jsonl"), make_run([]))
    Path("data.jsonl").write_text('{"kind": "something else"}\n')
    os.utime(log, ns=(10, 10))
    os.utime(other, ns=(5, 5))
    assert run("report")[1].startswith("log       log.jsonl\n")


def test_the_json_report_is_one_document(log: Path, run) -> None:
    code, out, _ = run("report", "log.jsonl", "--json")
    assert code == 1
    assert json.loads(out)["findings"][0]["code"] == "TT101"


def test_a_log_from_a_pipe_is_reported(log: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "report", "-"], input=log.read_bytes(), capture_output=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"error TT101" in done.stdout


def test_notes_are_counted_and_shown_on_request(log: Path, run) -> None:
    assert "note TT105" not in run("report")[1]
    assert "note TT105" in run("report", "--notes")[1]


def test_the_step_of_the_layer_table_can_be_chosen(log: Path, run) -> None:
    assert "Layers in step 0\n" in run("report", "--step", "0")[1]


def test_only_what_matches_a_module_is_shown_and_decides_the_exit_code(log: Path, run) -> None:
    code, out, _ = run("report", "--module", "encoder.0")
    assert code == 0
    assert "TT202" in out
    assert "TT101" not in out
    assert "head" not in out.split("Layers")[1]


def test_columns_sets_the_width_of_a_pipe(log: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(map(len, run("report")[1].split("\n"))) in range(80, 101)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, run("report")[1].split("\n"))) in range(50, 61)


def test_a_name_that_is_no_file_stands_for_all_its_ranks(run) -> None:
    for rank in (0, 10, 2):
        records = [make_header(rank=rank, world_size=11), make_finding(step=0), make_step(0)]
        write_log(Path(f"log.rank{rank}.jsonl"), records)
    for argv in (["report", "log.jsonl"], ["report"]):
        code, out, _ = run(*argv)
        assert code == 1
        assert "at        ranks 0, 2, 10, step 0" in out
    assert "at        step 0" in run("report", "log.rank10.jsonl")[1]


def test_selected_checks_run_again_over_the_log(log: Path, run) -> None:
    code, out, _ = run("report", "--select", "TT101", "--json")
    document = json.loads(out)
    assert document["checked_again"] is True
    assert {finding["code"] for finding in document["findings"]} == {"TT101"}
    assert code == (0 if document["ok"] else 1)


def test_ignored_checks_do_not_run(log: Path, run) -> None:
    _, out, err = run("report", "--ignore", "TT1")
    assert err == ""
    assert "TT1" not in out
    assert "run again over this log" in out


def test_a_threshold_can_be_set(log: Path, run) -> None:
    names = [f"{one.code}.{key}" for one in all_checks() for key in one.thresholds]
    _, out, err = run("report", "--set", f"{names[0]}=1")
    assert err == ""
    assert "run again over this log" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND"),
        (["repotr"], "invalid choice: 'repotr'"),
        (["report", "--jsno"], "unrecognized arguments: --jsno"),
        (["explain", "TT202", "TT203"], "arguments: TT203. See `tensortrace explain --help`."),
        (["report", "--step", "x"], "invalid int value: 'x'"),
        (["report", "--step", "9"], "no step 9 in log.jsonl: it has steps 0 to 2"),
        (["report", "--select", "TT999"], "no check named 'TT999'"),
        (["report", "--select", " ,"], "--select names no check"),
        (["report", "--ignore", ""], "--ignore names no check"),
        (["report", "--set", "TT101"], "--set 'TT101' is not CODE.NAME=VALUE"),
        (["report", "--set", "TT101.nothing=1"], "no setting named 'TT101.nothing'"),
        (["report", "--set", "TT202=3"], "no setting named 'TT202'. TT202 has TT202.ratio"),
        (["report", "--set", "TT202.rat=3"], "List all with `tensortrace explain TT202`."),
        (["report", "--set", "TT2.ratio=3"], "List all with `tensortrace explain CHECK`."),
        (["report", "--set", "nonfinite-input=3"], "nonfinite-input has none"),
        (["report", "--set", "TT202.ratio=nan"], "TT202.ratio is 'nan', which no value can reach"),
        (["report", "--set", "TT201.ratio=-5"], "TT201.ratio is '-5', below 0 (default"),
        (["report", "--select", "TT1", "--ignore", "TT1"], "no check is left to run"),
        (["report", "--module", "encodr.0"], "'encodr.0' matches no module of the run. Closest:"),
        (["report", "--module", "x.*", "--module", "y.*"], "'x.*', --module 'y.*' match no module"),
        (["export", "-o", "-", "--module", "encodr.0"], "'encodr.0' matches no module of the run"),
        (["export", "-o", "a.html", "--module", "x.*"], "'x.*' matches no module of the run."),
        (["report", "gone.jsonl"], "gone.jsonl"),
        (["report", "gone/log.jsonl"], "gone/log.jsonl"),
        (["report", "bare"], "there is no tensortrace log in bare"),
        (["report", "empty.jsonl"], "empty.jsonl"),
        (["report", "binary.jsonl"], "binary.jsonl"),
        (["report", "other.jsonl"], "other.jsonl"),
        (["view", "gone.jsonl"], "gone.jsonl"),
        (["view", "--step", "2", "--finding", "TT101"], "--step and --finding are two places"),
        (["explain", "nonfinite-forwrad"], "Closest: 'nonfinite-forward'"),
        (["explain", "\x1b]0;x\x07"], "no check named '\\x1b]0;x\\x07'"),
        (["report", "\x1b[31m.jsonl"], "\\x1b[31m.jsonl"),
        (["report", "log.jsonl", "\x1b[31m"], "\\x1b[31m"),
        (["report", "log.jsonl", "--\x1b[31m"], "\\x1b[31m"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_on_stderr_and_exit_2(log: Path, run, argv, says) -> None:
    Path("bare").mkdir()
    Path("empty.jsonl").write_bytes(b"")
    Path("binary.jsonl").write_bytes(bytes(range(256)))
    Path("other.jsonl").write_text('{"level": "info", "message": "hello"}\n')
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("tensortrace: ")
    assert err.count("\n") == 1
    assert not FORBIDDEN.search(err)


def test_a_glob_that_matches_nothing_is_said(log: Path, run) -> None:
    code, out, err = run("report", "--module", "encodr.*", "--module", "encoder.0")
    assert code in (0, 1)
    assert out
    assert err == "tensortrace: --module 'encodr.*' matches no module of the run.\n"


def test_a_glob_that_matches_in_one_of_the_ranks_is_no_mistake(run) -> None:
    for rank, path in enumerate(("encoder", "decoder")):
        header = make_header(rank=rank, world_size=2)
        finding = make_finding(step=0, module=path, severity="warning")
        write_log(Path(f"log.rank{rank}.jsonl"), [header, finding, make_step(0)])
    code, out, err = run("report", "log.jsonl", "--module", "dec*")
    assert (code, err) == (0, "")
    assert "1 warning." in out


def test_a_module_far_from_both_ends_of_a_log_is_matched(run) -> None:
    steps = [make_step(n) for n in range(4000)]
    first, late = (Module(step=n, path=path, cls="A") for n, path in ((0, "first"), (2000, "late")))
    write_log(Path("log.jsonl"), make_run([first, *steps[:2000], late, *steps[2000:]]))
    assert Path("log.jsonl").stat().st_size > 3 * TAIL
    assert run("export", "-o", "-", "--module", "late")[::2] == (0, "")


def test_a_folder_without_a_log_is_a_mistake(run) -> None:
    code, _, err = run("report")
    assert code == 2
    assert "no tensortrace log" in err


def test_windows_is_told_in_one_sentence_what_to_do(run, monkeypatch) -> None:
    write_log(Path("log.jsonl"), make_run([make_step(0)]))
    monkeypatch.delattr(os, "pread")
    said = "tensortrace writes and reads logs on Linux and macOS; on Windows use it inside WSL"
    for command in ("report", "lines", "view", "export"):
        code, out, err = run(command, "log.jsonl")
        assert (code, out) == (2, "")
        assert said in err
    with pytest.raises(UsageError, match=said):
        claim(Path("new.jsonl"))
    assert not Path("new.jsonl").exists()


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_hostile_text_from_a_log_never_reaches_stdout(run, payload: str) -> None:
    finding = make_finding(step=0, module=payload, message=payload, explanation=payload)
    write_log(Path("log.jsonl"), make_run([*make_calls(0), finding, make_step(0)]))
    for options in ([], ["--json"], ["--module", "*"]):
        code, out, err = run("report", *options)
        assert (code, err) == (1, "")
        assert not FORBIDDEN.search(out)


# -- terminals and pipes


def test_a_terminal_gets_colour_unless_it_asks_not_to(log: Path) -> None:
    code, coloured = in_a_terminal("report", COLUMNS="90")
    assert code == 1
    assert "\x1b[1;31merror TT101" in coloured
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, text = in_a_terminal("report", COLUMNS="90", **plain)
        assert code == 1
        assert "error TT101" in text
        assert "\x1b" not in text


def test_the_viewer_without_a_terminal_is_the_report(log: Path, run) -> None:
    code, out, err = run("view", "log.jsonl", "--no-mouse", "--step", "0")
    assert code == 1
    assert "Layers in step 0" in out
    assert err == "tensortrace: no terminal for the viewer here; this is the report.\n"
    code, text = in_a_terminal("view", TERM="dumb")
    assert code == 1
    assert "this is the report" in text
    assert "\x1b" not in text


def test_the_viewer_in_a_cell_of_a_notebook_is_the_report(log: Path) -> None:
    code, text = in_a_terminal("view", JPY_PARENT_PID="1")
    assert code == 1
    assert "this is the report" in text
    assert "error TT101" in text


def test_the_viewer_gets_the_run_the_step_and_the_mouse(
    log: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    app = types.ModuleType("tensortrace.tui.app")
    app.view = lambda run, mouse, opening: seen.append((run.runs[0].path, opening, mouse)) or 0  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "tensortrace.tui.app", app)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run("view", "log.jsonl", "--step", "2", "--no-mouse")[0] == 0
    assert run("view")[0] == 0
    assert run("view", "--finding", "TT101", "--module", "a.b", "--follow")[0] == 0
    assert seen == [
        (Path("log.jsonl"), Opening(step=2), False),
        (Path("log.jsonl"), Opening(), True),
        (Path("log.jsonl"), Opening(finding="TT101", module="a.b", follow=True), True),
    ]


@pytest.mark.parametrize(
    ("words", "first", "where"),
    [
        (["late.jsonl"], None, "late.jsonl"),
        (["late.jsonl"], b"", "late.jsonl"),
        (["late.jsonl"], b'{"kind":"header",', "late.jsonl"),
        ([], None, "this folder"),
    ],
)
def test_a_run_that_is_about_to_begin_is_waited_for_if_it_is_to_be_followed(
    words: list[str], first: bytes | None, where: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, slept = Path("late.jsonl"), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            write_log(late, make_canonical())

    if first is not None:
        late.write_bytes(first)
    app = types.ModuleType("tensortrace.tui.app")
    app.view = lambda run, mouse, opening: 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensortrace.tui.app", app)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setenv("TERM", "xterm")
    assert run("view", *words)[0] == 2
    assert not slept
    told = f"tensortrace: no log in {where} yet: waiting for the run to begin; ctrl+c ends.\n"
    assert run("view", *words, "--follow") == (0, "", told)
    assert len(slept) == 3


def test_the_demo_is_told_where_the_log_goes_and_the_log_is_viewed_on_request(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = types.ModuleType("tensortrace.demo")
    demo.main = lambda out: print(f"to {out}") or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensortrace.demo", demo)
    assert run("demo") == (0, "to log.jsonl\n", "")
    write_log(Path("x.jsonl"), make_canonical())
    code, out, err = run("demo", "--view", "--keep", "x.jsonl")
    assert code == 1
    assert out.startswith("to x.jsonl\nlog       x.jsonl\n")
    assert "no terminal" in err


def test_a_reader_that_went_away_is_no_reason_to_complain(log: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "report"], stdout=write, stderr=subprocess.PIPE, env=environment(), check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("report log.jsonl", 1),
        ("report gone.jsonl", 2),
        ("report --help", 0),
        ("lines log.jsonl", 0),
        ("export log.jsonl -o run.html", 0),
        ("explain TT101", 0),
        ("view log.jsonl", 1),
    ],
)
@pytest.mark.parametrize("closed", [">&-", "<&- 2>&-"])
def test_closed_streams_change_no_exit_code(log: Path, words: str, code: int, closed: str) -> None:
    line = f'"$@" {words} {closed}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *COMMAND], capture_output=True, check=False, env=environment()
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert done.stdout == b"" or closed != ">&-"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a full disk")
def test_a_full_disk_is_one_sentence(log: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "report"], stdout=full, stderr=subprocess.PIPE, env=environment(),
            check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == b"tensortrace: No space left on device: standard output\n"


def test_a_terminal_without_unicode_gets_escapes(log: Path) -> None:
    write_log(log, make_run([make_finding(message="größer", step=0), make_step(0)]))
    done = subprocess.run(
        [*COMMAND, "report"], capture_output=True, check=False,
        env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")
    assert rb"gr\xf6\xdfer" in done.stdout


def test_ctrl_c_is_quiet(log: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tensortrace.export.contents.gather", interrupt)
    assert run("report") == (130, "", "")


def test_progress_is_shown_to_a_person_who_has_waited_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # When it was made, at each tick, and after each line that it wrote.
    clock = iter([0.0, 0.5, 1.0, 1.0, 1.1, 1.3, 1.3])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = cli.Progress(9)
    for step in range(4):
        progress.tick(step)
    progress.close()
    shown = "checking step {} of 9"
    wipe = "\r" + " " * len(shown.format(3)) + "\r"
    assert capsys.readouterr().err == f"\r{shown.format(1)}\r{shown.format(3)}{wipe}"


def test_nothing_is_shown_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1e9)
    progress = cli.Progress(9)
    progress.tick(5)
    progress.close()
    assert capsys.readouterr().err == ""


# -- explain, help, start-up


def test_every_check_is_in_the_table_and_has_a_page_by_code_and_by_name(run) -> None:
    code, table, err = run("explain")
    assert (code, err) == (0, "")
    for one, line in zip(all_checks(), table.splitlines(), strict=True):
        assert line.split()[:3] == [one.code, one.name, one.severity]
        assert line.endswith(one.doc.summary)
        page = run("explain", one.code)
        assert page[0] == 0
        assert "Threshold" in page[1]
        assert page == run("explain", one.name) == run("explain", one.code.lower())


def test_a_prefix_explains_a_family(run) -> None:
    _, table, _ = run("explain", "TT1")
    expected = [one.code for one in all_checks() if one.code.startswith("TT1")]
    assert [line.split()[0] for line in table.splitlines()] == expected


def test_version_and_help(run) -> None:
    assert run("--version") == (0, f"tensortrace {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for command in cli.COMMANDS:
        assert command.summary in " ".join(out.split())
        code, page, _ = run(command.name, "--help")
        assert code == 0
        assert all(line in page for line, _ in command.examples)


def test_every_example_of_the_help_is_a_command_that_parses() -> None:
    import shlex

    for command in cli.COMMANDS:
        for line, _ in command.examples:
            program, *words = shlex.split(line)
            assert program == "tensortrace"
            assert cli._parser().parse_args(words).handler is command.handler
    with pytest.raises(UsageError):
        cli._parser().parse_args(["report", "--nothing"])


@pytest.mark.parametrize("argv", ["explain", "report", "report --json", "report --select TT1"])
def test_neither_torch_nor_textual_is_imported(log: Path, argv: str) -> None:
    program = (
        "import sys; from tensortrace.cli import main; main(sys.argv[1:])\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'textual', 'torchsnooper')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv.split()], capture_output=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout
