from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.builders import make_tensor
from tests.checks import brief, call, closing, find, module, optimizer, param, row
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip


def train(init, steps=6):
    """A convolutional classifier; `init` is applied to each parameter."""

    def program():
        model = convnet()
        with torch.no_grad():
            for p in model.parameters():
                init(p)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            x, y = images(8)
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

    return program


def for_gradients(p):
    """As torchvision's and timm's convolutional networks start."""
    nn.init.kaiming_normal_(p, mode="fan_out")


def for_weights(fill):
    return lambda p: fill(p) if p.dim() > 1 else p.zero_()


def test_a_network_of_zeros_is_told_when_it_has_not_moved():
    (found,) = find_live(train(torch.Tensor.zero_), "TT403")
    assert (found.step, found.module, found.param) == (4, "0", "0.weight")
    assert "as in 4 weights in all: they cannot leave 0" in found.message


def test_a_network_of_one_constant_is_told_at_once():
    (found,) = find_live(train(lambda p: p.fill_(0.01), 1), "TT403")
    assert brief([found]) == [("TT403", "warning", "6")]  # a convolution in it has one channel
    assert "all elements of 6.weight are 0.01, as in 1 hidden layers" in found.message


def perceptron(init, dropout=0.0):
    """Of images, with sigmoids; `init` is applied to the weights."""

    def program():
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(144, 16), nn.Sigmoid(), nn.Dropout(dropout), nn.Linear(16, 4)
        )
        for layer in (model[1], model[4]):
            init(layer.weight)
            nn.init.zeros_(layer.bias)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            x, y = images(8)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()

    return program


def equal_rows(weight):
    """As equal as a layer that was widened by repeating one unit, columns included."""
    with torch.no_grad():
        weight.copy_(0.1 * torch.randn(weight.shape[1]).expand_as(weight))
        if len(weight) == 4:
            weight.fill_(0.1)


@pytest.mark.parametrize(("init", "step"), [(nn.init.zeros_, 1), (equal_rows, 0)])
def test_units_that_start_alike_and_learn_the_same_are_told(init, step):
    """Zeros behind a sigmoid do move, in the second step, and all in the same direction."""
    (found,) = find_live(perceptron(init), "TT403")
    assert (found.step, found.module, found.param) == (step, "1", "1.weight")
    assert "the 16 rows of 1.weight are alike, and so are those of its gradient" in found.message


def test_units_that_dropout_tells_apart_are_silent():
    assert find_live(perceptron(equal_rows, dropout=0.5), "TT403") == []
    assert find_live(perceptron(nn.init.xavier_normal_), "TT403") == []


@pytest.mark.parametrize(("std", "words"), [(1.0, "times the"), (1e-4, "as do 4 of 4 layers")])
def test_normal_weights_of_a_scale_far_off_are_told(std, words):
    (found,) = find_live(train(for_weights(lambda p: p.normal_(std=std)), 1), "TT403")
    assert words in found.message
    assert found.param == ("2.weight" if std == 1 else "0.weight")


@pytest.mark.parametrize(
    "fill",
    [
        nn.init.kaiming_normal_,
        for_gradients,
        nn.init.xavier_uniform_,
        lambda p: p.normal_(std=0.02),
    ],
)
def test_the_usual_initialisations_are_silent(fill):
    assert find_live(train(for_weights(fill)), "TT403") == []


def language_model(std):
    """GPT shares the weight of the embedding, for which N(0, 1) is the default, with the head."""

    def program():
        model = LanguageModel(64)
        model.embed, model.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
        nn.init.normal_(model.embed.weight, std=std)
        model.head.weight = model.embed.weight
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            adam.zero_grad()
            next_word_loss(model, sentences()).backward()
            adam.step()

    return program


def test_an_embedding_that_the_head_shares_is_judged_as_the_head():
    (found,) = find_live(language_model(1.0), "TT403")
    assert (found.step, found.module, found.param) == (0, "head", "embed.weight")
    assert "embed.weight, which head shares, starts at rms 1" in found.message
    assert find_live(language_model(0.02), "TT403") == []
    (found,) = find_live(language_model(30.0), "TT403")
    assert "the embedding embed.weight starts at rms" in found.message


def test_a_shared_embedding_whose_head_is_given_little_is_silent():
    """T5 divides what it gives to the head by the root of the width."""

    class Scaled(LanguageModel):
        def __init__(self):
            super().__init__(64)
            self.embed, self.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
            self.head.weight = self.embed.weight
            self.norm.register_forward_hook(lambda norm, given, made: made / 8)

    def program():
        model = Scaled()
        next_word_loss(model, sentences()).backward()
        torch.optim.AdamW(model.parameters()).step()

    assert find_live(program, "TT403") == []


