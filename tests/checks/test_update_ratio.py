from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.builders import make_tensor
from tests.checks import closing, find, module, optimizer, param, row
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def language(lr):
    def program():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(12):
            next_word_loss(model, sentences()).backward()
            adam.step()
            adam.zero_grad()

    return program


def test_rate_of_one_for_adam_rewrites_a_language_model_in_each_step():
    (found,) = find_live(language(1.0), "TT402")
    assert (found.severity, found.step, found.limit) == ("warning", 0, 1.0)
    assert found.value > 3
    assert "times their norm, the median of" in found.message
    assert "lower" in found.fix and "higher" not in found.fix
    assert find_live(language(1e-3), "TT402") == []


def classify(lr, scale=1.0):
    def program():
        model = convnet()
        sgd = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(21):
            x, y = images(8)
            (scale * F.cross_entropy(model(x), y)).backward()
            sgd.step()
            sgd.zero_grad()

    return program


def test_rate_of_a_hundred_for_sgd_is_one_finding_though_it_lasts():
    (found,) = find_live(classify(100.0), "TT402")
    assert (found.step, found.limit) == (0, 1.0)


def test_loss_scaled_down_until_nothing_moves_is_told():
    (found,) = find_live(classify(0.01, scale=1e-5), "TT402")
    assert (found.step, found.limit) == (19, 1e-6)
    assert "each of the first 20 optimizer steps" in found.message
    assert find_live(classify(0.01), "TT402") == []


def steps(count, ratio, *, cls="Linear", shape=(4, 4), lr=0.1, other=None, kind="SGD", **changes):
    yield module("a", "weight", shape=shape, cls=cls)
    yield module("b", "weight")
    for step in range(count):
        rate = lr(step) if callable(lr) else lr
        yield optimizer(step=step, lr=[rate], cls=kind, **changes)
        now = ratio(step) if callable(ratio) else ratio
        yield closing(step, modules=row(update_ratio={"a": now, "b": other}))


@pytest.mark.parametrize(("ratio", "count", "found"), [(0.31, 8, 1), (0.31, 7, 0), (0.3, 30, 0)])
def test_limit_of_what_is_too_far(ratio, count, found):
    assert len(find(steps(count, ratio), "TT402")) == found


def test_what_starts_at_zero_or_has_one_dim_is_silent():
    assert find(steps(40, lambda step: 1 / (step + 1)), "TT402") == []
    assert find(steps(40, 0.9, shape=(4,)), "TT402") == []
    assert find(steps(40, 0.9, skipped=True), "TT402") == []
    assert find(steps(40, 0.9, kind="LBFGS"), "TT402") == []
    assert len(find(steps(40, 0.9), "TT402", high=0.8, sustain=40)) == 1


@pytest.mark.parametrize(("ratio", "count", "found"), [(9e-7, 20, 1), (9e-7, 19, 0), (1e-6, 40, 0)])
def test_limit_of_what_hardly_moves(ratio, count, found):
    assert len(find(steps(count, ratio), "TT402")) == found


@pytest.mark.parametrize(
    ("ratios", "found"), [((1.1, 1.1, 0.1), 1), ((9.0, 1.0, 0.1), 0), ((9.0, 9.0), 0)]
)
def test_median_of_three_modules_in_one_step_is_enough(ratios, found):
    paths = "abc"[: len(ratios)]
    records = [module(path, "weight") for path in paths]
    moved = row(update_ratio=dict(zip(paths, ratios, strict=True)))
    records += [optimizer(), closing(modules=moved)]
    assert len(find(records, "TT402")) == found
    assert find([module("d", "weight", cls="Embedding"), *records], "TT402", least=4) == []


def test_warm_up_embeddings_and_layers_beside_others_that_move_are_silent():
    assert find(steps(40, 1e-8, lr=lambda step: step * 1e-6), "TT402") == []
    assert find(steps(40, 1e-8, cls="Embedding"), "TT402") == []
    assert find(steps(40, 1e-8, other=1e-3), "TT402") == []
    assert find(steps(40, 0.0), "TT402") == []


