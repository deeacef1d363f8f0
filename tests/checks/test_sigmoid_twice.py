from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import call, closing, find, ok, op
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


class Squashed(nn.Module):
    """No call shows the sigmoid inside, and the view or the cast after it."""

    def __init__(self, squash):
        super().__init__()
        self.last, self.squash = nn.Linear(8, 1), squash

    def forward(self, x):
        return self.squash(self.last(x))


class Weighted(nn.Module):
    """A loss of the user's own, whose last op is another."""

    def forward(self, x, y):
        return 2 * F.binary_cross_entropy_with_logits(x, y)


def soft_dice(x, y):
    p = torch.sigmoid(x.clamp(0, 1))  # innocent
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


def segmenting(squash, loss=F.binary_cross_entropy_with_logits, dtype=torch.float32):
    def run():
        model = Squashed(squash)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            x = torch.randn(16, 8)
            y = (x[:, :1] > 0).float()
            sgd.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                out = model(x)
                total = loss(out.float(), y) + soft_dice(out.float(), y)
            total.backward()
            sgd.step()

    return run


SQUASHES = {
    "plain": torch.sigmoid,
    "viewed": lambda x: torch.sigmoid(x).view(-1, 1),
    "cast": lambda x: torch.sigmoid(x).double(),
    "before": lambda x: torch.sigmoid(x.view(-1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SQUASHES)
def test_a_sigmoid_beside_it_that_the_loss_does_not_take_is_not_blamed(name, dtype):
    (found,) = find_live(segmenting(SQUASHES[name], dtype=dtype), "TT606")
    assert (found.module, found.location.code) == ("", "out = model(x)")
    assert find_live(segmenting(lambda x: x, dtype=dtype), "TT606") == []
    (found,) = find_live(segmenting(SQUASHES[name], dtype=dtype), "TT606", level="op")
    assert found.module == ""
    assert found.location.function.rpartition(".")[2] in ("<lambda>", "forward")


def test_beside_a_loss_of_ones_own_the_innocent_is_not_blamed_either():
    (found,) = find_live(segmenting(torch.sigmoid, Weighted()), "TT606")
    assert (found.module, found.location.code) == ("", "out = model(x)")
    (found,) = find_live(segmenting(SQUASHES["viewed"], Weighted()), "TT606")
    assert (found.module, found.location.code) == (None, "total.backward()")
    assert find_live(segmenting(lambda x: x, Weighted()), "TT606") == []


def test_each_loss_of_a_step_has_the_line_of_its_own():
    def run():
        model, loss = Squashed(lambda x: torch.sigmoid(x).view(-1)), nn.BCEWithLogitsLoss()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            x = torch.randn(16, 8)
            sgd.zero_grad()
            real = loss(model(x), torch.ones(16))
            real.backward()
            fake = loss(model(-x), torch.zeros(16))
            fake.backward()
            sgd.step()

    found = find_live(run, "TT606")
    assert [(f.step, f.location.code) for f in found] == [
        (0, "real = loss(model(x), torch.ones(16))"),
        (0, "fake = loss(model(-x), torch.zeros(16))"),
    ]


BCE, SIGMOID = "BinaryCrossEntropyWithLogitsBackward0", "SigmoidBackward0"


def recorded(*calls):
    nodes = [["AddBackward0", [1, 2]], [BCE, [3]], ["MulBackward0", [4]], [SIGMOID, [5]],
             [SIGMOID, [6]], ["AddmmBackward0", []], ["SubBackward0", []]]  # fmt: skip
    total = op(50, "add", [8, 9], [10], [ok(10, grad_fn="AddBackward0")])
    backward = Action(step=0, seq=60, action="loss", tensor=10, detail={"graph": nodes})
    return [*calls, total, backward, closing()]


def squashing(last):
    """A module that returns 2, a cast to 3 for the loss, and another sigmoid, of 5."""
    return recorded(
        call(10, "net", [1], [2], [ok(1), ok(2, grad_fn=last)]),
        op(20, "float", [2], [3], [ok(3, grad_fn="ToCopyBackward0")]),
        op(30, "binary_cross_entropy_with_logits", [3, 4], [8], [ok(4), ok(8, grad_fn=BCE)]),
        op(40, "sigmoid", [5], [6], [ok(5, grad_fn="SubBackward0"), ok(6, grad_fn=SIGMOID)]),
        op(41, "mul", [6, 4], [9], [ok(9, grad_fn="MulBackward0")]),
    )


@pytest.mark.parametrize("last", [SIGMOID, "ViewBackward0"])
def test_what_a_loss_takes_is_followed_to_the_module_that_returned_it(last):
    (found,) = find(squashing(last), "TT606")
    assert (found.module, found.seq) == ("net", 10)


def test_where_the_trail_is_lost_no_other_of_the_name_is_blamed():
    lost = [r for r in squashing(SIGMOID) if getattr(r, "seq", 0) not in {10, 20}]
    (found,) = find(lost, "TT606")
    assert found.seq == 30  # the loss itself
    lost = [r for r in lost if getattr(r, "seq", 0) != 30]
    (found,) = find(lost, "TT606")
    assert (found.module, found.seq) == (None, None)


def test_views_of_each_other_end_somewhere():
    view = "ViewBackward0"
    (found,) = find(recorded(
        op(20, "view", [2], [3], [ok(2, grad_fn=view, view_of=3), ok(3, grad_fn=view, view_of=2)]),
        op(30, "binary_cross_entropy_with_logits", [3, 4], [8], [ok(4), ok(8, grad_fn=BCE)]),
    ), "TT606")  # fmt: skip
    assert found.seq == 30
