from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, call, closing, find, module, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import Encoder
from tests.healthy.vision import convnet


def classifier(back=False, freeze=False):
    def run():
        model = convnet(4)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            if back:
                model.train()
            for _ in range(2):
                x, y = images(8)
                adam.zero_grad()
                F.cross_entropy(model(x), y).backward()
                adam.step()
            if freeze:
                for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
                    norm.eval()
                continue
            model.eval()
            with torch.no_grad():
                model(images(8)[0])

    return run


@pytest.mark.parametrize("every", [1, 4])
def test_validation_leaves_a_classifier_in_eval_mode(every):
    (found,) = find_live(classifier(), "TT701", every=every)
    assert (found.severity, found.value, found.limit) == ("warning", 3, 3)
    assert "Sequential is in eval mode since step" in found.message
    assert "model.eval()" in found.location.code
    assert any(path for path in found.evidence["modules"])


def test_is_found_where_the_steps_that_are_looked_at_have_no_update():
    """Past step 20 those are the multiples of ten; here the updates come in odd steps."""

    def run():
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i in range(52):
            if i == 25:
                model.eval()
            F.mse_loss(model(torch.rand(8, 4)), torch.rand(8, 2)).backward()
            if i % 2:
                adam.step()
                adam.zero_grad()

    (found,) = find_live(run, "TT701", every="auto")
    assert (found.step, found.value) == (30, 3)


def test_train_at_the_top_of_the_epoch_and_frozen_norms_are_silent():
    assert find_live(classifier(back=True), "TT701") == []
    assert find_live(classifier(freeze=True), "TT701") == []


def test_a_transformer_that_is_fine_tuned_in_eval_mode_from_the_start_may_be_meant():
    def run():
        model = Encoder().eval()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(5):
            tokens = sentences(4)
            F.cross_entropy(model(tokens), (tokens[:, 0] > 10).long()).backward()
            adam.step()
            adam.zero_grad()

    assert find_live(run, "TT701") == []


def validated_first(evaluations, made_in_eval=False, back=False):
    def run():
        model = convnet(4).train(not made_in_eval)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i in range(12):
            if i % (12 // evaluations) == 0:
                model.eval()
                with torch.no_grad():
                    model(images(8)[0])
                if back:
                    model.train()
            x, y = images(8)
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

    return run


@pytest.mark.parametrize("made_in_eval", [False, True])
def test_validation_before_the_first_update_leaves_it_in_eval_mode(made_in_eval):
    """What comes back for validation after updates takes the network to be in train mode."""
    (found,) = find_live(validated_first(4, made_in_eval), "TT701")
    assert (found.severity, found.limit) == ("warning", 3)
    assert "model.eval()" in found.location.code


def test_validated_once_before_and_once_behind_training_may_be_meant():
    assert find_live(validated_first(2), "TT701") == []
    assert find_live(validated_first(4, back=True), "TT701") == []


def steps(count, *, cls="Dropout", of="Net", held=("a.weight",), back=(), reached=True):
    yield module("a", "weight", cls="Net")
    yield module("a.drop", cls=cls, training=False)
    yield optimizer(parameters=list(held))
    yield closing(0)
    yield Action(step=1, seq=0, action="eval", of=of)
    for i in range(1, count + 1):
        if i in back:
            yield Action(step=i, seq=1, action="train", of=of)
        yield call(2, "a", [], [1], step=i, training=False)
        yield call(3, "a.drop", [], [1], step=i, training=False, parent=2)
        if reached:
            yield call(4, "a", [], [], step=i, phase="backward", forward=2)
        yield optimizer(step=i)
        yield closing(i)


def test_three_updates_are_the_edge_and_a_setting():
    assert find(steps(2), "TT701") == []
    assert brief(find(steps(3), "TT701")) == [("TT701", "warning", "a")]
    assert len(find(steps(2), "TT701", sustain=2)) == 1
    assert len(find(steps(3, of="a"), "TT701")) == 1


def test_what_makes_no_difference_is_silent():
    assert find(steps(5, cls="LayerNorm"), "TT701") == []
    assert find(steps(5, of="Teacher"), "TT701") == []
    assert find(steps(5, held=("b.weight",)), "TT701") == []
    assert find(steps(5, back=(3,)), "TT701") == []
    assert find(steps(5, reached=False), "TT701") == []


def test_a_dropout_that_drops_nothing_makes_no_difference():
    def run(share):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(share), nn.Linear(8, 2))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i in range(8):
            if i == 2:
                model.eval()
            F.mse_loss(model(torch.rand(8, 4)), torch.rand(8, 2)).backward()
            adam.step()
            adam.zero_grad()

    assert find_live(lambda: run(0.0), "TT701") == []
    assert len(find_live(lambda: run(0.1), "TT701")) == 1


def test_nothing_says_nothing():
    assert find([], "TT701") == []
    evaluated = [Action(step=0, seq=i, action="eval", of="Net") for i in range(3)]
    assert find([*evaluated, closing()], "TT701") == []
