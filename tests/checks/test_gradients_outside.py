from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def tune_head(*, frozen=False, clips=None):
    """A new head on a network in eval mode; the optimizer gets the head alone."""

    def program():
        backbone, head = convnet()[:-1].eval(), nn.Linear(16, 4)
        model = nn.Sequential(backbone, head)
        backbone.requires_grad_(not frozen)
        sgd = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(7):
            x, y = images(8)
            F.cross_entropy(model(x), y).backward()
            if clips is not None:
                nn.utils.clip_grad_norm_(clips(model, head), 1.0)
            sgd.step()
            sgd.zero_grad()

    return program


def test_backbone_that_is_not_frozen_is_a_note():
    (found,) = find_live(tune_head(), "TT208")
    assert brief([found]) == [("TT208", "note", "0.0")]
    assert (found.step, found.value, found.limit, found.param) == (4, 4, 4, "0.0.weight")
    assert "6 parameters that no optimizer holds" in found.message


def test_clipping_together_with_them_is_a_warning():
    (found,) = find_live(tune_head(clips=lambda model, head: model.parameters()), "TT208")
    assert found.severity == "warning"
    assert "clipping counts them" in found.message
    assert "clip_grad_norm_" in found.location.code


def test_clipping_what_the_optimizer_holds_stays_a_note_and_freezing_is_silent():
    (found,) = find_live(tune_head(clips=lambda model, head: head.parameters()), "TT208")
    assert found.severity == "note"
    assert find_live(tune_head(frozen=True, clips=lambda m, h: m.parameters()), "TT208") == []


def adapt(**zero):
    def program():
        model = LanguageModel()
        adam = torch.optim.Adam(model.blocks[-1].parameters(), lr=1e-3)
        for _ in range(7):
            next_word_loss(model, sentences()).backward()
            adam.step()
            model.zero_grad() if zero.get("model") else adam.zero_grad()

    return program


def test_language_model_of_which_one_block_is_trained():
    (found,) = find_live(adapt(), "TT208")
    assert "embed.weight" in found.message
    assert find_live(adapt(model=True), "TT208") == []


def zeroing(count):
    for step in range(count):
        detail = {"left": 7, "left_names": ["a.weight", "a.bias"], "grown": step}
        yield Action(step=step, seq=1, action="zero_grad", optimizer=0, detail=detail)
        yield closing(step)


def test_three_calls_are_not_enough_and_the_number_is_a_setting():
    assert find(zeroing(4), "TT208") == []
    (found,) = find(zeroing(9), "TT208")
    assert found.step == 4
    assert "a.weight, a.bias, ..." in found.message
    assert len(find(zeroing(4), "TT208", sustain=3)) == 1


def test_nothing_says_nothing():
    assert find([], "TT208") == []
    assert find([Action(step=0, seq=1, action="zero_grad"), closing()], "TT208") == []
