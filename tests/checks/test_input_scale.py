from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, call, closing, find, module, ok, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, line
from tests.healthy.vision import convnet


def plain():
    """A convnet without a norm layer."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(200, 4))  # fmt: skip


def pixels(n=8):
    x, y = images(n)
    return ((x - x.min()) / (x.max() - x.min()) * 255).round(), y


def classify(model, prepare, prepare_valid=None, steps=4):
    def program():
        net = model()
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(steps):
            x, y = pixels()
            adam.zero_grad()
            F.cross_entropy(net(prepare(x)), y).backward()
            adam.step()
        if prepare_valid is not None:
            net.eval()
            with torch.no_grad():
                for _ in range(2):
                    net(prepare_valid(pixels()[0]))

    return program


def normalise(x):
    return (x / 255 - 0.3) / 0.16


def test_pixels_up_to_255_are_told_at_the_third_step():
    (found,) = find_live(classify(plain, lambda x: x), "TT601")
    assert (found.severity, found.module, found.step) == ("warning", "0", 2)
    assert "from 0 to 255" in found.message
    assert found.value > 50
    assert find_live(classify(plain, normalise), "TT601") == []


def test_pixels_divided_twice_are_too_small():
    (found,) = find_live(classify(plain, lambda x: x / 255 / 255), "TT601")
    assert "no element beyond 0.00392" in found.message
    assert find_live(classify(plain, lambda x: x / 255), "TT601") == []


def test_norm_layer_behind_the_first_makes_its_scale_harmless():
    assert find_live(classify(convnet, lambda x: x), "TT601") == []


def adversarial(scale, real_first, quiet):
    """A discriminator of pictures and of what a generator made, each flattened first."""

    def program():
        maker = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
        judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        of_maker, of_judge = (torch.optim.Adam(m.parameters(), 1e-3) for m in (maker, judge))
        bce = nn.BCEWithLogitsLoss()
        for _ in range(4):
            real = scale * torch.rand(16, 1, 8, 8)
            with torch.set_grad_enabled(not quiet):
                fake = maker(torch.randn(16, 8)).detach()
            both = [(real, torch.ones(16, 1)), (fake, torch.zeros(16, 1))]
            loss = sum(bce(judge(x), y) for x, y in (both if real_first else both[::-1]))
            of_judge.zero_grad()
            loss.backward()
            of_judge.step()
            of_maker.zero_grad()
            bce(judge(maker(torch.randn(16, 8))), torch.ones(16, 1)).backward()
            of_maker.step()

    return program


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("real_first", [False, True])
def test_what_a_generator_made_does_not_excuse_the_pictures(real_first, quiet):
    (found,) = find_live(adversarial(255, real_first, quiet), "TT601")
    assert (found.severity, found.module) == ("warning", "Sequential.1")
    assert found.value > 100
    assert find_live(adversarial(1, real_first, quiet), "TT601") == []


def twice(first, second, *, made=False):
    """One layer that is called twice in a step; the first time with what a module made, if so."""
    for i in range(3):
        data = [ok(n, 8, 8, norm=rms * 8) for n, rms in ((1, first), (2, second))]
        yield module("fc", "weight", shape=(8, 8), step=i)
        yield module("made", step=i)
        if made:
            yield call(0, "made", [9], [1], [data[0], ok(9, 8, 8)], step=i)
        for n in (1, 2):
            yield call(n, "fc", [n], [10 + n], [data[n - 1], ok(10 + n, 8, 8)], step=i)
            yield call(2 + n, "fc", [20], [], [ok(20)], step=i, phase="backward", forward=n)
        yield optimizer(6, step=i)
        yield closing(i)


def test_a_step_counts_once_and_only_if_all_data_in_it_is_out_of_scale():
    (found,) = find(twice(50.0, 50.0), "TT601")
    assert (found.step, found.evidence["steps"]) == (2, 3)
    assert find(twice(50.0, 1.0), "TT601") == find(twice(1.0, 50.0), "TT601") == []
    assert len(find(twice(1.0, 50.0, made=True), "TT601")) == 1
    assert find(twice(50.0, 1.0, made=True), "TT601") == []


def test_raw_columns_of_a_table_are_told_of_a_recurrent_network_too():
    def program(scale):
        torch.manual_seed(0)
        x, y = line(32)
        lstm, head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 1)
        sgd = torch.optim.SGD([*lstm.parameters(), *head.parameters()], lr=0.01)
        for _ in range(4):
            sgd.zero_grad()
            F.mse_loss(head(lstm((scale * x)[:, None])[0][:, -1]), y).backward()
            sgd.step()

    (found,) = find_live(lambda: program(1000.0), "TT601")
    assert found.module == ""
    assert find_live(lambda: program(1.0), "TT601") == []


def test_validation_that_is_not_normalised_as_training_was():
    fault = classify(plain, normalise, lambda x: x / 255, steps=12)
    (found,) = find_live(fault, "TT601")
    assert (found.severity, found.module) == ("warning", "")
    assert "in eval mode" in found.message
    assert "times outside (limit 3)" in found.message
    assert find_live(classify(plain, normalise, normalise, steps=12), "TT601") == []


def step(i, *, rms=1.0, top=3.0, std=1.0, training=True, norm=False, trains=True, **changes):
    numel = 64
    x = ok(1, 8, 8, norm=rms * numel**0.5, min=-top, max=top, std=std, **changes)
    yield module("", cls="Net", step=i)
    yield module("fc", "weight", shape=(8, 8), step=i)
    yield module("norm", cls="BatchNorm1d", step=i)
    yield call(1, "", [1], [3], [x, ok(3, 8, 8)], step=i, training=training)
    yield call(2, "fc", [1], [2], [ok(2, 8, 8)], step=i, parent=1, training=training)
    if norm:
        yield call(3, "norm", [2], [3], step=i, parent=1)
    yield call(4, "fc", [4], [5], [ok(4, 8), ok(5, 8)], step=i, phase="backward", forward=2)
    yield Action(step=i, seq=5, action="loss", detail={"value": 1.0})
    if trains:
        yield optimizer(6, step=i)
    yield closing(i)


def run(*steps_):
    return [record for i, changes in enumerate(steps_) for record in step(i, **changes)]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"rms": 20.1}, [("TT601", "warning", "fc")]),
        ({"rms": 20.0}, []),
        ({"rms": 0.005, "top": 0.0099}, [("TT601", "warning", "fc")]),
        ({"rms": 0.005, "top": 0.01}, []),
        ({"rms": 0.0, "top": 0.0}, []),
        ({"rms": 50.0, "norm": True}, []),
        ({"rms": 50.0, "trains": False}, []),
        ({"rms": 50.0, "dtype": "int64"}, []),
        ({"rms": 50.0, "requires_grad": True}, []),
    ],
)
def test_thresholds_of_the_scale(changes, found):
    assert brief(find(run(*[changes] * 3), "TT601")) == found
    assert find(run(*[changes] * 2), "TT601") == []


def test_thresholds_of_the_distance_from_training():
    ten = [{"std": 1.0}] * 10
    valid = {"training": False, "trains": False}
    (found,) = find(run(*ten, {"std": 0.33, **valid}), "TT601")
    assert (found.severity, found.limit) == ("warning", 3)
    assert find(run(*ten, {"std": 0.34, **valid}), "TT601") == []
    assert find(run(*ten[:9], {"std": 0.1, **valid}), "TT601") == []
    assert find(run(*ten, {"std": 19.0}), "TT601") == []
    assert brief(find(run(*ten, {"std": 21.0}), "TT601")) == [("TT601", "note", "")]


def test_empty_run_is_silent():
    assert find([], "TT601") == []
    assert find([closing()], "TT601") == []
