from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import brief, closing, find, loss, module, optimizer, row
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import WORDS, LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def fine_tune(*, frozen_last):
    """As with checkpoints in a frozen model: the embedding's output requires a gradient."""

    def program():
        model = LanguageModel()
        model.embed.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        if not frozen_last:
            model.requires_grad_(False)
        model.head = nn.Linear(16, WORDS)
        if frozen_last:
            model.requires_grad_(False)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            next_word_loss(model, sentences()).backward()
            adam.step()
            adam.zero_grad()

    return program


def test_head_frozen_with_the_rest_is_told_and_frozen_before_it_is_silent():
    (found,) = find_live(fine_tune(frozen_last=True), "TT409")
    assert brief([found]) == [("TT409", "error", None)]
    assert (found.step, found.value, found.limit) == (3, 4, 4)
    assert "have requires_grad=False" in found.message
    assert "adam.step()" in found.location.code
    assert find_live(fine_tune(frozen_last=False), "TT409") == []


def classify(backward):
    def program():
        model = convnet()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            x, y = images(8)
            sgd.zero_grad()
            backward(F.cross_entropy(model(x), y))
            sgd.step()

    return program


@pytest.mark.parametrize(
    ("backward", "why"),
    [
        (lambda loss: None, "backward() was never called"),
        (lambda loss: torch.tensor(loss.item(), requires_grad=True).backward(), "do not depend"),
    ],
)
def test_no_backward_and_a_loss_made_anew_are_told(backward, why):
    (found,) = find_live(classify(backward), "TT409", "TT203", "TT401")
    assert (found.code, found.step) == ("TT409", 3)
    assert why in found.message


def test_a_backward_that_reaches_the_model_is_silent():
    assert find_live(classify(lambda loss: loss.backward()), "TT409") == []


def steps(count, *, rms=None, no_grad=2, **changes):
    yield module("a", "weight", "bias")
    for step in range(count):
        yield loss(0, 1.0, step=step)
        held = None if step else ["a.weight", "a.bias"]
        yield optimizer(step=step, parameters=held, no_grad=no_grad, **changes)
        grads = rms(step) if callable(rms) else rms
        yield closing(step, modules=row(param_grad_rms={"a": grads}))


def test_four_steps_running_are_the_limit():
    assert len(find(steps(4), "TT409")) == 1
    assert find(steps(3), "TT409") == []
    assert len(find(steps(3), "TT409", sustain=3)) == 1
    assert find(steps(7, rms=lambda step: 1.0 if step == 3 else None), "TT409") == []


def test_any_gradient_anywhere_is_no_error_and_a_warning_after_eight_steps():
    assert find(steps(7, rms=0.0), "TT409") == []
    (found,) = find(steps(9, rms=0.0), "TT409")
    assert (found.step, found.severity) == (7, "warning")
    assert find(steps(9, no_grad=1), "TT409") == []
    assert find([], "TT409") == []


def test_skipped_steps_and_optimizers_that_may_need_no_gradient_are_silent():
    assert find(steps(9, skipped=True), "TT409") == []
    assert find(steps(9, cls="ZerothOrder"), "TT409") == []


def adversarial(*, detached):
    def program():
        maker, judge = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        first = torch.optim.Adam(judge.parameters(), lr=1e-3)
        second = torch.optim.Adam(maker.parameters(), lr=1e-3)
        for _ in range(9):
            fake = maker(torch.randn(8, 4))
            first.zero_grad()
            (judge(fake.detach()).mean() - judge(torch.randn(8, 8)).mean()).backward()
            first.step()
            second.zero_grad()
            judge(fake.detach() if detached else fake).mean().neg().backward()
            second.step()

    return program


def test_generator_behind_detach_is_told_and_one_that_learns_is_silent():
    found = [f for f in find_live(adversarial(detached=True), "TT409") if f.severity != "note"]
    assert brief(found) == [("TT409", "warning", None)]
    assert "none of the 2 parameters of optimizer 1, Adam, had a gradient" in found[0].message
    assert "second.step()" in found[0].location.code
    assert find_live(adversarial(detached=False), "TT409") == []
