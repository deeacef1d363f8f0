from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrace import UsageError, trace
from tensortrace.capture.options import parse_options
from tensortrace.checks import all_checks
from tensortrace.records import Call, Finding, Header, Param
from tests.capture.lifecycle import X, called, make_net, of, process_state, read, train


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "ops"}, ["level=", '"module" or "op"', "'ops'"]),
        ({"every": 0}, ["every=", "0"]),
        ({"every": -3}, ["every=", "-3"]),
        ({"every": True}, ["every=", "True"]),
        ({"every": 2.5}, ["every=", "2.5"]),
        ({"every": "often"}, ["every=", "'often'"]),
        ({"steps": "3"}, ["steps=", "'3'"]),
        ({"steps": 1.5}, ["steps=", "1.5"]),
        ({"modules": [3]}, ["modules=", "3"]),
        ({"stats": "all"}, ["stats=", "'all'", "minmax"]),
        ({"checks": "TT999"}, ["TT999"]),
        ({"checks": ["nonfinite-forwrad"]}, ["nonfinite-forwrad", "nonfinite-forward"]),
        ({"checks": [7]}, ["checks=", "7"]),
        ({"stop_on": "eror"}, ["stop_on=", "eror", '"error"', '"warning"', "a code"]),
        ({"stop_on": 3}, ["stop_on=", '"note"', "a code", "3"]),
        ({"compiled": "yes"}, ["compiled=", "'yes'"]),
        ({"max_bytes": 5}, ["max_bytes=", "5"]),
        ({"max_bytes": 1e9}, ["max_bytes=", "1000000000.0"]),
        ({"model": "net"}, ["model=", "str"]),
        ({"out": torch.nn.Linear(1, 1)}, ["out=", "Linear", "model="]),
    ],
)
def test_option_that_makes_no_sense_is_one_clear_sentence(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        trace(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checks", [{"TT202.ratoi": 1.0}, {"TT999.x": 1}, {"TT202.ratio": "much"}])
def test_setting_that_does_not_exist_is_a_usage_error_that_leaves_nothing(
    checks: dict[str, Any], tmp_path: Path
) -> None:
    before = process_state()
    with pytest.raises(UsageError), trace(tmp_path / "log.jsonl", checks=checks):
        raise AssertionError("the block must not run")
    assert process_state() == before
    assert list(tmp_path.iterdir()) == []


def test_checks_can_be_chosen_by_code_prefix_and_name() -> None:
    def codes(checks: Any) -> list[str]:
        return [check.code for check in parse_options(checks=checks).checks]

    every = [check.code for check in all_checks()]
    assert codes(None) == every
    assert codes("TT101") == ["TT101"]
    assert codes(["TT2", "nonfinite-loss"]) == [c for c in every if c[:3] == "TT2" or c == "TT103"]
    assert codes([]) == []
    assert codes({"TT202.ratio": 1.0}) == every


def test_no_checks_find_nothing() -> None:
    with trace(out=lambda record: None, checks=[]) as t:
        train(make_net(poison=[0]), 2)
    assert t.findings == []
    assert t.ok


def test_setting_changes_what_a_check_finds() -> None:
    def found(limit: float) -> set[str]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(12)))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.5)
        with trace(out=lambda record: None, checks={"TT202.ratio": limit}) as t:
            train(net, 12)
        return {f.code for f in t.findings}

    assert "TT202" in found(1e-3)
    assert "TT202" not in found(1e-30)


def test_header_has_the_options_that_were_given_and_no_others() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=3, modules="0.*", model=make_net()):
        pass
    assert of(Header, records)[0].options == {"every": 3, "modules": "0.*"}


def test_patterns_choose_the_modules_that_are_recorded() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=1, modules=["0", "*.nothing"]):
        train(make_net(), 2)
    assert called(records) == [(0, "0"), (1, "0")]


def test_root_is_recorded_under_the_empty_pattern() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=1, modules=""):
        make_net()(X)
    assert called(records) == [(0, "")]


@pytest.mark.parametrize("stats", ["full", "light", "minmax", "none"])
def test_statistics_are_as_many_as_asked_for(stats: str) -> None:
    records: list[Any] = []
    x = torch.tensor([[-3.0, 0.0, 4.0, 0.0]])
    with trace(out=records.append, every=1, stats=stats):  # type: ignore[call-overload]
        torch.nn.Identity()(x)
    tensor = of(Call, records)[0].tensors[0]
    assert tensor.shape == (1, 4)
    measured = (tensor.min, tensor.max)
    rest = (tensor.mean, tensor.norm, tensor.zeros)
    if stats in ("full", "light"):
        assert measured == (-3.0, 4.0)
        assert rest == (0.25, 5.0, 2)
    else:
        assert measured == ((-3.0, 4.0) if stats == "minmax" else (None, None))
        assert rest == (None, None, 0)


