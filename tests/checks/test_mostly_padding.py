from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, call, closing, find, module, ok
from tests.checks.traced import find_live


class Classifier(nn.Module):
    """A sentence is the mean of what attention makes of its words."""

    def __init__(self, masks):
        super().__init__()
        self.masks = masks
        self.embed = nn.Embedding(100, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens, attention_mask):
        mask = {"src_key_padding_mask": ~attention_mask.bool()} if self.masks else {}
        return self.head(self.encoder(self.embed(tokens), **mask).mean(1))


def classify(longest, masks=True, named=False):
    def program():
        model = Classifier(masks)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(6):
            lengths = torch.randint(5, 11, (8, 1))
            mask = (torch.arange(longest) < lengths).long()
            tokens = torch.randint(1, 100, (8, longest)) * mask
            logits = model(tokens, attention_mask=mask) if named else model(tokens, mask)
            adam.zero_grad()
            F.cross_entropy(logits, tokens[:, 0] % 2).backward()
            adam.step()

    return program


def test_sentences_padded_to_the_longest_of_all_are_mostly_padding():
    (found,) = find_live(classify(64), "TT609")
    assert (found.severity, found.module, found.step) == ("note", "embed", 4)
    assert found.value == pytest.approx(1 - 7.5 / 64, abs=0.03)
    assert find_live(classify(10), "TT609") == []


def test_mask_by_name_makes_it_certain():
    (found,) = find_live(classify(64, named=True), "TT609")
    assert (found.severity, found.module) == ("warning", "")
    assert "[8, 64] tokens" in found.message
    assert find_live(classify(10, named=True), "TT609") == []


def test_embedding_without_any_mask_is_seen():
    assert brief(find_live(classify(64, masks=False), "TT609")) == [("TT609", "note", "embed")]


def steps(zeros, *, name="attention_mask", path="encoder", cls="Encoder", loss=True, **changes):
    yield module(path, "weight", cls=cls, shape=(100, 4))
    for i, n in enumerate(zeros):
        tensor = ok(1, 10, 10, **{"dtype": "int64", "zeros": n, **changes})
        made = call(1, path, [1], [2], [tensor, ok(2, 10, 4)], step=i)
        yield type(made)(**{f: getattr(made, f) for f in made.__struct_fields__} | {
            "inputs": [(name, 1)]})  # fmt: skip
        if loss:
            yield Action(step=i, seq=2, action="loss", detail={"value": 1.0})
        yield closing(i)


MASK = {"name": "src_key_padding_mask", "dtype": "bool"}
TOKENS = {"name": "input[0]", "cls": "Embedding"}


@pytest.mark.parametrize(
    ("zeros", "changes", "severities"),
    [
        ([71] * 5, {}, ["warning"]),
        ([70] * 5, {}, []),
        ([71] * 4, {}, []),
        ([71] * 4 + [70] + [71] * 4, {}, []),
        ([29] * 5, MASK, ["warning"]),
        ([30] * 5, MASK, []),
        ([71] * 5, TOKENS, ["note"]),
        ([70] * 5, TOKENS, []),
        ([71] * 5, {**TOKENS, "cls": "Linear"}, []),
        ([71] * 5, {"dtype": "float32"}, []),
        ([71] * 5, {"loss": False}, []),
        ([71] * 5, {"numel": 63}, []),
    ],
)
def test_thresholds(zeros, changes, severities):
    assert [f.severity for f in find(steps(zeros, **changes), "TT609")] == severities


def test_empty_run_is_silent():
    assert find([], "TT609") == []
    assert find([closing()], "TT609") == []
