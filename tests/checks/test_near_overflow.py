from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import call, closing, find, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import sentences


class Attention(nn.Module):
    """One head over words, in float16, with logits that may be scaled."""

    def __init__(self, gain, scale):
        super().__init__()
        self.embed, self.scale = nn.Embedding(20, 64), scale
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 20)
        with torch.no_grad():
            self.query.weight.mul_(gain)
            self.key.weight.mul_(gain)

    def forward(self, tokens):
        x = self.embed(tokens)
        q = self.query(x) * self.scale
        scores = q @ self.key(x).transpose(1, 2)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -65504.0)
        return self.head(scores.softmax(-1) @ x)


def attend(scale, dtype=torch.float16, gain=60.0):
    def program():
        model = Attention(gain, scale).to(dtype)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        for _ in range(3):
            tokens = sentences()
            sgd.zero_grad()
            logits = model(tokens).float()
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            sgd.step()

    return program


def test_scores_that_are_not_scaled_come_close_to_the_end_of_float16():
    (found,) = find_live(attend(1.0), "TT501", level="op")
    assert (found.severity, found.step) == ("warning", 1)
    assert found.op in {"matmul", "masked_fill"}
    assert 0.5 < found.value < 1.0
    assert "in f16" in found.message


def test_root_of_the_width_or_another_dtype_mends_it():
    assert find_live(attend(1 / 8), "TT501", level="op") == []
    assert find_live(attend(1.0, torch.bfloat16), "TT501", level="op") == []


def steps(*tops, dtype="float16", low=0.0, phase="forward", scaled=False, **changes):
    for i, top in enumerate(tops):
        tensor = ok(2, 4, dtype=dtype, min=low, max=top, **changes)
        if scaled:
            yield Action(step=i, seq=0, action="scale")
        yield call(1, "fc", [1], [2], [ok(1), tensor], step=i, phase=phase)
        yield closing(i)


LIMIT = 32752.0


@pytest.mark.parametrize(
    ("tops", "changes", "count"),
    [
        ([LIMIT + 1] * 2, {}, 1),
        ([LIMIT] * 2, {}, 0),
        ([LIMIT + 1], {}, 0),
        ([LIMIT + 1, 1.0, 1.0, LIMIT + 1], {}, 1),
        ([LIMIT + 1, 1.0, 1.0, 1.0, LIMIT + 1], {}, 0),
        ([1.0] * 2, {"low": -40000.0}, 1),
        ([1.0] * 2, {"low": -65504.0}, 0),
        ([65504.0] * 2, {}, 0),
        ([LIMIT + 1] * 2, {"nan": 1}, 0),
        ([LIMIT + 1] * 2, {"dtype": "bfloat16"}, 0),
        ([1.8e38] * 2, {"dtype": "bfloat16"}, 1),
        ([1.8e38] * 2, {"dtype": "float32"}, 1),
        ([1.8e38] * 2, {"dtype": "float64"}, 0),
        ([400.0] * 2, {"dtype": "float8_e4m3fn"}, 0),
        ([LIMIT + 1] * 2, {"phase": "backward"}, 1),
        ([LIMIT + 1] * 2, {"phase": "backward", "scaled": True}, 0),
        ([LIMIT + 1] * 2, {"scaled": True}, 1),
    ],
)
def test_thresholds(tops, changes, count):
    assert len(find(steps(*tops, **changes), "TT501")) == count


def test_memory_that_was_never_written_means_nothing():
    big = [ok(1), ok(2, dtype="float16", max=4e4)]
    records = [r for i in range(3) for r in (op(1, "empty", [1], [2], big, step=i), closing(i))]
    assert find(records, "TT501") == []


def test_one_cause_is_told_at_the_first_place_only():
    records = [
        r
        for i in range(3)
        for r in (
            call(1, "a", [1], [2], [ok(1), ok(2, dtype="float16", max=4e4)], step=i),
            call(2, "b", [2], [3], [ok(3, dtype="float16", max=5e4)], step=i),
            closing(i),
        )
    ]
    (found,) = find(records, "TT501")
    assert found.module == "a"


def test_what_has_overflowed_is_told_by_that_alone():
    bad = ok(2, 4, dtype="float16", posinf=1, max=4e4)
    first = [call(1, "fc", [1], [2], [ok(1), bad]), closing()]
    rest = [
        type(r)(**{f: getattr(r, f) for f in r.__struct_fields__} | {"step": r.step + 1})
        for r in steps(LIMIT + 1, LIMIT + 1)
    ]
    assert {f.code for f in find([*first, *rest], "TT501", "TT101")} == {"TT101"}


def test_empty_run_is_silent():
    assert find([], "TT501") == []
    assert find([closing()], "TT501") == []
