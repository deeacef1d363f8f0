from __future__ import annotations

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from tensortrace import trace
from tensortrace.log import decode, encode
from tests.capture import Recorded
from tests.healthy.data import points


def losses(make, steps=1):
    model = nn.Linear(2, 2)
    records = Recorded()
    with trace(out=records.append):
        for _ in range(steps):
            x, y = points(8)
            make(model(x), y).backward()
    assert records.actions("tracer_error") == []
    return records.actions("loss")


def test_the_graph_of_a_loss_leaves_views_and_casts_out():
    def make(logits, y):
        wide = logits.double()[:, None].transpose(1, 2).squeeze(2).sigmoid().float().contiguous()
        return F.cross_entropy(wide.clamp(min=1e-6), y) + logits.square().mean()

    (action,) = losses(make)
    names = [name for name, _ in action.detail["graph"]]
    assert names == [
        "AddBackward0", "NllLossBackward0", "MeanBackward0", "LogSoftmaxBackward0", "PowBackward0",
        "SigmoidBackward0", "AddmmBackward0", "torch::autograd::AccumulateGrad",
        "torch::autograd::AccumulateGrad",
    ]  # fmt: skip
    above = {name: [names[i] for i in places] for name, places in action.detail["graph"][:6]}
    assert above["AddBackward0"] == ["NllLossBackward0", "MeanBackward0"]
    assert above["LogSoftmaxBackward0"] == ["SigmoidBackward0"]
    assert above["SigmoidBackward0"] == above["PowBackward0"] == ["AddmmBackward0"]
    assert decode(encode(action)) == action


def test_it_is_read_three_times_at_a_line_and_never_far():
    def deep(logits, y):
        for _ in range(100):
            logits = logits.sin()
        return logits.sum()

    found = [a.detail.get("graph") for a in losses(deep, 5)]
    assert [graph is not None for graph in found] == [True, True, True, False, False]
    assert all(len(graph) == 48 for graph in found[:3])


def test_a_view_changed_in_place_is_left_alone_and_nothing_is_kept_alive():
    kept = []

    def changed(logits, y):
        total = logits.new_zeros(2)
        total[0] = logits.sum()
        part = total[0]
        part += 1.0
        kept.append(weakref.ref(total))
        return part

    (action,) = losses(changed)
    assert "graph" not in action.detail
    gc.collect()
    assert kept[0]() is None


def test_a_loss_without_a_graph_says_what_torch_says():
    def program():
        torch.ones(()).backward()

    records = Recorded()
    try:
        with trace(out=records.append):
            program()
    except RuntimeError as error:
        assert "does not require grad" in str(error)
    assert all("graph" not in a.detail for a in records.actions("loss"))
    assert records.actions("tracer_error") == []
