from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find
from tests.checks.traced import find_live
from tests.healthy.data import images
from tests.healthy.vision import convnet


class WithLoss(nn.Module):
    """The loss is computed inside, as in models that take labels."""

    def __init__(self, last, loss):
        super().__init__()
        self.body, self.last, self.loss = convnet(), last, loss

    def forward(self, x, y):
        return self.loss(self.last(self.body(x)), y)


def inside(last, loss):
    model = WithLoss(last, loss)
    return model, model


def outside(last, loss):
    model = nn.Sequential(convnet(), last)
    return model, lambda x, y: loss(model(x), y)


def program(place, last, loss, scaled=False):
    def run():
        model, loss_of = place(last, loss)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(2):
            x, y = images(8)
            adam.zero_grad()
            scaler.scale(0.5 * loss_of(x, y)).backward()
            scaler.step(adam)
            scaler.update()

    return run


FAULTS = {
    "softmax": (nn.Softmax(1), nn.CrossEntropyLoss(), "error"),
    "smoothed": (nn.Softmax(1), nn.CrossEntropyLoss(label_smoothing=0.1), "error"),
    "sigmoid": (nn.Sigmoid(), F.cross_entropy, "warning"),
    "nll": (nn.Softmax(1), F.nll_loss, "warning"),
    "twice": (nn.LogSoftmax(1), F.cross_entropy, "note"),
}


@pytest.mark.parametrize("place", [inside, outside])
@pytest.mark.parametrize("name", FAULTS)
def test_a_convnet_gives_its_loss_what_it_does_not_expect(place, name):
    last, loss, severity = FAULTS[name]
    (found,) = find_live(program(place, last, loss), "TT605")
    path = "last" if place is inside else "1"
    assert (found.severity, found.module, found.step) == (severity, path, 0)
    assert found.location.file == __file__


class Scores(nn.Module):
    """Scores through `squash`, which no call shows, and a loss of them; or two, on two lines."""

    def __init__(self, squash, loss, *, beside=False):
        super().__init__()
        self.body, self.squash, self.loss = convnet(), squash, loss
        self.other = nn.CrossEntropyLoss() if beside else None

    def forward(self, x, y):
        scores = self.body(x)
        loss = self.loss(self.squash(scores), y)
        if self.other is None:
            return 0.5 * loss
        return loss + self.other(scores, y)


def scored(squash, loss, **changes):
    def run():
        model = Scores(squash, loss, **changes)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(2):
            adam.zero_grad()
            model(*images(8)).backward()
            adam.step()

    return run


@pytest.mark.parametrize(
    ("squash", "loss"),
    [
        (torch.sigmoid, nn.CrossEntropyLoss()),
        (lambda scores: scores.softmax(1), nn.CrossEntropyLoss()),
        (lambda scores: scores.softmax(1), nn.NLLLoss()),
    ],
)
def test_where_no_call_made_the_probabilities_that_of_the_loss_has_the_line(squash, loss):
    (found,) = find_live(scored(squash, loss), "TT605")
    assert found.location.code == "loss = self.loss(self.squash(scores), y)"
    assert found.module == "loss"
    assert find_live(scored(lambda scores: scores, nn.CrossEntropyLoss()), "TT605") == []


def test_of_losses_on_two_lines_it_is_not_known_which():
    (found,) = find_live(scored(torch.sigmoid, nn.CrossEntropyLoss(), beside=True), "TT605")
    assert found.location.code == "model(*images(8)).backward()"
    assert (found.module, found.seq) == (None, None)


def test_op_level_and_a_scaler_make_no_difference():
    fault = program(inside, nn.Softmax(1), F.cross_entropy, scaled=True)
    (found,) = find_live(fault, "TT605", level="op")
    assert "cross entropy takes the softmax of probabilities" in found.message
    assert found.evidence["nodes"] == ["LogSoftmaxBackward0", "SoftmaxBackward0"]


