from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images
from tests.healthy.vision import convnet


def train(clip, *, unscales=False, init_scale=2.0**12):
    def program():
        model = convnet()
        adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        for _ in range(5):
            x, y = images(8)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x), y)
            adam.zero_grad()
            scaler.scale(loss).backward()
            if unscales:
                scaler.unscale_(adam)
            clip(model.parameters(), scaler)
            scaler.step(adam)
            scaler.update()

    return program


def by_norm(parameters, scaler):
    nn.utils.clip_grad_norm_(parameters, 1.0)


def by_value(parameters, scaler):
    nn.utils.clip_grad_value_(parameters, 0.5)


def by_scaled_norm(parameters, scaler):
    nn.utils.clip_grad_norm_(parameters, 1.0 * scaler.get_scale())


@pytest.mark.parametrize(("clip", "limit"), [(by_norm, 1.0), (by_value, 0.5)])
def test_clip_of_scaled_gradients_is_an_error(clip, limit):
    (found,) = find_live(train(clip), "TT505")
    assert brief([found]) == [("TT505", "error", None)]
    assert found.value == limit / 2**12
    assert (found.limit, found.evidence["scale"]) == (0.01, 4096.0)
    assert "clip_grad" in found.location.code


@pytest.mark.parametrize("clip", [by_norm, by_value])
def test_clip_after_unscale_is_silent(clip):
    assert find_live(train(clip, unscales=True), "TT505") == []


def test_a_clip_value_that_is_scaled_too_is_silent():
    assert find_live(train(by_scaled_norm), "TT505") == []


def steps(count, *, limit=1.0, scale=1024.0, whose=0, order=("scale", "clip", "unscale")):
    for step in range(count):
        details = {"scale": {"scale": scale}, "clip": {"max_norm": limit}}
        for seq, name in enumerate(order):
            index = None if name == "scale" else whose
            yield Action(step=step, seq=seq, action=name, optimizer=index,
                         detail=details.get(name, {}))  # fmt: skip
        yield optimizer(10, step=step)
        yield closing(step)


def test_the_edges_of_the_thresholds():
    assert find(steps(1), "TT505") == []
    assert len(find(steps(2), "TT505")) == 1
    assert find(steps(9, limit=0.01 * 1024), "TT505") == []
    assert len(find(steps(9, limit=0.0099 * 1024), "TT505")) == 1
    assert len(find(steps(1), "TT505", sustain=1)) == 1


def test_other_orders_and_other_optimizers_are_silent():
    assert find(steps(9, order=("scale", "unscale", "clip")), "TT505") == []
    assert find(steps(9, order=("clip", "scale", "unscale")), "TT505") == []
    assert find(steps(9, order=("clip",)), "TT505") == []
    assert find(steps(9, whose=None), "TT505") == []
    assert find(steps(9, scale="Infinity"), "TT505") == []
    assert find([], "TT505") == []
