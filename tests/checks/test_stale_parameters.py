from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn

from tests.checks import closing, find, module, optimizer, row
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import WORDS, LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def train(model, adam, steps=5):
    for _ in range(steps):
        next_word_loss(model, sentences()).backward()
        adam.step()
        adam.zero_grad()


def resize(model, words):
    """What resize_token_embeddings does."""
    embed = nn.Embedding(words, 16)
    embed.weight.data[:WORDS] = model.embed.weight.data
    model.embed, model.head = embed, nn.Linear(16, words, bias=False)
    model.head.weight = embed.weight


def language(*, resized_first, before=0):
    def program():
        model = LanguageModel()
        if resized_first:
            resize(model, WORDS + 4)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        train(model, adam, before)
        if not resized_first:
            resize(model, WORDS + 4)
        train(model, adam)

    return program


def test_embedding_resized_after_the_optimizer_was_made_is_told():
    (found,) = find_live(language(resized_first=False), "TT401", "TT405")
    assert (found.code, found.severity, found.step) == ("TT405", "warning", 3)
    assert (found.param, found.value) == ("embed.weight", 1)
    assert "embed.weight [24, 16] for [20, 16]" in found.message
    assert "adam.step()" in found.location.code
    assert find_live(language(resized_first=True), "TT401", "TT405") == []


def test_embedding_resized_in_the_middle_of_the_run_is_told():
    (found,) = find_live(language(resized_first=False, before=3), "TT401", "TT405")
    assert (found.code, found.step) == ("TT405", 6)
    assert "embed.weight [24, 16] for [20, 16]" in found.message
    assert find_live(language(resized_first=True, before=3), "TT401", "TT405") == []


def classify(change, *, first):
    def program():
        model = convnet()
        if first:
            model = change(model)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        if not first:
            model = change(model)
        for _ in range(5):
            x, y = images(8)
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            sgd.zero_grad()

    return program


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[4])
    return model


def two_classes(*, replaced_first):
    """A network whose head is exchanged for one of two classes."""

    def program():
        model = convnet()
        model.requires_grad_(False)
        model[-1].requires_grad_(True)
        head = nn.Linear(model[-1].in_features, 2)
        if replaced_first:
            model[-1] = head
        sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
        model[-1] = head
        for _ in range(9):
            x, y = images(8)
            F.cross_entropy(model(x), y % 2).backward()
            sgd.step()
            sgd.zero_grad()

    return program


def test_a_replaced_head_is_told_with_its_bias_and_once():
    (found,) = find_live(two_classes(replaced_first=False), "TT401", "TT405", "TT409")
    assert (found.code, found.value) == ("TT405", 2)
    assert [name.rpartition(".")[2] for name in found.evidence["parameters"]] == ["weight", "bias"]
    assert find_live(two_classes(replaced_first=True), "TT401", "TT405", "TT409") == []


def test_deep_copy_that_is_trained_in_place_of_its_original_is_an_error():
    (found,) = find_live(classify(copy.deepcopy, first=False), "TT401", "TT405")
    assert (found.code, found.severity, found.step) == ("TT405", "error", 3)
    assert found.value == len(list(convnet().parameters()))
    assert find_live(classify(copy.deepcopy, first=True), "TT401", "TT405") == []


def test_model_that_is_evaluated_at_the_end_of_each_turn_is_told():
    def program():
        held, trained = LanguageModel(), LanguageModel()
        adam = torch.optim.Adam(held.parameters(), lr=1e-3)
        for _ in range(5):
            trained.train()
            next_word_loss(trained, sentences()).backward()
            adam.step()
            adam.zero_grad()
            trained.eval()
            with torch.no_grad():
                next_word_loss(trained, sentences())

    (found,) = find_live(program, "TT401", "TT405", "TT409")
    assert (found.code, found.severity, found.step) == ("TT405", "error", 3)


def test_weight_norm_after_the_optimizer_is_told():
    (found, *rest) = find_live(classify(with_weight_norm, first=False), "TT405")
    assert rest == []
    assert found.param == "4.parametrizations.weight.original1"
    assert find_live(classify(with_weight_norm, first=True), "TT405") == []


def steps(count=6, *, unowned=((4, 4),), shape=(4, 4), no_grad=1, held=("a.weight", "group0.1")):
    yield module("a", "weight")
    yield module("b", "weight", shape=shape)
    for step in range(count):
        first = {"parameters": list(held), "unowned": list(unowned)} if not step else {}
        yield structs.replace(optimizer(step=step, no_grad=no_grad), **first)
        yield closing(step, modules=row(param_grad_rms={"a": 1.0, "b": 1.0}))


def test_four_steps_running_are_the_limit():
    (found,) = find(steps(4), "TT405")
    assert (found.step, found.severity, found.param) == (3, "error", "b.weight")
    assert find(steps(3), "TT405") == []
    assert len(find(steps(3), "TT405", updates=3)) == 1


def test_another_first_dim_is_a_warning_and_any_other_shape_is_silent():
    (found,) = find(steps(shape=(6, 4)), "TT405")
    assert found.severity == "warning"
    assert find(steps(shape=(4, 6)), "TT405") == []
    assert find(steps(shape=(6,), unowned=((4,),)), "TT405") == []
    assert [f.severity for f in find(steps(unowned=((4, 4), (9,)), no_grad=2), "TT405")] == [
        "warning"
    ]


def test_free_parameters_with_gradients_and_models_that_are_held_are_silent():
    assert find(steps(no_grad=0), "TT405") == []
    assert find(steps(held=("a.weight", "b.weight", "group0.2")), "TT405") == []
    assert find(steps(unowned=()), "TT405") == []
    assert find([], "TT405") == []


def test_a_model_that_is_trained_through_its_copy_has_its_parameters_still():
    """An inner loop of Reptile whose optimizer was given the outer model, which never runs."""

    def program():
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        copied = copy.deepcopy(model)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            sgd.zero_grad()
            copied(torch.randn(8, 4)).square().mean().backward()
            sgd.step()

    found = [f for f in find_live(program) if f.code == "TT405"]
    assert ["holds 4 parameters that no module that ran has" in f.message for f in found] == [True]


@pytest.mark.parametrize("averaged", [True, False])
def test_a_network_that_is_frozen_while_the_other_one_learns_has_no_optimizer_either(averaged):
    """StyleGAN2's loop, whose optimizer was given the average of the generator."""

    def program():
        generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        average = copy.deepcopy(generator).requires_grad_(False)
        both = torch.optim.Adam((average if averaged else generator).parameters(), lr=1e-3)
        other = torch.optim.Adam(critic.parameters(), lr=1e-3)
        for _ in range(10):
            both.zero_grad()
            critic.requires_grad_(False)
            generator.requires_grad_(True)
            F.softplus(-critic(generator(torch.randn(16, 4)))).mean().backward()
            generator.requires_grad_(False)
            critic.requires_grad_(True)
            both.step()
            other.zero_grad()
            judged = critic(torch.cat([generator(torch.randn(8, 4)), torch.randn(8, 2) + 1]))
            F.softplus(torch.cat([judged[:8], -judged[8:]])).mean().backward()
            other.step()

    found = find_live(program, "TT401", "TT405", "TT409")
    assert [f.code for f in found] == ["TT405"] * averaged
    assert all("holds 4 parameters that no module that ran has" in f.message for f in found)