@pytest.mark.parametrize("place", [inside, outside])
@pytest.mark.parametrize(
    ("last", "loss"),
    [
        (nn.Identity(), nn.CrossEntropyLoss()),
        (nn.LogSoftmax(1), nn.NLLLoss()),
        (nn.Softmax(1), lambda p, y: F.nll_loss(p.clamp_min(1e-8).log(), y)),
        (nn.Softmax(1), lambda p, y: F.mse_loss(p, F.one_hot(y, 4).float())),
        (nn.Softmax(1), lambda p, y: F.cross_entropy(10 * p, y)),
    ],
)
def test_logits_and_logarithms_are_silent(place, last, loss):
    assert find_live(program(place, last, loss), "TT605") == []


def test_attention_inside_is_no_softmax_before_the_loss():
    def run():
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        x = torch.randn(4, 6, 16)
        F.cross_entropy(model(x)[:, 0], torch.randint(16, (4,))).backward()

    assert find_live(run, "TT605", level="op") == []


def graph(*nodes):
    detail = {"graph": [list(node) for node in nodes]}
    return [Action(step=0, seq=1, action="loss", detail=detail), closing()]


def test_without_nll_above_it_is_not_certain():
    loss, log, soft = "NllLoss2DBackward0", "LogSoftmaxBackward0", "SoftmaxBackward0"
    (sure,) = find(graph((loss, [1]), (log, [2]), (soft, [])), "TT605")
    (likely,) = find(graph(("SumBackward0", [1]), (log, [2]), (soft, [])), "TT605")
    assert (sure.severity, likely.severity) == ("error", "warning")
    assert find(graph(("SumBackward0", [1]), (log, [2]), ("SigmoidBackward0", [])), "TT605") == []


def test_one_node_between_them_is_enough_to_be_silent():
    nodes = ("NllLossBackward0", [1]), ("LogSoftmaxBackward0", [2]), ("MulBackward0", [3])
    assert find(graph(*nodes, ("SoftmaxBackward0", [])), "TT605") == []


def test_nothing_says_nothing():
    assert find([], "TT605") == []
    assert brief(find([Action(step=0, seq=1, action="loss"), closing()], "TT605")) == []
    assert find(graph(), "TT605") == []


def over(probabilities, *shape, classes=5, loss=F.nll_loss):
    def run():
        model = nn.Linear(8, classes)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            sgd.zero_grad()
            y = torch.randint(classes, shape)
            loss(probabilities(model(torch.randn(*shape, 8))), y).backward()
            sgd.step()

    return run


@pytest.mark.parametrize(
    "probabilities", [lambda x: x.log_softmax(0), lambda x: x.softmax(-2).log()]
)
def test_a_softmax_over_the_batch_is_told(probabilities):
    (found,) = find_live(over(probabilities, 16), "TT605")
    assert (found.severity, found.step, found.value, found.limit) == ("warning", 0, 0, 1)
    assert "is over dim 0 of [16, 5], 16 elements, and the classes are dim 1, 5" in found.message
    assert "dim=1" in found.fix


def test_a_softmax_over_the_positions_of_a_flattened_output_is_told():
    def program(dim):
        def run():
            model = nn.Linear(8, 5)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            p = model(torch.randn(4, 6, 8)).log_softmax(dim)
            F.nll_loss(p.flatten(0, 1), torch.randint(5, (24,))).backward()
            sgd.step()

        return run

    (found,) = find_live(program(1), "TT605")
    assert "is over dim 1 of [4, 6, 5], 6 elements, and the classes are dim 2, 5" in found.message
    assert "dim=2" in found.fix
    assert find_live(program(2), "TT605") == []
    assert find_live(program(-1), "TT605") == []


def test_a_detail_that_somebody_wrote_is_no_finding():
    for dims, shape in (([0, 3], [16, 5]), ([0], [16, 5]), ([0, 1], [])):
        detail = {"value": 1.0, "beside_classes": dims, "classes_shape": shape}
        loss = Action(step=0, seq=1, action="loss", detail=detail)
        assert find([loss, closing()], "TT605") == []


