"""The options of `lines=`: what each takes, and what is said of anything else."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import pysnooper
import pytest
from torch import Tensor

import tensortrace
from tensortrace import Lines, UsageError, trace
from tensortrace.capture.lines.options import parse_lines
from tensortrace.capture.options import parse_options


@pytest.mark.parametrize("off", [False, None])
def test_without_lines_there_are_none(off: Any) -> None:
    assert parse_lines(off) is None


def test_true_a_dict_and_lines_are_the_same() -> None:
    assert parse_lines(True) == Lines() == parse_lines({}) == parse_lines(Lines())
    assert parse_lines({"depth": 3}) == Lines(depth=3)


def test_every_option_of_pysnooper_is_there_under_its_name() -> None:
    theirs = set(inspect.signature(pysnooper.snoop).parameters)
    assert theirs <= {field.name for field in dataclasses.fields(Lines)}


def test_lines_is_frozen_and_public() -> None:
    assert "Lines" in tensortrace.__all__
    with pytest.raises(dataclasses.FrozenInstanceError):
        Lines().depth = 2  # type: ignore[misc]


def test_one_expression_or_pair_may_stand_alone() -> None:
    assert Lines(watch="a.b").watch == ("a.b",)
    assert Lines(watch=["a", "b"]).watch == ("a", "b")
    assert Lines(custom_repr=(Tensor, str)).custom_repr == ((Tensor, str),)
    assert Lines(custom_repr=((Tensor, str),)).custom_repr == ((Tensor, str),)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("yes", ["lines=", "True", "'yes'"]),
        ({"dept": 2}, ["'dept'", "Did you mean 'depth'?", "max_variable_length"]),
        ({"zzz": 2}, ["'zzz'", "It takes output, depth"]),
        ({"depth": 0}, ["depth=", "from 1", "0"]),
        ({"depth": True}, ["depth="]),
        ({"watch": "a b"}, ["watch=", "'a b'"]),
        ({"watch": 5}, ["watch=", "5"]),
        ({"watch_explode": ["x["]}, ["watch_explode=", "'x['"]),
        ({"output": 5}, ["output=", "stderr", "5"]),
        ({"output": ""}, ["output=", "empty"]),
        ({"overwrite": True}, ["overwrite=", "path"]),
        ({"overwrite": True, "output": sys.stderr}, ["overwrite=", "path"]),
        ({"prefix": 5}, ["prefix=", "5"]),
        ({"normalize": "yes"}, ["normalize=", "True or False"]),
        ({"thin": 1}, ["thin=", "True or False"]),
        ({"color": "red"}, ["color=", "'red'"]),
        ({"normalize": True, "thread_info": True}, ["normalize=", "thread_info="]),
        ({"max_variable_length": 2}, ["max_variable_length=", "None"]),
        ({"custom_repr": 5}, ["custom_repr=", "5"]),
        ({"custom_repr": (1, 2, 3)}, ["custom_repr="]),
    ],
)
def test_what_makes_no_sense_is_one_clear_sentence(lines: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as info:
        parse_options(lines=lines)
    message = str(info.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_a_mistake_is_met_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        trace(lines={"dpth": 1})
    assert not list(tmp_path.iterdir())


def test_the_header_says_which_lines_were_asked_for() -> None:
    assert parse_options(lines=True).as_json() == {"lines": True}
    assert "depth=2" in parse_options(lines=Lines(depth=2)).as_json()["lines"]
    assert parse_options(lines={"depth": 2}).as_json() == {"lines": "{'depth': 2}"}
    assert parse_options().as_json() == {}


def test_every_option_is_in_the_table_of_the_readme_with_its_default() -> None:
    readme = (Path(tensortrace.__file__).parent.parent / "README.md").read_text("utf-8")
    table = readme.partition("| option of `Lines` |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    assert rows == [
        [f"`{field.name}`", f"`{field.default!r}`".replace("'", '"')]
        for field in dataclasses.fields(Lines)
    ]
