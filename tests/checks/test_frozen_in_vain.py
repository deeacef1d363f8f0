from __future__ import annotations

import pytest
import torch
from torch import nn

from tensortrace.records import Module, ParameterInfo
from tests.checks import closing, find, optimizer, row
from tests.checks.traced import find_live


def tuning(freeze, count=6):
    """The head of a network is trained, and its body was to stay what it is."""

    def run():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        model = nn.Sequential(body, nn.Linear(8, 1))
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for i in range(count):
            freeze(model, i)
            x = torch.randn(16, 4)
            sgd.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            sgd.step()

    return run


def of_module(model, i):
    model[0].requires_grad = False


def of_children(model, i):
    for child in model.children():
        child.requires_grad = False


def of_parameters(model, i):
    for parameter in model[0].parameters():
        parameter.require_grad = False


def later(model, i):
    if i == 3:
        model[0].requires_grad = False


@pytest.mark.parametrize(
    ("freeze", "step", "words"),
    [
        (of_module, 0, "`requires_grad = False` on module 0 freezes nothing, torch does not know "
         "it: 4 parameters are trained, 0.0.weight, 0.0.bias, 0.2.weight, 0.2.bias"),
        (of_children, 0, "on 2 modules freezes nothing, torch does not know it: 6 parameters"),
        (of_parameters, 0, "`require_grad = False` on parameters freezes nothing"),
        (later, 3, "`requires_grad = False` on module 0 freezes nothing"),
    ],
)  # fmt: skip
def test_what_freezes_nothing_is_told(freeze, step, words):
    (found,) = find_live(tuning(freeze), "TT411")
    assert (found.severity, found.step) == ("warning", step)
    assert words in found.message
    assert found.location.file == __file__


def properly(model, i):
    model[0].requires_grad_(False)


def twice(model, i):
    """It keeps in mind what it did."""
    model[0].requires_grad_(False)
    model[0].requires_grad = False


def but_for_its_end(model, i):
    """It says what it is, and its last layer is tuned."""
    model[0].requires_grad = False
    model[0][0].requires_grad_(False)


def otherwise(model, i):
    model[0].requires_grad = True
    model[0].requires_graph = model[0].trainable = False


@pytest.mark.parametrize(
    "freeze", [properly, twice, but_for_its_end, otherwise, lambda model, i: None]
)
def test_what_is_frozen_or_was_not_to_be_is_silent(freeze):
    assert find_live(tuning(freeze), "TT411") == []


def held(frozen, ratio, *, grad=True, stepped=True):
    parameters = [ParameterInfo(name, (4, 4), requires_grad=grad) for name in ("weight", "bias")]
    yield Module(step=0, path="body", cls="Body", frozen=frozen if "." not in frozen[0] else [])
    yield Module(step=0, path="body.fc", cls="Linear", parameters=parameters,
                 frozen=frozen if "." in frozen[0] else [])  # fmt: skip
    if stepped:
        yield optimizer()
    yield closing(modules=row(update_ratio={"body.fc": ratio}))


@pytest.mark.parametrize("frozen", [["requires_grad"], ["weight.require_grad"]])
def test_only_what_an_optimizer_has_moved_counts(frozen):
    (found,) = find(held(frozen, 1e-9), "TT411")
    names = ["body.fc.weight", "body.fc.bias"][: found.value]
    assert found.evidence["parameters"] == names
    assert len(names) == (2 if frozen == ["requires_grad"] else 1)
    assert find(held(frozen, 0.0), "TT411") == []
    assert find(held(frozen, None), "TT411") == []
    assert find(held(frozen, 0.1, grad=False), "TT411") == []
    assert find(held(frozen, 0.1, stepped=False), "TT411") == []


def test_other_paths_that_begin_alike_are_not_inside():
    records = list(held(["requires_grad"], 0.1))
    records[0] = Module(step=0, path="bod", cls="Body", frozen=["requires_grad"])
    assert find(records, "TT411") == []