def test_a_softmax_over_the_classes_is_silent():
    assert find_live(over(lambda x: x.log_softmax(1), 16), "TT605") == []
    assert find_live(over(lambda x: x.log_softmax(-1), 16), "TT605") == []
    assert find_live(over(lambda x: x.softmax(-1).log(), 16), "TT605") == []
    assert find_live(over(lambda x: x, 16, loss=F.cross_entropy), "TT605") == []
    # Of one row, of each pixel, of a view, and of pairs that are each other's classes.
    assert (
        find_live(
            over(lambda x: x[0].log_softmax(0), 16, loss=lambda p, y: F.nll_loss(p, y[0])), "TT605"
        )
        == []
    )
    assert find_live(over(lambda x: x.permute(0, 3, 1, 2).log_softmax(1), 2, 3, 4), "TT605") == []
    assert find_live(over(lambda x: x.T.log_softmax(0).T, 16), "TT605") == []
    assert find_live(over(lambda x: x.log_softmax(0), 16, classes=16), "TT605") == []


class Rated(nn.Module):
    def __init__(self, squash):
        super().__init__()
        self.last, self.squash = nn.Linear(8, 4), squash

    def forward(self, x):
        return self.squash(self.last(x))


def with_confidence(squash, loss=F.cross_entropy):
    def run():
        model = Rated(squash)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            x = torch.randn(16, 8)
            sgd.zero_grad()
            out = model(x)
            sure = torch.softmax(out * 3, 1)
            (loss(out, x[:, :4].argmax(1)) + 0.01 * sure.square().sum()).backward()
            sgd.step()

    return run


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1)]
)
@pytest.mark.parametrize(
    "squash", [lambda x: x.softmax(1), lambda x: x.softmax(1).view(-1, 4), nn.Softmax(1)]
)
def test_a_softmax_beside_it_that_the_loss_does_not_take_is_not_blamed(squash, loss):
    (found,) = find_live(with_confidence(squash, loss), "TT605")
    inside = isinstance(squash, nn.Module)
    code = "return self.squash(self.last(x))" if inside else "out = model(x)"
    assert (found.module, found.location.code) == ("squash" if inside else "", code)
    assert find_live(with_confidence(lambda x: x, loss), "TT605") == []


def test_one_that_attends_inside_is_not_blamed_for_another():
    class Attending(nn.Module):
        def __init__(self, squash):
            super().__init__()
            self.last, self.attend, self.squash = nn.Linear(8, 4), nn.Softmax(-1), squash

        def forward(self, x, y):
            x = self.attend(x @ x.T) @ x
            return F.cross_entropy(self.squash(self.last(x)), y)

    def program(squash):
        def run():
            model = Attending(squash)
            x = torch.randn(16, 8, requires_grad=True)
            model(x, torch.randint(4, (16,))).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()

        return run

    (found,) = find_live(program(lambda x: x.softmax(1)), "TT605")
    assert found.module == ""
    (found,) = find_live(program(nn.Softmax(1)), "TT605")
    assert found.module == "squash"
    assert find_live(program(nn.Identity()), "TT605") == []


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("softmax", [lambda x: x.log_softmax(0), lambda x: x.softmax(0).log()])
def test_a_softmax_over_the_batch_has_its_line(softmax, level):
    def program(softmax):
        def run():
            model = nn.Linear(8, 5)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                sgd.zero_grad()
                out = model(torch.randn(16, 8))
                logs = softmax(out)
                loss = F.nll_loss(logs, torch.randint(5, (16,)))
                sure = out.log_softmax(1).exp() * out.softmax(1)  # innocent
                (loss + 0 * sure.sum()).backward()
                sgd.step()

        return run

    (found,) = find_live(program(softmax), "TT605", level=level)
    assert found.value == 0
    assert found.location.function.endswith("<lambda>")
    assert find_live(program(lambda x: x.log_softmax(1)), "TT605", level=level) == []


def test_of_two_softmaxes_under_nll_loss_it_is_not_known_which_is_over_the_batch():
    def run():
        model, y = nn.Linear(8, 5), torch.randint(5, (16,))
        out = model(torch.randn(16, 8))
        wrong = F.nll_loss(out.log_softmax(0), y)
        right = F.nll_loss(out.log_softmax(1), y)
        (wrong + right).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    (found,) = find_live(run, "TT605")
    assert (found.seq, found.location.code) == (None, "(wrong + right).backward()")
