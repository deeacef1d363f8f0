from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import call, closing, find, ok, op
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel
from tests.healthy.vision import convnet

SMALLEST = 2.0**-24


def classify(weight, *, scaled=False, dtype=torch.float16):
    """A convnet under autocast whose loss is one term of many, with a small weight."""

    def program():
        model = convnet()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(4):
            x, y = images(16)
            with torch.autocast("cpu", dtype=dtype):
                loss = weight * F.cross_entropy(model(x), y)
            sgd.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(sgd)
            scaler.update()

    return program


def test_small_loss_in_float16_without_a_scaler_has_no_gradients_left():
    (found,) = find_live(classify(1e-5), "TT502")
    assert (found.severity, found.step, found.phase) == ("warning", 2, "backward")
    assert "without a GradScaler" in found.message
    assert find_live(classify(1e-5, scaled=True), "TT502") == []
    assert find_live(classify(1e-5, dtype=torch.bfloat16), "TT502") == []
    assert find_live(classify(1.0), "TT502") == []


def language(factor):
    """A language model in float16 whose logits are cast to float32 for the loss."""

    def program():
        model = LanguageModel().half()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            tokens = sentences()
            logits = model(tokens[:, :-1]).float().flatten(0, 1)
            sgd.zero_grad()
            (factor * F.cross_entropy(logits, tokens[:, 1:].flatten())).backward()
            sgd.step()

    return program


def test_cast_that_makes_zeros_of_most_of_a_gradient_is_named():
    (found,) = find_live(language(3e-5), "TT502")
    assert found.op == "float"
    assert "the cast to float16 makes 0 of" in found.message
    assert 0.5 < found.value <= 1.0
    assert find_live(language(1.0), "TT502") == []


def at(step, *grads, loss=1.0):
    tensors = [
        ok(n + 1, 64, **{"dtype": "float16", "norm": rms * 8, **changes})
        for n, (rms, changes) in enumerate(grads)
    ]
    for tensor in tensors:
        yield call(tensor.id, "fc", [tensor.id], [], [tensor], step=step, phase="backward")
    yield closing(step, loss=loss)


def steps(count, *grads, losses=None):
    for i in range(count):
        yield from at(i, *grads, loss=losses[i] if losses else 1.0)


LOW, FINE = (15 * SMALLEST, {}), (17 * SMALLEST, {})
ZERO = (0.0, {"zeros": 64})


@pytest.mark.parametrize(
    ("grads", "count"),
    [
        ([LOW], 1),
        ([FINE], 0),
        ([LOW, LOW, FINE], 1),
        ([LOW, FINE], 0),
        ([LOW, ZERO, FINE], 1),
        ([ZERO, ZERO, FINE], 0),
        ([(15 * SMALLEST, {"dtype": "bfloat16"})], 0),
        ([(15 * SMALLEST, {"numel": 63})], 0),
        ([(15 * SMALLEST, {"nan": 1})], 0),
        ([(15 * SMALLEST / 2, {"zeros": 48})], 1),
        ([(17 * SMALLEST / 2, {"zeros": 48})], 0),
    ],
)
def test_thresholds(grads, count):
    assert len(find(steps(3, *grads), "TT502")) == count
    assert find(steps(2, *grads), "TT502") == []


def ranges(**counts):
    """`ranges(r3=5)`: five elements from 2 ** -24 up to 2 ** -20."""
    return tuple(counts.get(f"r{i}", 0) for i in range(16))


@pytest.mark.parametrize(
    ("rms", "exponents", "severity"),
    [
        (1.0, ranges(r3=33, r9=31), "note"),  # few large ones beside them
        (1.0, ranges(r3=32, r9=32), None),
        (15 * SMALLEST, ranges(r3=60, r4=4), "warning"),
        (1.0, ranges(r3=64)[:15], None),  # no such counts
        (15 * SMALLEST, ranges(), "warning"),
    ],
)
def test_exponents_tell_how_many_are_low(rms, exponents, severity):
    found = find(steps(3, (rms, {"exponents": exponents})), "TT502")
    assert [f.severity for f in found] == [severity] * (severity is not None)
    assert all(("the last 16 numbers" in f.message) == any(exponents) for f in found)


def test_note_becomes_a_warning_once_the_large_ones_are_gone_too():
    few = (1.0, {"exponents": ranges(r3=60, r9=4)})
    none = (15 * SMALLEST, {"exponents": ranges(r3=64)})
    records = [r for i, grad in enumerate([few] * 3 + [none] * 3) for r in at(i, grad)]
    found = find(records, "TT502")
    assert [(f.step, f.severity) for f in found] == [(2, "note"), (5, "warning")]


def test_range_that_the_limit_lies_in_counts_for_nothing():
    low = (1.0, {"exponents": ranges(r3=40, r9=24)})
    assert find(steps(3, low), "TT502", near=8.0) == []
    assert len(find(steps(3, low), "TT502", near=256.0)) == 1


def weighted(most):
    """A language model in float16; one sentence of a batch counts, the rest by a weight."""

    def program():
        model = LanguageModel().half()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(4):
            tokens = sentences()
            weight = torch.full((len(tokens), 1), most)
            weight[0] = 1.0
            logits = model(tokens[:, :-1]).float().transpose(1, 2)
            each = F.cross_entropy(logits, tokens[:, 1:], reduction="none")
            sgd.zero_grad()
            (weight * each).mean().backward()
            sgd.step()

    return program


def test_few_large_gradients_do_not_hide_that_the_rest_is_lost():
    (found,) = find_live(weighted(1e-3), "TT502")
    assert found.severity == "note"
    assert "in most elements" in found.message
    assert find_live(weighted(1.0), "TT502") == []


def test_network_that_has_learnt_has_small_gradients():
    assert find(steps(9, LOW, losses=[1.0] + [0.1] * 8), "TT502") == []
    assert len(find(steps(9, LOW, losses=[1.0] + [0.11] * 8), "TT502")) == 1


@pytest.mark.parametrize(("zeros", "count"), [(33, 1), (32, 0)])
def test_threshold_of_a_cast(zeros, count):
    records = []
    for i in range(3):
        tensors = [ok(1, 64), ok(2, 64, dtype="float16", zeros=zeros)]
        records += [op(1, "to", [1], [2], tensors, step=i, phase="backward"), closing(i, loss=1.0)]
    assert len(find(records, "TT502")) == count


def test_empty_run_is_silent():
    assert find([], "TT502") == []
    assert find([closing()], "TT502") == []
