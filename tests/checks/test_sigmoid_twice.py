from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import closing, find
from tests.checks.traced import find_live
from tests.healthy.adversarial import Generator, critic
from tests.healthy.data import images
from tests.healthy.vision import convnet


def gan(last, loss):
    """The faulty loss is that of the discriminator and, in the same step, of the generator."""

    def run():
        generator, judge = Generator(), nn.Sequential(critic(), last)
        g_opt = torch.optim.Adam(generator.parameters(), lr=1e-3)
        d_opt = torch.optim.Adam(judge.parameters(), lr=1e-3)
        for _ in range(2):
            real, fake = images(8)[0], generator(torch.randn(8, 8))
            d_opt.zero_grad()
            ones, zeros = torch.ones(8, 1), torch.zeros(8, 1)
            (loss(judge(real), ones) + loss(judge(fake.detach()), zeros)).backward()
            d_opt.step()
            g_opt.zero_grad()
            loss(judge(fake), ones).backward()
            g_opt.step()

    return run


class Tagger(nn.Module):
    """Several labels for an image; the loss is inside."""

    def __init__(self, squash):
        super().__init__()
        self.body, self.squash = convnet(), squash

    def forward(self, x, wanted):
        return F.binary_cross_entropy_with_logits(self.squash(self.body(x)).flatten(), wanted)


def tagging(squash):
    def run():
        model = Tagger(squash)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            x, y = images(8)
            sgd.zero_grad()
            model(x, F.one_hot(y, 4).float().flatten()).backward()
            sgd.step()

    return run


def test_where_no_call_made_the_probabilities_that_of_the_loss_has_the_line():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.loss = nn.Linear(8, 1), nn.BCEWithLogitsLoss()

        def forward(self, x):
            return self.loss(torch.sigmoid(self.last(x)), (x[:, :1] > 0).float())

    def run():
        model = Scores()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            sgd.zero_grad()
            model(torch.randn(16, 8)).backward()
            sgd.step()

    (found,) = find_live(run, "TT606")
    assert found.module == "loss"
    assert found.location.code.startswith("return self.loss(torch.sigmoid(")


def test_a_discriminator_that_ends_in_a_sigmoid():
    found = find_live(gan(nn.Sigmoid(), nn.BCEWithLogitsLoss()), "TT606")
    assert [f.severity for f in found] == ["error", "error"]  # one for each loss
    assert {f.module for f in found} == {"Sequential.1"}
    assert "gets what sigmoid returned (made in Sequential.1)" in found[0].message
    assert find_live(gan(nn.Identity(), nn.BCEWithLogitsLoss()), "TT606") == []
    assert find_live(gan(nn.Sigmoid(), nn.BCELoss()), "TT606") == []


@pytest.mark.parametrize("level", ["module", "op"])
def test_a_loss_inside_the_model(level):
    (found,) = find_live(tagging(torch.sigmoid), "TT606", level=level)
    assert (found.severity, found.step) == ("error", 0)
    assert find_live(tagging(lambda x: x), "TT606", level=level) == []


def test_softmax_there_is_a_warning():
    (found,) = find_live(tagging(lambda x: x.softmax(1)), "TT606")
    assert found.severity == "warning"


def graph(*nodes):
    detail = {"graph": [list(node) for node in nodes]}
    return [Action(step=0, seq=1, action="loss", detail=detail), closing()]


def test_only_what_comes_straight_from_a_sigmoid_counts():
    bce, sigmoid = "BinaryCrossEntropyWithLogitsBackward0", ("SigmoidBackward0", [])
    assert len(find(graph((bce, [1]), sigmoid), "TT606")) == 1
    assert find(graph((bce, [1]), ("MulBackward0", [2]), sigmoid), "TT606") == []
    assert find(graph(("BinaryCrossEntropyBackward0", [1]), sigmoid), "TT606") == []


def test_nothing_says_nothing():
    assert find([], "TT606") == []
    assert find([Action(step=0, seq=1, action="loss"), closing()], "TT606") == []
    assert find(graph(), "TT606") == []