def test_light_statistics_of_a_large_tensor_are_counts_and_norm() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=1, stats="light"):
        torch.nn.ReLU()(torch.ones(100, 100))
    given, made = (c for call in of(Call, records) for c in call.tensors)
    for tensor in (given, made):
        assert (tensor.zeros, tensor.norm) == (0, 100.0)
        assert (tensor.min, tensor.max, tensor.mean, tensor.std) == (None,) * 4
        assert tensor.exponents is tensor.units is None


def test_non_finite_values_are_found_with_the_extremes_alone() -> None:
    def codes(stats: str) -> list[str]:
        with trace(out=lambda record: None, stats=stats) as t:  # type: ignore[call-overload]
            train(make_net(poison=[1]), 2)
        return [f.code for f in t.findings]

    assert codes("light") == codes("minmax") == codes("full") != []
    assert codes("none") == ["TT103"]  # the loss is one number, and always read


@pytest.mark.parametrize(("part", "says"), [
    (lambda x: x / x.new_zeros(()), "0 / 0 is NaN; the divisor is f32 [], all 0"),
    (lambda x: 1 / x.relu(), "0 / 0 is NaN; the divisor is f32 [3] from 0 to 2"),
    (lambda x: x.relu().pow(-0.5), "0 to the power -0.5 is infinite; it got f32 [3] from 0 to 2"),
    (lambda x: x * 1e30 / x.new_full((3,), 1e-30), "the quotient is over the range of f32"),
    (lambda x: torch.hypot(x - 1, x - 1), "no direction where both are 0: its gradient is 0 / 0"),
])  # fmt: skip
def test_with_the_extremes_alone_zeros_that_were_not_counted_are_thought_of(
    part: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    x = torch.tensor([-1.0, 1.0, 2.0], requires_grad=True)
    with trace(out=lambda record: None, stats="minmax") as t:
        part(x).sum().backward()
    (found,) = t.findings
    assert found.explanation is not None
    assert says in found.explanation


def test_source_text_is_left_out_when_asked(tmp_path: Path) -> None:
    for source in (True, False):
        log = tmp_path / f"{source}.jsonl"
        with trace(log, source=source):
            train(make_net(poison=[0]), 1)
        kinds = {type(record).__name__ for record in read(log)}
        assert ("Source" in kinds) is source
    # The finding names its line all the same.
    location = of(Finding, read(tmp_path / "False.jsonl"))[0].location
    assert location is not None
    assert location.function in {"Poison.forward", "train"}


def test_every_n_and_steps_choose_the_full_steps() -> None:
    def full(**options: Any) -> list[int]:
        records: list[Any] = []
        with trace(out=records.append, **options):
            train(make_net(), 6)
        params = {record.step for record in of(Param, records)}
        calls = {step for step, _ in called(records)}
        assert params == calls
        return sorted(calls)

    assert full(every=1) == [0, 1, 2, 3, 4, 5]
    assert full(every=2) == [0, 2, 4]
    assert full(steps=3) == [3]
    assert full(steps=range(2, 4)) == [2, 3]
    assert full(steps={0, 5}) == [0, 5]
    assert full(steps=[]) == []
    assert full(steps=range(1, 6), every=2) == [2, 4]
    assert full() == [0, 1, 2, 3, 4, 5]


def test_the_project_chooses_checks_and_thresholds_and_arguments_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = '[tool.tensortrace]\nselect = ["TT2", "TT401"]\nignore = ["TT202"]\n'
    table += "set = {'TT201.ratio' = 50, 'TT401.idle' = 7}\n"
    (tmp_path / "pyproject.toml").write_text(table, "utf-8")
    monkeypatch.chdir(tmp_path)

    def chosen(checks: Any) -> set[str]:
        return {check.code for check in parse_options(checks=checks).checks}

    usual = parse_options()
    assert chosen(None) >= {"TT201", "TT203", "TT401"}
    assert not chosen(None) & {"TT101", "TT202"}
    assert usual.settings == {"TT201.ratio": 50, "TT401.idle": 7}
    assert "TT201.ratio" in usual.as_json()["pyproject"]

    assert chosen("TT202") == {"TT202"}
    assert parse_options(checks="TT202").settings == usual.settings
    by_hand = parse_options(checks={"TT201.ratio": 9.0})
    assert by_hand.settings == {"TT201.ratio": 9.0, "TT401.idle": 7}
    assert chosen({"TT201.ratio": 9.0}) == chosen(None)


def test_a_bad_table_of_the_project_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.tensortrace]\ncheck = []\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="unknown key 'check'"), trace(tmp_path / "log.jsonl"):
        pass
    assert not (tmp_path / "log.jsonl").exists()


def test_option_that_does_not_exist_is_one_sentence_with_the_closest() -> None:
    with pytest.raises(UsageError, match=r"no option evry=\. Did you mean every=\?"):
        trace(evry=1)  # type: ignore[call-overload]


def test_modules_that_match_nothing_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net()
    for _ in range(2):
        with trace(out=lambda record: None, modules=["0", "encodr.*"]) as t:
            net(X)
        with t:
            net(X)
        said = capsys.readouterr().err
        assert said.count("modules='encodr.*' matches no module that ran") == 1
        assert "modules='0'" not in said