def test_recurrent_weights_have_no_output_to_compare():
    def program(init):
        model = nn.LSTM(8, 64)
        if init:
            nn.init.normal_(model.weight_hh_l0)
        model(torch.randn(5, 2, 8))[0].sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    (found,) = find_live(lambda: program(True), "TT403")
    assert found.param == "weight_hh_l0"
    assert find_live(lambda: program(False), "TT403") == []


@pytest.mark.parametrize("gate", [False, True])
def test_zero_outputs_and_gates_that_get_a_gradient_later_are_silent(gate):
    """adaLN-Zero: a zero modulation in front of a zero output layer."""

    def program():
        modulate, out = nn.Linear(8, 16), nn.Linear(8, 1)
        for layer in (modulate, out) if gate else (out,):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        adam = torch.optim.Adam([*modulate.parameters(), *out.parameters()], lr=1e-3)
        for _ in range(8):
            x = torch.randn(16, 8)
            shift, scale = modulate(x).chunk(2, dim=1)
            adam.zero_grad()
            F.mse_loss(out((1 + scale) * x + shift), x[:, :1]).backward()
            adam.step()

    assert find_live(program, "TT403") == []


def test_equal_weights_of_layers_side_by_side_are_silent():
    """DLinear starts its two layers as averages of what came before; neither feeds the other."""

    def program():
        trend, season = nn.Linear(12, 12), nn.Linear(12, 12)
        for layer in (trend, season):
            nn.init.constant_(layer.weight, 1 / 12)
        adam = torch.optim.Adam([*trend.parameters(), *season.parameters()], lr=1e-3)
        for _ in range(3):
            x = torch.randn(8, 12)
            mean = x.mean(1, keepdim=True).expand_as(x)
            adam.zero_grad()
            F.mse_loss(trend(mean) + season(x - mean), x).backward()
            adam.step()

    assert find_live(program, "TT403") == []


def zeros(count, *, lr=0.1, live=0, skipped=False, full=True):
    """So many full steps of a weight of zeros with a gradient that is 0 but for `live` elements."""
    yield module("fc", "weight")
    for step in range(count):
        nothing = {"zeros": 16, "min": 0.0, "max": 0.0, "norm": 0.0, "std": 0.0}
        grad = make_tensor(2, 4, 4, zeros=16 - live)
        yield optimizer(1, step=step, lr=[lr], skipped=skipped)
        yield param(2, "fc.weight", make_tensor(1, 4, 4, **nothing), step=step, grad=grad)
        yield closing(step, full=full, modules=row(output_rms={"fc": 1.0}))


def test_five_steps_at_zero_are_the_limit():
    assert len(find(zeros(5), "TT403")) == 1
    assert len(find(zeros(3), "TT403", sustain=3)) == 1
    assert find(zeros(4), "TT403") == []


@pytest.mark.parametrize("how", [{"lr": 0.0}, {"live": 1}, {"skipped": True}, {"full": False}])
def test_a_zero_that_moves_or_may_not_yet_is_silent(how):
    assert find(zeros(9, **how), "TT403") == []


def first_seen(rms, out, cls="Linear", *, step=0, before=()):
    value = make_tensor(3, 16, 16, norm=rms * 16)
    made = make_tensor(2, 4, 8, norm=out * 32**0.5)
    yield module("fc", "weight", cls=cls, shape=(16, 16))
    for at in before:
        yield param(6, "head.weight", make_tensor(3, 16, 16, norm=4.0), step=at)
        yield closing(at, full=True)
    yield call(1, "fc", [1], [2], [make_tensor(1, 4, 16, norm=8.0), made], step=step)
    yield optimizer(5, step=step)
    yield param(6, "fc.weight", value, step=step)
    yield closing(step, full=True, modules=row(output_rms={"fc": 1.0}))


@pytest.mark.parametrize(
    ("rms", "out", "found"), [(1.8, 9.0, 1), (1.76, 9.0, 0), (1.8, 3.5, 0), (1.8, 3.6, 1)]
)
def test_too_large_is_five_times_he_and_shows_in_the_output(rms, out, found):
    # The limits: 5 * sqrt(2) / sqrt(16) = 1.768, and half of 5 * sqrt(2) = 3.54 times an input of 1
    assert len(find(first_seen(rms, out), "TT403")) == found
    assert find(first_seen(rms, out, cls="EqualLinear"), "TT403") == []


@pytest.mark.parametrize(
    ("step", "before", "found"), [(19, (), 1), (20, (), 0), (50, (), 0), (50, (19,), 1)]
)
def test_weights_that_may_have_been_trained_before_are_not_judged(step, before, found):
    # The optimizer may have stepped in one of the thin steps from 20 on; a head that it got later
    # is new.
    assert len(find(first_seen(1.8, 9.0, step=step, before=before), "TT403")) == found


def test_empty_input_and_a_step_without_parameters_are_silent():
    assert find([], "TT403") == []
    assert find([optimizer(), closing()], "TT403") == []
