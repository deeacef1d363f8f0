from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tensortrace.records import Action
from tests.checks import brief, call, closing, find, ok
from tests.checks.traced import find_live


class Tagger(nn.Module):
    """Attention over sentences of any length; logits for each word."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


def tag(longest):
    def program():
        model = Tagger()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i in range(14):
            length = 200 if i == 12 else 8 + i % 5
            batch = [torch.randint(20, (n,))[:longest] for n in (5, 7, length)]
            tokens = pad_sequence(batch, batch_first=True)
            adam.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), (tokens % 3).flatten()).backward()
            adam.step()

    return program


def test_one_long_sentence_makes_a_batch_of_many_times_the_memory():
    (found,) = find_live(tag(1000), "TT610")
    assert (found.severity, found.step, found.module) == ("note", 12, "")
    assert "[3, 200]" in found.message
    assert found.value == pytest.approx(20.0, rel=0.2)
    assert found.evidence["nbytes"] > 15 * found.evidence["usual_nbytes"]
    assert find_live(tag(16), "TT610") == []


def steps(sizes, *, loss=True, dtype="float32", **changes):
    for i, n in enumerate(sizes):
        made = ok(2, n, 4, dtype=dtype)
        yield call(1, "", [1], [2], [ok(1, n, dtype="int64"), made], step=i, **changes)
        if loss:
            yield Action(step=i, seq=2, action="loss", detail={"value": 1.0})
        yield closing(i)


def test_thresholds_are_four_times_the_median_and_twice_the_most():
    assert brief(find(steps([10] * 10 + [41]), "TT610")) == [("TT610", "note", "")]
    assert find(steps([10] * 10 + [40]), "TT610") == []
    assert find(steps([10] * 9 + [41]), "TT610") == []
    assert find(steps([10] * 9 + [25, 50]), "TT610") == []
    assert len(find(steps([10] * 9 + [25, 51]), "TT610")) == 1
    assert len(find(steps([10] * 5 + [25]), "TT610", times=2.0, least=5)) == 1


@pytest.mark.parametrize(
    ("dtype", "said"), [("float32", "656 bytes"), ("bfloat16", "328 bytes"), ("bool", "164 bytes")]
)
def test_memory_is_counted_in_bytes_of_the_dtype(dtype, said):
    (found,) = find(steps([10] * 10 + [41], dtype=dtype), "TT610")
    assert said in found.message


def test_evaluation_and_empty_runs_are_silent():
    assert find(steps([10] * 10 + [99], grad_enabled=False), "TT610") == []
    assert find(steps([10] * 10 + [99], loss=False), "TT610") == []
    assert find([], "TT610") == []
    assert find([closing()], "TT610") == []


def test_steps_that_are_not_written_in_full_make_no_memory():
    thin = [
        type(r)(**{f: getattr(r, f) for f in r.__struct_fields__} | {"full": False})
        if hasattr(r, "full") else r
        for r in steps([10] * 10)
    ]  # fmt: skip
    last = list(steps([10] * 10 + [41]))[-3:]
    assert find([*thin, *last], "TT610") == []
