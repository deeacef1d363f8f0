from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn
from torch.optim import lr_scheduler as schedules

from tensortrace.records import Module, Optimizer, ParameterInfo
from tests.checks import brief, closing, find, optimizer, row
from tests.checks.traced import find_live

CODE = "TT410"


def steps(count, rate, *, ratio=0.0, other=None, **changes):
    """Steps of an optimizer that holds `a`; `other` is how far what it does not hold moves."""
    for step in range(count):
        held = ["a.weight", "a.bias"] if not step else None
        yield optimizer(step=step, lr=[rate(step)], parameters=held, **changes)
        moved = ratio(step) if callable(ratio) else ratio
        yield closing(step, modules=row(update_ratio={"a": moved, "b": other}))


def each_batch(step):
    """What StepLR(step_size=30) makes of 0.1 if it is stepped once a batch."""
    return 0.1 * 0.1 ** (step // 30)


def test_a_rate_that_is_nothing_for_a_hundred_steps_is_told():
    (found,) = find(steps(400, each_batch), CODE)
    assert brief([found]) == [(CODE, "warning", None)]
    # Seven powers of ten down: from step 210 on, as 0.1 times 1e-6 is rounded up.
    assert found.step == 309
    assert found.value == pytest.approx(1e-11)
    assert found.limit == pytest.approx(1e-7)
    assert "has come down from 0.1 in step 29 to 1e-11: in 100 of its 310 steps" in found.message
    assert found.message.endswith("and no weight moves")
    assert found.evidence["falls"] == 10


def test_numbers_are_settings():
    assert find(steps(400, each_batch), CODE, sustain=300) == []
    assert [f.step for f in find(steps(400, each_batch), CODE, fraction=1e-3, sustain=10)] == [159]
    assert find(steps(400, each_batch), CODE, share=0.6) == []


@pytest.mark.parametrize(
    "rate",
    [
        lambda step: 0.1,
        lambda step: 0.1 if step < 1000 else 1e-9,  # a tenth of the run
        lambda step: max(0.05 * (1 + math.cos(math.pi * step / 1200)), 1e-9),
        lambda step: 0.1 * (1 - step / 1200),
        lambda step: 0.1 * 0.99**step,
        lambda step: 0.1 * 10 ** -(step % 100 / 10),  # over and over again
        lambda step: 1e-9 * 1.02**step,
        lambda step: 0.0 if step > 100 else 0.1,  # TT401 tells of it
        lambda step: 1e-9,
        lambda step: math.nan if step % 2 else 0.1,
    ],
    ids=["constant", "late", "cosine", "linear", "exponential", "restarts", "rising", "zero",
         "small from the start", "NaN"],
)  # fmt: skip
def test_other_schedules_are_silent(rate):
    assert find(steps(1200, rate), CODE) == []


def test_a_low_rate_that_moves_weights_is_silent():
    """After a search for the highest rate that does not diverge a tuning run has far less."""
    assert find(steps(400, each_batch, ratio=1e-6), CODE) == []
    assert len(find(steps(400, each_batch, ratio=1e-8), CODE)) == 1


def test_what_another_optimizer_moves_does_not_count():
    assert len(find(steps(400, each_batch, other=0.01), CODE)) == 1


def test_where_no_update_was_measured_nothing_is_told():
    assert find(steps(400, each_batch, ratio=None), CODE) == []


def test_steps_that_a_scaler_skips_do_not_count():
    assert find(steps(400, each_batch, skipped=True), CODE) == []


def stopped(step, *, at=200, least=1e-8):
    """What ReduceLROnPlateau(factor=0.1) makes of 1e-3 in the first `at` steps, and keeps."""
    return max(1e-3 * 0.1 ** (step * 5 // at), least) if step < at else least


def test_a_rate_that_has_stopped_for_half_of_the_run_is_told():
    (found,) = find(steps(400, stopped), CODE)
    assert (found.step, found.value) == (399, 1e-8)
    assert found.limit == pytest.approx(2e-8)
    assert "to 1e-08: in 200 of its 400 steps it is 2e-05 times that" in found.message
    assert find(steps(399, stopped), CODE) == []
    assert [f.step for f in find(steps(400, stopped), CODE, most=0.4)] == [333]
    assert find(steps(400, stopped), CODE, sustain=201) == []
    assert find(steps(400, stopped), CODE, halted=1e-6) == []


@pytest.mark.parametrize(
    "rate",
    [
        lambda step: stopped(step, at=600),  # after it has followed the loss for half of the run
        lambda step: stopped(step, least=2.1e-8),
        lambda step: stopped(step) * (1 + step / 1e9),  # goes on changing
        lambda step: stopped(step % 300),
    ],
    ids=["late", "not as far", "moving", "restarts"],
)
def test_a_rate_that_has_stopped_later_or_higher_is_silent(rate):
    assert find(steps(1000, rate), CODE) == []


def test_a_rate_that_has_stopped_and_moves_weights_is_silent():
    assert len(find(steps(600, stopped, ratio=5e-7), CODE)) == 1
    assert find(steps(600, stopped, ratio=5.1e-7), CODE) == []


def train(schedule, *, epochs=10, batches=40, each_batch=False):
    def program():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = schedule(sgd)
        plane = torch.randn(20, 5)
        for _ in range(epochs):
            for _ in range(batches):
                x = torch.randn(16, 20)
                sgd.zero_grad()
                F.cross_entropy(model(x), (x @ plane).argmax(1)).backward()
                sgd.step()
                if each_batch:
                    scheduler.step()
            if not each_batch:
                scheduler.step()

    return program


def test_a_schedule_of_epochs_that_is_stepped_each_batch_is_told():
    def schedule(sgd):
        return schedules.StepLR(sgd, step_size=30)

    (found,) = find_live(train(schedule, each_batch=True), CODE)
    assert (found.severity, found.phase) == ("warning", "optimizer")
    assert found.location.code == "sgd.step()"
    assert find_live(train(schedule), CODE) == []


@pytest.mark.parametrize(
    "schedule",
    [
        lambda sgd: schedules.CosineAnnealingLR(sgd, 400),
        lambda sgd: schedules.OneCycleLR(sgd, 0.1, total_steps=400),
        lambda sgd: schedules.LinearLR(sgd, 1.0, 1e-9, total_iters=400),
        lambda sgd: schedules.CosineAnnealingWarmRestarts(sgd, 20),
        lambda sgd: schedules.ExponentialLR(sgd, 0.96),
    ],
)
def test_schedules_that_end_with_the_training_are_silent(schedule):
    assert find_live(train(schedule, each_batch=True), CODE) == []


@pytest.mark.parametrize(("dtype", "told"), [("float32", 1), ("float64", 0)])
def test_of_doubles_more_digits_are_left(dtype, told):
    described = Module(
        step=0, path="a", cls="Linear",
        parameters=[ParameterInfo("weight", (2, 2), dtype), ParameterInfo("bias", (2,))],
    )  # fmt: skip
    assert len(find([described, *steps(400, each_batch, ratio=2.0**-30)], CODE)) == told
    assert len(find([described, *steps(400, each_batch, ratio=2.0**-60)], CODE)) == 1


def test_each_of_many_optimizers_has_a_height_of_its_own():
    def trials():
        for record in steps(500, lambda step: 10.0 ** (2 - step // 20)):
            first = isinstance(record, Optimizer) and record.step % 20 == 0 and record.step > 0
            yield structs.replace(record, anew=True) if first else record

    assert find(trials(), CODE) == []
    assert len(find(steps(500, lambda step: 10.0 ** (2 - step // 20)), CODE)) == 1


@pytest.mark.parametrize(("mode", "told"), [("min", 1), ("max", 0)])
def test_a_plateau_of_what_is_to_rise_takes_the_mode_max(mode, told):
    def program():
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = schedules.ReduceLROnPlateau(adam, mode, patience=2)
        x = torch.randn(64, 10)
        y = (x @ torch.randn(10, 5)).argmax(1)
        for step in range(400):
            adam.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            adam.step()
            if step % 10 == 9:
                scheduler.step((logits.argmax(1) == y).float().mean().item())

    found = find_live(program, CODE)
    assert [f.location.code for f in found] == told * ["adam.step()"]
    assert all('mode="max"' in f.fix for f in found)
