"""The `[tool.tensortrace]` table: where it is found, what it may say, and what wins over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensortrace import cli
from tensortrace.checks import all_checks
from tensortrace.config import Config, load_config
from tensortrace.errors import UsageError
from tests.builders import make_header, write_log
from tests.export.canonical import make_canonical

TABLE = """
[tool.tensortrace]
select = ["TT1", "never-updated"]
ignore = ["TT105"]

[tool.tensortrace.set]
"TT401.idle" = 7
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def project(text: str, folder: Path = Path()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pyproject.toml"
    path.write_text(text, "utf-8")
    return path


def codes(config: Config, *given: Any) -> list[str]:
    return [check.code for check in config.checks(*given)]


def test_without_a_table_there_is_nothing_asked_for() -> None:
    assert load_config() == Config()
    project("[tool.ruff]\n# tensortrace needs no table\n")
    assert load_config() == Config()
    assert not load_config()
    assert codes(load_config()) == [check.code for check in all_checks()]


def test_the_table_names_checks_and_thresholds() -> None:
    project(TABLE)
    config = load_config()
    assert config == Config(("TT1", "never-updated"), ("TT105",), {"TT401.idle": 7})
    assert codes(config) == ["TT101", "TT102", "TT103", "TT104", "TT401"]


def test_the_nearest_file_with_a_table_counts_from_the_working_folder_upwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(TABLE)
    project("[project]\nname = 'inner, which uses tensortrace'\n", folder / "a")
    (folder / "a" / "b").mkdir()
    monkeypatch.chdir(folder / "a" / "b")
    assert load_config().ignore == ("TT105",)
    project('[tool.tensortrace]\nignore = ["TT2"]\n', folder / "a" / "b")
    assert load_config() == Config(None, ("TT2",), {})
    assert load_config(folder).ignore == ("TT105",)


def test_thresholds_may_be_written_without_quotes() -> None:
    project("[tool.tensortrace.set]\nTT201.ratio = 50\nnever-updated.updates = 9\n")
    assert load_config().settings == {"TT201.ratio": 50, "never-updated.updates": 9}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('[tool.tensortrace]\nselct = ["TT1"]', "unknown key 'selct'. It takes select, ignore"),
        ('[tool.tensortrace]\nselect = "TT1"', "select is 'TT1', not a list such as"),
        ("[tool.tensortrace]\nignore = [7]", "ignore is [7], not a list such as"),
        ('[tool.tensortrace]\nselect = ["TT999"]', "no check named 'TT999'"),
        ('[tool.tensortrace]\nignore = ["nonfinite-forwrad"]', "'nonfinite-forward'"),
        ("[tool.tensortrace]\nset = 3", "set is 3, not a table"),
        ("[tool.tensortrace.set]\n'TT401.idel' = 3", "no setting named 'TT401.idel'"),
        (
            "[tool.tensortrace.set]\n'TT401.idle' = 'x'",
            "TT401.idle is 'x', not a value of type int",
        ),
        ("[tool.tensortrace.set]\nTT401.idle.x = 3", "TT401.idle is {'x': 3}"),
        ("[tool]\ntensortrace = true", "it is True, not a table"),
        ("[tool.tensortrace\nselect = []", "is not TOML"),
    ],
)
def test_bad_content_is_one_sentence_with_the_file_and_exit_2(
    table: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project(table)
    with pytest.raises(UsageError) as caught:
        load_config()
    assert says in str(caught.value)
    assert str(path.absolute()) in str(caught.value)

    write_log(Path("log.jsonl"), make_canonical())
    assert cli.main(["report"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert says in err


def test_a_broken_file_of_somebody_else_is_left_alone() -> None:
    project("[project\nname = 'other'\n")
    assert load_config() == Config()
    Path("pyproject.toml").write_bytes(b"\xff\xfe tensortrace")
    assert load_config() == Config()


def test_checks_given_by_hand_win_over_the_table() -> None:
    project(TABLE)
    config = load_config()
    assert codes(config, ["TT2"]) == [c.code for c in all_checks() if c.code.startswith("TT2")]
    assert codes(config, ["TT105"]) == ["TT105"]
    assert codes(config, None, ["TT10"]) == ["TT401"]


def found(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    cli.main(["report", "--json", *argv])
    return [finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]]


def test_report_runs_the_checks_that_the_project_asks_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = write_log(Path("log.jsonl"), make_canonical())
    stored = found(capsys)
    assert stored
    again = found(capsys, "--select", "TT1")
    project('[tool.tensortrace]\nselect = ["TT1"]\n')
    assert found(capsys) == again
    assert found(capsys, "--select", "TT2") == []
    # What the run itself was told, or what it did by this table, stands.
    rest = make_canonical()[1:]
    for options in ({"checks": "TT1"}, {"pyproject": str(load_config())}):
        write_log(log, [make_header(options=options), *rest])
        assert found(capsys) == stored


def test_options_on_the_command_line_win_over_thresholds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_log(Path("log.jsonl"), make_canonical())
    project("[tool.tensortrace.set]\n'TT401.idle' = 7\n")
    config = load_config()
    assert config.settings == {"TT401.idle": 7}
    assert cli.main(["report", "--set", "TT401.idle=x"]) == 2
    assert "TT401.idle is 'x'" in capsys.readouterr().err
