from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import brief, call, closing, find, module, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import line, sentences


class Forecast(nn.Module):
    """An LSTM that says one number about a sequence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


def training(loss_of, fixed=False):
    def program():
        model = Forecast()
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            tokens = sentences(n=8)
            target = tokens.float().mean(1)
            made = model(tokens)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = loss_of(made.squeeze(-1) if fixed else made, target)
            adam.zero_grad()
            loss.backward()
            adam.step()

    return program


LOSSES = {
    "mse": F.mse_loss,
    "module": nn.SmoothL1Loss(),
    "huber of the target first": lambda made, target: F.huber_loss(target, made),
    "by hand": lambda made, target: ((made - target) ** 2).mean(),
    "the other way round": lambda made, target: (target - made).abs().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_repair_squeezes_the_side_that_has_a_dim_too_many(name):
    (found,) = find_live(training(LOSSES[name]), "TT604")
    assert found.fix.startswith("prediction.squeeze(-1): ")
    if name in ("by hand", "the other way round"):
        return  # a dim that was given on purpose
    (found,) = find_live(training(lambda made, target: LOSSES[name](made[:, 0], target[:, None])),
                         "TT604")  # fmt: skip
    assert found.fix.startswith("target.squeeze(-1): ")


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", LOSSES)
def test_predictions_with_a_last_dim_of_one_meet_targets_without(name, level):
    (found,) = find_live(training(LOSSES[name]), "TT604", level=level)
    by_hand = name in ("by hand", "the other way round")
    assert (found.severity, found.step) == ("warning" if by_hand else "error", 0)
    assert (found.value, found.limit) == (64, 8)
    assert "broadcasts to 64 numbers (limit 8)" in found.message
    assert found.location.file == __file__
    assert find_live(training(LOSSES[name], fixed=True), "TT604", level=level) == []


def test_pairs_that_are_meant_are_silent():
    def ranking():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        centres = torch.nn.Parameter(torch.randn(16))
        for _ in range(3):
            x, y = line(16)
            scores, y = model(x).squeeze(1), y.squeeze(1)
            apart = (scores.unsqueeze(1) - scores) * (y[:, None] - y).sign()
            quantiles = F.smooth_l1_loss(
                scores.view(4, 1, 4).expand(4, 4, 4), y.view(4, 4, 1).expand(4, 4, 4)
            )
            near = (x[:, :1] - centres).square().mean()
            loss = F.softplus(-apart).mean() + quantiles + near + (y[:, None] - scores).var()
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    assert find_live(ranking, "TT604") == []


def shapes(a, b, name="mse_loss"):
    tall = ok(1, *a, requires_grad=True)
    return find([op(0, name, [1, 2], [3], [tall, ok(2, *b)]), closing()], "TT604")


def test_it_takes_more_than_one_row_and_the_same_number_of_them():
    assert brief(shapes((2, 1), (2,))) == [("TT604", "error", "mse_loss")]
    assert brief(shapes((2,), (2, 1))) == [("TT604", "error", "mse_loss")]
    assert brief(shapes((4, 4, 1), (4, 4))) == [("TT604", "error", "mse_loss")]
    assert shapes((1, 1), (1,)) == []
    assert shapes((2, 1), (2, 1)) == []
    assert shapes((2, 1), (3,)) == []
    assert shapes((1, 2), (2,)) == []
    assert shapes((2, 1), (1, 2)) == []
    assert shapes((2, 1), (2,), "add") == []


def test_a_difference_counts_only_where_the_network_meets_data():
    assert brief(shapes((2, 1), (2,), "sub")) == [("TT604", "warning", "sub")]
    made = [op(0, "unsqueeze", [4], [1], [ok(1, 2, 1, requires_grad=True)])]
    assert find([*made, op(1, "sub", [1, 2], [3], [ok(2, 2)]), closing()], "TT604") == []
    plain = op(0, "sub", [1, 2], [3], [ok(1, 2, 1), ok(2, 2)])
    assert find([plain, closing()], "TT604") == []


@pytest.mark.parametrize("level", ["module", "op"])
def test_what_works_element_by_element_gives_no_dim(level):
    def by_hand(made, target):
        return ((made.sigmoid() * 2 - target.float()) ** 2).mean()

    (found,) = find_live(training(by_hand), "TT604", level=level)
    assert (found.severity, found.value) == ("warning", 64)
    assert found.fix.startswith("prediction.squeeze(-1): ")
    assert find_live(training(by_hand, fixed=True), "TT604", level=level) == []


GIVEN = {
    "before": lambda made: made[:, 0].unsqueeze(1).sigmoid(),
    "two before": lambda made: (1 + made[:, 0][:, None] * 2).exp(),
    "after": lambda made: made[:, 0].sigmoid()[:, None],
    "in place": lambda made: (2 * made[:, 0]).unsqueeze_(1).sigmoid(),
    "kept": lambda made: (made * torch.ones(4)).mean(1, keepdim=True).tanh(),
    "by a mask of data": lambda made: torch.where(torch.ones(8)[:, None] > 0, made, 0 * made),
}


@pytest.mark.parametrize("name", GIVEN)
def test_dim_that_was_given_on_purpose_stays_so_element_by_element(name):
    def pairs(made, target):
        return (GIVEN[name](made) - target).abs().mean()

    assert find_live(training(pairs), "TT604") == []


def test_a_loss_module_is_one_finding_at_op_level_too():
    inner = op(1, "mse_loss", [1, 2], [3], module="MSELoss", parent=0)
    outer = call(0, "MSELoss", [1, 2], [3], [ok(1, 2, 1), ok(2, 2)])
    records = [module("MSELoss", cls="MSELoss"), outer, inner, closing()]
    assert [f.seq for f in find(records, "TT604")] == [0]


def test_nothing_says_nothing():
    assert find([], "TT604") == []
    assert find([op(0, "mse_loss", [1, 2], [3]), op(1, "mse_loss", [], []), closing()],
                "TT604") == []  # fmt: skip