def test_steps_count_from_the_end_of_a_warm_up():
    def warm(top):
        return lambda step: top * min(step + 1, 5) / 5

    for lr, count, found in [(warm(0.1), 24, []), (warm(0.1), 25, [24]), (lambda s: s, 60, [])]:
        assert [f.step for f in find(steps(count, 1e-8, lr=lr), "TT402")] == found
    (told,) = find(steps(30, 1e-8, lr=warm(0.1)), "TT402")
    assert "each of the first 20 optimizer steps since a learning rate rose" in told.message
    for ratio in (lambda step: 2e-6 if step == 4 else 1e-8, lambda step: step * 2e-7):
        assert find(steps(60, ratio, lr=warm(0.1)), "TT402") == []


def test_weights_that_moved_before_have_converged():
    assert find(steps(60, lambda step: 1e-8 if step > 3 else 1e-3), "TT402") == []
    assert find([], "TT402") == []


def grown_from_zero(count, ratio):
    """Three modules of which the first step finds the weights at 0."""
    paths = "abc"
    yield from (module(path, "weight") for path in paths)
    for step in range(count):
        yield optimizer(step=step)
        zeros = 16 if step == 0 else 0
        for i, path in enumerate(paths):
            value = make_tensor(900 + i, 4, 4, zeros=zeros)
            yield param(1001 + i, f"{path}.weight", value, step=step)
        now = None if step == 0 else ratio(step)
        yield closing(step, modules=row(update_ratio=dict.fromkeys(paths, now)))


def test_what_grows_from_zero_is_let_grow():
    assert find(grown_from_zero(30, lambda step: 3 / step), "TT402") == []
    (found,) = find(grown_from_zero(30, lambda step: 3 / step), "TT402", young=0)
    assert (found.step, found.value) == (1, 3.0)


@pytest.mark.parametrize(("count", "steps"), [(24, []), (25, [24])])
def test_what_has_grown_for_long_or_come_to_rest_once_is_looked_at(count, steps):
    assert [f.step for f in find(grown_from_zero(count, lambda step: 0.9), "TT402")] == steps
    (found,) = find(grown_from_zero(18, lambda step: 1.1 if step != 5 else 0.3), "TT402")
    assert found.step == 6


def warmed_up(momentum):
    def program():
        first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        third = nn.Linear(8, 8)
        model = nn.Sequential(first, second, third)
        for layer in model:
            nn.init.zeros_(layer.weight)
        x = torch.randn(64, 8)
        y = torch.randn(64, 8)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=momentum)
        for step in range(30):
            for group in sgd.param_groups:
                group["lr"] = 1e-2 * min(1, (step + 1) / 20)
            loss = sum(F.mse_loss(x + layer(x), y) for layer in model)
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    return program


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_warm_up_from_zero_is_silent(momentum):
    assert find_live(warmed_up(momentum), "TT402") == []


def embedded(scale, lr, steps=16):
    """Points near the middle of the ball that grow apart, as Poincare embeddings begin."""

    def program():
        points = nn.Embedding(24, 5)
        nn.init.uniform_(points.weight, -scale, scale)
        sgd = torch.optim.SGD(points.parameters(), lr)
        for step in range(steps):
            parent = torch.arange(24) // 2
            others = (parent + 1 + step % 20) % 24
            near = (points(torch.arange(24)) - points(parent)).square().sum(1)
            apart = (points(torch.arange(24)) - points(others)).square().sum(1)
            sgd.zero_grad()
            F.softplus(near - 1.4 * apart).sum().backward()
            sgd.step()

    return program


def test_weights_that_begin_far_below_their_scale_may_grow():
    assert find_live(embedded(1e-3, 0.4), "TT402") == []
    (found,) = find_live(embedded(0.3, 40.0), "TT402")
    assert found.module == ""


@pytest.mark.parametrize(("norm", "steps"), [(0.0199, []), (0.0201, [7])])
def test_small_is_a_hundredth_of_the_scale_of_the_fan_in(norm, steps):
    """Of 16 elements and a fan-in of 4 a root mean square of 0.01 / 2 is a norm of 0.02."""
    records = [module("a", "weight")]
    for step in range(10):
        value = make_tensor(900, 4, 4, norm=norm if step == 0 else 1.0)
        records += [
            optimizer(step=step),
            param(1001, "a.weight", value, step=step),
            closing(step, modules=row(update_ratio={"a": 0.5})),
        ]
    assert [f.step for f in find(records, "TT402")] == steps
