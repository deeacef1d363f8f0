from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.builders import make_tensor
from tests.checks import brief, closing, find, module, optimizer, param
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss


def tied(model):
    model.head.weight = model.embed.weight


def copied(model):
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())


def copied_as_a_part(model):
    model.head = copy.deepcopy(model.head)


def copied_as_a_whole(model):
    model.blocks = copy.deepcopy(model).blocks


def of_one_storage(model):
    """Two parameters over the same memory: what each is given moves both."""
    model.head.weight = nn.Parameter(model.embed.weight.data)


def of_its_own(model):
    model.head.weight = nn.Parameter(0.02 * torch.randn(20, 16))


def train(change):
    def program():
        model = LanguageModel()
        change(model)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            adam.zero_grad()
            next_word_loss(model, sentences()).backward()
            adam.step()

    return program


@pytest.mark.parametrize("change", [copied, copied_as_a_part])
def test_a_head_that_began_as_a_copy_of_the_embedding_is_told(change):
    (found,) = find_live(train(change), "TT407")
    assert brief([found]) == [("TT407", "warning", "head")]
    assert found.step == 1
    assert "embed.weight and head.weight had the same 320 elements, and 1 opt" in found.message
    assert found.fix.startswith("head.weight = embed.weight, the Parameter itself")


@pytest.mark.parametrize("change", [tied, copied_as_a_whole, of_one_storage, of_its_own])
def test_one_tensor_or_two_that_never_were_equal_are_silent(change):
    assert find_live(train(change), "TT407") == []


def test_a_tie_that_breaks_while_training_is_told():
    def program():
        model = LanguageModel()
        for step in range(4):
            if step == 2:
                copied(model)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            sgd.zero_grad()
            next_word_loss(model, sentences()).backward()
            sgd.step()

    (found,) = find_live(program, "TT407")
    assert (found.step, found.module) == (3, "head")


def autoencoder(tie):
    def program():
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 144))
        if tie:
            model[3].weight = nn.Parameter(model[1].weight.detach().t().clone())
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            x, _ = images(8)
            adam.zero_grad()
            F.mse_loss(model(x), x.flatten(1)).backward()
            adam.step()

    return program


def test_a_decoder_that_begins_as_the_transposed_encoder_is_a_note():
    (found,) = find_live(autoencoder(True), "TT407")
    assert brief([found]) == [("TT407", "note", "3")]
    assert "one the transpose of the other" in found.message
    assert find_live(autoencoder(False), "TT407") == []


def test_layers_that_begin_as_copies_of_each_other_are_silent():
    """`nn.TransformerEncoder` does so itself."""

    def program():
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            sgd.zero_grad()
            model(torch.randn(4, 5, 8)).square().mean().backward()
            sgd.step()

    assert find_live(program, "TT407") == []


def two(second, *, first=None, classes=("Embedding", "Linear"), later=None):
    """Two weights [4, 8] for two steps; `later` is what the second is then."""
    for path, cls in zip("ab", classes, strict=True):
        yield module(path, "weight", cls=cls, shape=(4, 8))
    for i in range(2):
        yield optimizer(1, step=i)
        yield param(2, "a.weight", make_tensor(1, 4, 8, **(first or {})), step=i, update=i)
        fields = {**second, **((later or {}) if i else {})}
        yield param(3, "b.weight", make_tensor(2, 4, 8, **fields), step=i, update=i)
        yield closing(i)


DRIFT = {"max": 1.0000001}


@pytest.mark.parametrize(
    ("classes", "severity"),
    [
        (("Embedding", "Linear"), "warning"),
        (("Embedding", "Embedding"), "note"),
        (("Linear", "Linear"), None),
        (("Embedding", "LSTM"), None),
    ],
)
def test_what_the_two_are_decides(classes, severity):
    found = find(two({}, classes=classes, later=DRIFT), "TT407")
    assert [f.severity for f in found] == ([severity] if severity else [])


def test_the_same_elements_are_the_same_extremes_and_all_but_rounding_of_the_norm():
    norm = make_tensor(1, 4, 8).norm
    assert len(find(two({"norm": norm * (1 + 9e-6)}, later=DRIFT), "TT407")) == 1
    assert find(two({"norm": norm * (1 + 2e-5)}, later=DRIFT), "TT407") == []
    assert find(two({"min": -1.0000001}, later=DRIFT), "TT407") == []
    assert find(two({"zeros": 1}, later=DRIFT), "TT407") == []
    assert find(two({}), "TT407") == []
    constant = {"min": 0.0, "max": 0.0}
    assert find(two(constant, first=constant, later=DRIFT), "TT407") == []
    assert find([], "TT407") == []
