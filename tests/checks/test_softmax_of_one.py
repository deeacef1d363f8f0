from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import closing, find
from tests.checks.traced import find_live


class Inside(nn.Module):
    """The loss is computed inside, as in models that take labels."""

    def __init__(self):
        super().__init__()
        self.last, self.loss = nn.Linear(8, 1), nn.CrossEntropyLoss()

    def forward(self, x):
        return self.loss(self.last(x), torch.zeros(len(x), dtype=torch.long))


def training(model, loss_of, rows=16):
    def run():
        torch.manual_seed(0)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            sgd.zero_grad()
            loss_of(model, torch.randn(rows, 8)).backward()
            sgd.step()

    return run


def line(width=1, *more):
    return nn.Sequential(nn.Linear(8, width), *more)


def first(x):
    return torch.zeros(len(x), dtype=torch.long)


def positive(x):
    return (x[:, :1] > 0).float()


def segmented(model, x):
    return F.cross_entropy(model(x).view(2, 1, 2, -1), first(x).view(2, 2, -1))


def mixed(model, x):
    return F.cross_entropy(model(x), first(x)) + model(x).square().mean()


FAULTS = {
    "classes": (line(), lambda m, x: F.cross_entropy(m(x), first(x)), "error", "cross entropy"),
    "probabilities": (line(), lambda m, x: F.cross_entropy(m(x), positive(x)), "error", "cross"),
    "pixels": (line(), segmented, "error", "[2, 1, 2, 4]"),
    "inside": (Inside(), lambda m, x: m(x), "error", "(in loss)"),
    "other terms": (line(), mixed, "warning", "cross entropy of one class is 0"),
    "by hand": (line(), lambda m, x: F.nll_loss(m(x).log_softmax(1), first(x)), "error", "cross"),
    "bce": (line(1, nn.Softmax(1)), lambda m, x: F.binary_cross_entropy(m(x), positive(x)),
            "warning", "a softmax of one class is 1"),
    "mse": (line(1, nn.Softmax(-1)), lambda m, x: F.mse_loss(m(x), positive(x)),
            "warning", "its input is [16, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_loss_of_one_class_is_told(name, level):
    model, loss_of, severity, words = FAULTS[name]
    (found,) = find_live(training(model, loss_of), "TT616", level=level)
    assert (found.severity, found.step) == (severity, 0)
    assert words in found.message
    assert found.location.file == __file__


def density(model, x):
    """A mixture of one component, as a setting of their number makes it."""
    weight, mean = model(x).chunk(2, 1)
    return -torch.logsumexp(weight.log_softmax(1) - (x[:, :1] - mean).square(), 1).mean()


def gated(model, x):
    """A mixture of one expert."""
    return F.mse_loss(model(x).softmax(1) * x, torch.ones_like(x))


def attended(model, x):
    """Sequences of one element."""
    keys = model(x).unsqueeze(1)
    weights = (keys @ keys.transpose(1, 2)).softmax(-1)
    return F.mse_loss((weights @ keys).squeeze(1), torch.ones(len(x), 1))


HEALTHY = {
    "two classes": (line(2), lambda m, x: F.cross_entropy(m(x), first(x))),
    "logits": (line(), lambda m, x: F.binary_cross_entropy_with_logits(m(x), positive(x))),
    "over the rows": (line(), lambda m, x: -(m(x).log_softmax(0) * positive(x)).sum()),
    "mixture": (line(2), density),
    "gate": (line(), gated),
    "attention": (line(), attended),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_softmax_over_one_that_is_no_loss_is_silent(name):
    model, loss_of = HEALTHY[name]
    assert find_live(training(model, loss_of), "TT616") == []


def test_one_row_of_a_contrastive_loss_is_silent():
    def against_each_other(model, x):
        return F.cross_entropy(model(x) @ model(x).T, torch.arange(len(x)))

    assert find_live(training(line(4), against_each_other, rows=1), "TT616") == []
    assert find_live(training(line(4), against_each_other, rows=2), "TT616") == []


def losses(value, users=("NllLossBackward0",), node="LogSoftmaxBackward0", single=((1, [8, 1]),)):
    graph = [*([name, [len(users)]] for name in users), [node, []]]
    detail = {"value": value, "graph": graph, "single": [(len(users), s) for _, s in single]}
    return [Action(step=0, seq=0, action="loss", detail=detail), closing()]


def test_it_is_certain_where_the_loss_is_exactly_zero():
    assert [f.severity for f in find(losses(0.0), "TT616")] == ["error"]
    assert [f.severity for f in find(losses(1e-30), "TT616")] == ["warning"]
    assert [f.severity for f in find(losses(None), "TT616")] == ["warning"]
    assert [f.severity for f in find(losses(0.0, ["MulBackward0"]), "TT616")] == ["error"]
    assert find(losses(math.nextafter(0, 1), ["MulBackward0"]), "TT616") == []
    assert find(losses(0.0, node="SoftmaxBackward0"), "TT616") == []
    assert find(losses(0.0, single=()), "TT616") == []


def test_a_softmax_beside_it_that_the_loss_does_not_take_is_not_blamed():
    def beside(model, x):
        out = model(x)
        loss = F.cross_entropy(out, first(x))
        return loss + 0 * torch.cat([out, -out], 1).log_softmax(1).mean()

    (found,) = find_live(training(line(), beside), "TT616")
    assert found.location.code == "loss = F.cross_entropy(out, first(x))"
