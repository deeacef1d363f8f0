from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import call, closing, find, ok, op, row
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


def ranges(**counts):
    """`ranges(r12=5)`: five elements from 2 ** 12 up to 2 ** 16."""
    return tuple(counts.get(f"r{i}", 0) for i in range(16))


@pytest.mark.parametrize(
    ("top", "exponents", "changes", "count"),
    [
        (2e4, ranges(r11=74, r12=26), {}, 1),
        (2e4, ranges(r11=75, r12=25), {}, 0),
        (2e4, ranges(r11=74, r12=26), {"low": -65504.0}, 0),  # or is it the mask?
        (2e4, ranges(r11=74, r12=26)[:15], {}, 0),  # no such counts
        (2e4, ranges(r11=74, r12=26), {"dtype": "bfloat16"}, 0),
        (2e38, ranges(r15=100), {"dtype": "float32"}, 1),
        (5.0, ranges(r9=60, r12=40), {"low": -1e4}, 0),  # 1e4 taken from what is masked
        (5.0, ranges(r9=60, r12=40), {"low": -6e4}, 0),
        (5.0, ranges(r9=60, r11=1, r12=39), {"low": -6e4}, 1),  # values on the way there
        (4e4, ranges(r9=60, r12=40), {"low": -6e4}, 1),  # no mask is large and positive
        (5.0, ranges(r9=100), {"low": -6e4}, 1),  # a sample has missed it
        (4e4, ranges(r9=100), {}, 1),
    ],
)
def test_exponents_tell_a_crowd_and_a_mask(top, exponents, changes, count):
    records = steps(top, top, exponents=exponents, **changes)
    assert len(find(records, "TT501")) == count


class Sums(nn.Module):
    """Sums over a sentence in float16, of embeddings of a size."""

    def __init__(self, size, mask=None):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 64), nn.LayerNorm(64)
        self.mix, self.head = nn.Linear(64, 64), nn.Linear(64, 20)
        self.mask = mask
        with torch.no_grad():
            self.embed.weight.mul_(size)

    def forward(self, tokens):
        x = self.embed(tokens)
        scores = torch.einsum("bsd,btd->bst", self.norm(x), self.norm(x)) / 8
        if self.mask is not None:
            scores = scores + torch.full_like(scores, self.mask).triu(1)
        x = scores.softmax(-1) @ x
        return self.head(self.norm(self.mix(x)))


def sums(size, mask=None):
    def program():
        model = Sums(size, mask).half()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        for _ in range(3):
            tokens = sentences()
            sgd.zero_grad()
            logits = model(tokens).float()
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            sgd.step()

    return program


def test_crowd_is_told_before_the_largest_is_near():
    (found,) = find_live(sums(4000.0), "TT501")
    assert "within a factor of 16" in found.message
    assert found.limit == 0.25
    assert find_live(sums(1.0), "TT501") == []


@pytest.mark.parametrize("mask", [-1e4, -6e4])
def test_constant_that_is_added_as_a_mask_is_no_value(mask):
    assert find_live(sums(1.0, mask), "TT501", level="op") == []


def rises(*rms, top=8000.0, peak=4000.0, dtype="float16"):
    """A full step in which the largest is twice the rms, then thin steps."""
    tensor = ok(2, 4, dtype=dtype, min=0.0, max=top)
    yield call(1, "fc", [1], [2], [ok(1), tensor])
    yield closing(modules=row(output_rms={"fc": peak}))
    for i, value in enumerate(rms, 1):
        yield closing(i, full=False, modules=row(output_rms={"fc": value}))


@pytest.mark.parametrize(
    ("rms", "count"),
    [
        ([16_377.0] * 2, 1),
        ([16_376.0] * 2, 0),
        ([16_377.0], 0),
        ([16_377.0, 1.0, 1.0, 16_377.0], 1),
        ([16_377.0, 1.0, 1.0, 1.0, 16_377.0], 0),
        ([None, 16_377.0, 16_377.0], 1),
        ([16_377.0, *[None] * 9, 16_377.0], 1),  # of steps at rest it is not known
    ],
)
def test_slow_approach_between_full_steps_is_followed_by_rms(rms, count):
    assert len(find(rises(*rms), "TT501")) == count
    assert find(rises(*rms, dtype="int64"), "TT501") == []


def test_what_was_far_from_it_in_the_last_full_step_is_not_followed():
    assert find(rises(2e4, 2e4, top=511.0, peak=255.5), "TT501") == []
    assert len(find(rises(2e4, 2e4, top=512.0, peak=256.0), "TT501")) == 1


class Growing(nn.Module):
    """A residual stream in float16 that the caller makes larger from step to step."""

    def __init__(self):
        super().__init__()
        self.fc, self.size = nn.Linear(16, 16), 1.0

    def forward(self, x):
        return self.fc(x) * self.size


def test_growth_between_two_full_steps_is_told_before_it_overflows():
    def program():
        outer = nn.Sequential(Growing(), nn.LayerNorm(16)).half()
        x = torch.randn(8, 16).half()
        for i in range(70):
            outer[0].size = 600.0 * 1.1 ** max(0, i - 20)
            outer(x).sum().backward()

    (found,) = find_live(program, "TT501", every=50)
    assert (found.module, found.evidence["placed"]) == ("0", "module")
    assert "in the last full step" in found.message
    assert find_live(program, "TT101", every=50) != []


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
