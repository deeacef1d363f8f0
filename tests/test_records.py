"""The vocabulary is the schema of the log: what is written is read back the same."""

from __future__ import annotations

import json
import math
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortrace.log import KINDS, decode, encode
from tensortrace.records import (
    Action,
    AnyRecord,
    Finding,
    Line,
    Optimizer,
    Record,
    Source,
    Tensor,
    Variable,
    from_scalar,
    to_scalar,
)
from tests.builders import HERE, make_end, make_finding, make_header, make_steps

ONE_OF_EACH: list[Record] = [
    make_header(),
    *make_steps(1),
    Source(step=0, file="train.py", name="main", first_line=1, text="def main():\n    pass\n"),
    Optimizer(step=0, seq=6, index=0, cls="SGD", lr=[0.1, "NaN", None], grad_norm="NaN"),
    Line(step=0, seq=7, location=HERE, changed=[Variable("x", "1")]),
    Action(step=0, seq=8, action="clip", detail={"total_norm": "Infinity", "max_norm": 1.0}),
    make_finding(),
    make_end(),
]


def test_the_samples_hold_every_kind():
    assert {r.__struct_config__.tag for r in ONE_OF_EACH} == set(KINDS)
    assert {cls.__struct_config__.tag for cls in get_args(AnyRecord)} == set(KINDS)


@pytest.mark.parametrize("record", ONE_OF_EACH, ids=lambda r: type(r).__name__)
def test_a_record_survives_the_log(record):
    assert decode(encode(record)[:-1]) == record


@pytest.mark.parametrize("record", ONE_OF_EACH, ids=lambda r: type(r).__name__)
def test_a_line_begins_with_kind_and_step(record):
    assert list(json.loads(encode(record)))[:2] == ["kind", "step"]


def test_a_finding_writes_every_field_since_other_tools_read_it():
    assert list(json.loads(encode(make_finding()))) == [
        "kind", "step", "id", "update", "code", "check", "severity", "phase", "module", "op",
        "param", "seq", "tensor", "message", "value", "limit", "location", "explanation",
        "evidence", "chain", "fix",
    ]  # fmt: skip
    assert Finding.__struct_config__.omit_defaults is False


def test_records_cannot_be_changed():
    with pytest.raises(AttributeError):
        make_finding().step = 3


@given(st.floats())
def test_a_scalar_survives_json_whatever_it_is(x):
    back = from_scalar(json.loads(msgspec.json.encode(to_scalar(x))))
    assert back == x or (math.isnan(back) and math.isnan(x))


def test_no_scalar_stays_none():
    assert from_scalar(None) is None


def test_nonfinite_counts_all_three():
    assert Tensor(id=1, nan=1, posinf=2, neginf=4).nonfinite == 7


def test_the_rms_is_over_the_finite_elements_and_none_where_there_are_none():
    # 3, 4, NaN, inf: the norm over the finite ones is 5.
    assert Tensor(id=1, numel=4, nan=1, posinf=1, norm=5.0).rms == 5 / math.sqrt(2)
    assert Tensor(id=1, numel=2, norm=0.0).rms == 0
    assert Tensor(id=1, numel=2).rms is None
    assert Tensor(id=1, numel=1, neginf=1, norm=0.0).rms is None
    assert Tensor(id=1, norm=0.0).rms is None
