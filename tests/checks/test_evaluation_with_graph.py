from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, call, closing, find, module, ok, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, loader
from tests.healthy.vision import convnet


def classifier(guard, with_loader, *, evaluate=True):
    def run():
        model = convnet(4)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        train = loader(32) if with_loader else [images(16) for _ in range(2)]
        test = loader(48) if with_loader else [images(16) for _ in range(3)]
        for _ in range(2):
            model.train()
            for x, y in train:
                adam.zero_grad()
                F.cross_entropy(model(x), y).backward()
                adam.step()
            model.eval()
            with guard():
                for x, _ in test if evaluate else ():
                    (model(x).argmax(1) == 0).sum().item()

    return run


@pytest.mark.parametrize("with_loader", [True, False])
def test_validation_of_a_classifier_keeps_its_graph(with_loader):
    (found,) = find_live(classifier(contextlib.nullcontext, with_loader), "TT704")
    assert (found.severity, found.module, found.limit) == ("warning", "", 2)
    assert "runs in eval mode with gradients enabled" in found.message
    assert "model(x)" in found.location.code
    for guard in (torch.no_grad, torch.inference_mode):
        assert find_live(classifier(guard, with_loader), "TT704") == []


def test_one_finding_in_a_thinned_log_too():
    found = find_live(classifier(contextlib.nullcontext, True), "TT704", every=3)
    assert len(found) == 1


def test_training_in_eval_mode_and_gradients_of_inputs_have_use_for_the_graph():
    def run():
        model = convnet(4).eval()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for i in range(6):
            x, y = images(8)
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y)
            if i % 2:
                torch.autograd.grad(loss, x)
                continue
            loss.backward()
            sgd.step()
            sgd.zero_grad()

    assert find_live(run, "TT704") == []


def test_a_target_network_that_is_detached_is_silent():
    def run():
        online, target = convnet(4), convnet(4).eval()
        sgd = torch.optim.SGD(online.parameters(), lr=0.01)
        for _ in range(4):
            x, _ = images(8)
            F.mse_loss(online(x), target(x).detach()).backward()
            sgd.step()
            sgd.zero_grad()

    assert find_live(run, "TT704") == []


def steps(count, *, calls=1, held=("a.weight",), trains=False, **changes):
    yield module("a", "weight")
    yield optimizer(parameters=list(held))
    yield closing(0)
    for i in range(1, count + 1):
        for n in range(calls):
            fields = {"training": False, **changes}
            made = ok(n, requires_grad=changes.get("grad_enabled", True))
            yield call(n, "a", [], [n], [made], step=i, **fields)
        if trains:
            yield Action(step=i, seq=90, action="loss")
        yield closing(i)


def test_two_batches_are_the_edge_and_a_setting():
    assert find(steps(1), "TT704") == []
    assert brief(find(steps(2), "TT704")) == [("TT704", "warning", "a")]
    assert len(find(steps(1, calls=2), "TT704")) == 1
    assert find(steps(2), "TT704", batches=3) == []
    assert find(steps(5, trains=True), "TT704") == []


def validations(count, **changes):
    """Each of one batch, as far as a thinned run looks at it, with training between them."""
    for i in range(0, 2 * count, 2):
        yield module("a", "weight", step=i)
        yield optimizer(parameters=["a.weight"], step=i)
        yield closing(i)
        fields = {"training": False, **changes}
        made = ok(1, requires_grad=changes.get("grad_enabled", True))
        yield call(1, "a", [], [1], [made], step=i + 1, **fields)
        yield closing(i + 1)


def test_three_validations_are_the_edge_where_only_the_first_batch_is_met():
    assert find(validations(2), "TT704") == []
    (found,) = find(validations(3), "TT704")
    assert (found.value, found.limit, found.step) == (3, 3, 5)
    assert find(validations(3), "TT704", apart=4) == []
    assert find(validations(9, grad_enabled=False), "TT704") == []


def test_what_is_not_evaluated_or_not_trained_is_silent():
    assert find(steps(3, training=True), "TT704") == []
    assert find(steps(3, grad_enabled=False), "TT704") == []
    assert find(steps(3, held=("b.weight",)), "TT704") == []


def test_nothing_says_nothing():
    assert find([], "TT704") == []
    assert find([optimizer(parameters=[]), closing(), closing(1), closing(2)], "TT704") == []


def test_layers_that_are_called_one_by_one_are_one_pass():
    def run():
        layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2))
        layers.eval()
        x = torch.zeros(1, 4)
        for layer in layers:  # to learn the shapes
            x = layer(x)
        layers.train()
        sgd = torch.optim.SGD(layers.parameters(), 0.1)
        for _ in range(4):
            sgd.zero_grad()
            F.cross_entropy(layers(torch.randn(8, 4)), torch.zeros(8, dtype=torch.int64)).backward()
            sgd.step()

    assert find_live(run, "TT704") == []
