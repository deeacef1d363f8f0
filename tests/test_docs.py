"""README against code: what it lists must be what there is, neither less nor more."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import typing
from pathlib import Path

import msgspec
import pytest

import tensortrace
from tensortrace import records
from tensortrace.capture.options import parse_options
from tensortrace.checks import all_checks
from tensortrace.cli import COMMANDS
from tensortrace.tui.bindings import KEYS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
WORDS = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
# What a record is made of.
PARTS = (
    records.Tensor, records.Location, records.ParameterInfo, records.Variable, records.ChainLink,
    records.ModuleColumns, records.Failure,
)  # fmt: skip


def section(title: str) -> str:
    """The text under a heading, up to the next one of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}$(.*?)(?=^#{{1,3}} |\Z)", README, re.M | re.S)
    assert found, f"README has no section {title!r}"
    return found[2]


def table(title: str) -> list[list[str]]:
    """The cells of the table in a section, head and rule left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows[2:]]


def code(text: str) -> str:
    return f"`{text}`"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_every_check_is_in_the_table_with_its_own_first_line() -> None:
    rows = [
        [code(check.code), check.name, check.severity, check.doc.summary.rstrip(".")]
        for check in all_checks()
    ]
    assert table("What it finds") == rows


def test_every_option_of_trace_is_in_the_table_with_its_default() -> None:
    options = inspect.signature(parse_options).parameters.values()
    assert [row[:2] for row in table("Options of `trace()`")] == [
        [
            code(option.name),
            code(repr(option.default).replace("'", '"').replace("1000000000", "10**9")),
        ]
        for option in options
    ]


def test_an_example_of_a_setting_is_near_its_default() -> None:
    # A share set to 1e6 would be no threshold at all.
    package = (ROOT / "tensortrace").rglob("*.py")
    words = "\n".join([README, *(path.read_text("utf-8") for path in package)])
    examples = re.findall(r"\b(TT\d{3})\.(\w+)\W{1,4}(\d[\d.e+-]*)", words)
    defaults = {check.code: check.thresholds for check in all_checks()}
    assert len(examples) >= 5
    for code_, name, value in examples:
        default = defaults[code_][name]
        assert default / 10 < float(value.rstrip(".")) < default * 10, (code_, name, value)


def test_every_command_and_each_of_its_options_is_in_the_table() -> None:
    rows = {}
    for command in COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        command.arguments(parser)
        rows[command.name] = [a.option_strings[0] for a in parser._actions if a.option_strings]
    named = {
        row[0].split()[1].strip("`"): re.findall(r"--[a-z-]+", row[0])
        for row in table("Command line")
    }
    assert {name: sorted(options) for name, options in named.items()} == {
        name: sorted(options) for name, options in rows.items()
    }


def test_every_key_of_the_viewer_is_in_the_table() -> None:
    assert table("Keys") == [
        [" ".join(map(code, key.shown.split())), key.help, ", ".join(key.views)] for key in KEYS
    ]


def test_every_kind_of_record_is_in_the_table_with_all_its_keys() -> None:
    kinds = [
        (
            str(kind.__struct_config__.tag),
            [f.encode_name for f in msgspec.structs.fields(kind) if f.encode_name != "step"],
        )
        for kind in typing.get_args(records.AnyRecord)
    ]
    written = [(row[0].strip("`"), re.findall(r"`(\w+)`", row[2])) for row in table("The log")]
    assert written == kinds


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_key_of_a_part_of_a_record_is_named(part: type[msgspec.Struct]) -> None:
    named = re.findall(r"`(\w+)`", section("The log"))
    fields = msgspec.structs.fields(part)
    assert [f.encode_name for f in fields if f.encode_name not in named] == []


def test_every_default_that_is_not_empty_is_named() -> None:
    written = re.findall(r'`"(\w+)":("\w+"|true)`', section("The log").split("\n|")[0])
    defaults = {
        (field.encode_name, msgspec.json.encode(field.default).decode())
        for part in [*typing.get_args(records.AnyRecord), *PARTS]
        if part is not records.Header  # has all its keys
        for field in msgspec.structs.fields(part)
        if isinstance(field.default, str | int) and field.default
    }
    assert set(written) == defaults
    assert len(written) == len(defaults)


@pytest.mark.parametrize(
    "command", [row[0] for row in table("Development") if row[0].startswith("`pytest")]
)
def test_development_commands_use_markers_and_plugins_that_exist(command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for marker in re.findall(r"-m (\w+)", command):
        assert f'"{marker}:' in project
    if "--snapshot-update" in command:
        assert "pytest-textual-snapshot" in project


def test_ci_runs_the_two_commands_of_the_readme_word_for_word() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 2
    assert [line for line in script if line in commands] == commands


def test_python_examples_are_valid_python() -> None:
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        ast.parse(block)


def test_files_that_the_readme_names_exist() -> None:
    named = {
        *re.findall(r"\]\(([^)#:]+)\)", WORDS),
        *re.findall(r"`((?:tensortrace|tests|demos|\.ci)/[\w/.]*)`", README),
    }
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_within_the_readme_lead_to_a_heading() -> None:
    heads = re.findall(r"^#+ (.+)$", WORDS, re.M)
    anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    named = set(re.findall(r"\]\(#([^)]+)\)", WORDS))
    assert len(named) >= 6
    assert named <= anchors


def test_changelog_begins_with_this_version() -> None:
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert heads[0] == tensortrace.__version__


def test_promised_names_are_sorted_and_importable() -> None:
    assert tensortrace.__all__ == sorted(tensortrace.__all__)
    for name in tensortrace.__all__:
        assert getattr(tensortrace, name) is not None
    assert set(tensortrace.__all__) <= set(dir(tensortrace))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tensortrace.nothing
