from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import closing, find, ok, optimizer, param
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def language(dtype, **options):
    def program():
        model = LanguageModel().to(dtype)
        adam = torch.optim.Adam(model.parameters(), lr=1e-4, **options)
        for _ in range(2):
            adam.zero_grad()
            next_word_loss(model, sentences()).backward()
            adam.step()

    return program


def test_default_epsilon_is_zero_in_float16():
    (found,) = find_live(language(torch.float16), "TT504")
    assert (found.severity, found.step, found.phase) == ("warning", 0, "optimizer")
    assert "eps 1e-08 of Adam is 0 in float16" in found.message
    assert find_live(language(torch.float16, eps=1e-4), "TT504") == []
    assert find_live(language(torch.bfloat16), "TT504") == []
    assert find_live(language(torch.float32), "TT504") == []


def classify(divide, **options):
    def program():
        model = convnet()
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
        for _ in range(12):
            x, y = images(16)
            adam.zero_grad()
            (F.cross_entropy(model(x), y, reduction="sum") / divide).backward()
            adam.step()

    return program


def test_loss_divided_until_epsilon_is_larger_than_its_gradients():
    (found,) = find_live(classify(1e10), "TT504")
    assert (found.severity, found.step) == ("warning", 9)
    assert found.value < 1e-8
    assert "steps shrink by a factor of " in found.message
    assert find_live(classify(16), "TT504") == []
    assert find_live(classify(1e10, eps=1e-15), "TT504") == []


def test_a_clipping_that_has_made_them_so_small_is_to_blame():
    def program(max_norm):
        model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(12):
            x = torch.randn(32, 16)
            adam.zero_grad()
            F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            adam.step()

    (found,) = find_live(lambda: program(1e-7), "TT504")
    assert "clipping has made them " in found.message
    assert "clip_grad_norm_" in found.location.code
    assert found.fix == "a larger max_norm than 1e-07; 1.0 is common"
    assert find_live(lambda: program(1.0), "TT504") == []


def steps(count, *, eps=1e-8, grad=1e-9, dtype="float32", cls="Adam", losses=None, skipped=False):
    sizes = grad if isinstance(grad, list) else [grad] * count
    for i in range(count):
        told = {"eps": [eps, None], "parameters": ["a", "b"]} if i == 0 else {}
        yield optimizer(1, step=i, cls=cls, skipped=skipped, **told)
        gradient = ok(2, 4, norm=2 * sizes[i]) if sizes[i] is not None else None
        yield param(2, "fc.weight", ok(1, 4, dtype=dtype), step=i, grad=gradient)
        yield closing(i, loss=losses[i] if losses else 1.0)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"grad": 0.99e-8}, 1),
        ({"grad": 1e-8}, 0),
        ({"grad": [1e-8] + [1e-9] * 9}, 0),
        ({"grad": 0.0}, 0),
        ({"grad": None}, 0),
        ({"cls": "SGD"}, 0),
        ({"cls": "RMSprop"}, 1),
        ({"skipped": True}, 0),
        ({"eps": 1e-15}, 0),
        ({"losses": [1.0] + [0.1] * 9}, 0),
        ({"losses": [1.0] + [0.11] * 9}, 1),
    ],
)
def test_thresholds_of_small_gradients(changes, count):
    assert len(find(steps(10, **changes), "TT504")) == count
    if "grad" not in changes and "losses" not in changes:
        assert find(steps(9, **changes), "TT504") == []


@pytest.mark.parametrize(
    ("eps", "dtype", "count"),
    [(2.9e-8, "float16", 1), (3e-8, "float16", 0), (1e-8, "bfloat16", 0), (1e-8, "float32", 0)],
)
def test_threshold_of_float16(eps, dtype, count):
    assert len(find(steps(1, eps=eps, grad=1.0, dtype=dtype), "TT504")) == count


def test_empty_run_is_silent():
    assert find([], "TT504") == []
    assert find([closing()], "TT504") == []
