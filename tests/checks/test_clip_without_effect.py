from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find, optimizer
from tests.checks.traced import find_live
from tests.healthy.adversarial import Generator, critic
from tests.healthy.data import images, sentences
from tests.healthy.language import Encoder


def train_encoder(order, *, by_value=False, steps=6):
    def program():
        model = Encoder()
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        if by_value:  # torch refuses to clip the values of no gradients at all
            model(sentences()).sum().backward()
        for _ in range(steps):
            tokens = sentences()
            loss = F.cross_entropy(model(tokens), (tokens[:, 0] > 10).long())
            zero = functools.partial(adam.zero_grad, set_to_none=not by_value)
            does = {"zero": zero, "backward": loss.backward, "step": adam.step,
                    "clip": lambda: clip(model.parameters(), 0.1)}  # fmt: skip
            for what in order.split():
                does[what]()

    return program


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("order", ["zero clip backward step", "zero backward step clip"])
def test_clip_before_backward_or_after_step_is_a_warning(order, by_value):
    (found,) = find_live(train_encoder(order, by_value=by_value), "TT205")
    assert brief([found]) == [("TT205", "warning", None)]
    assert "what it steps with is not clipped" in found.message
    assert "3 steps running (limit 3)" in found.message


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("order", ["zero backward clip step", "backward clip step zero"])
def test_clip_between_backward_and_step_is_silent(order, by_value):
    assert find_live(train_encoder(order, by_value=by_value), "TT205") == []


def gan(late):
    def program():
        generator, judge = Generator(), critic()
        g_opt = torch.optim.Adam(generator.parameters(), lr=1e-3)
        d_opt = torch.optim.Adam(judge.parameters(), lr=1e-3)
        for _ in range(7):
            fake = generator(torch.randn(8, 8))
            d_opt.zero_grad()
            F.softplus(judge(fake.detach()) - judge(images(8)[0])).mean().backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            d_opt.step()
            g_opt.zero_grad()
            F.softplus(-judge(fake)).mean().backward()
            if not late:
                nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
            g_opt.step()
            if late:
                nn.utils.clip_grad_norm_(generator.parameters(), 1.0)

    return program


def test_gan_that_clips_its_generator_after_the_step():
    (found,) = find_live(gan(late=True), "TT205")
    assert found.evidence["optimizer"] == 1
    assert "generator.parameters()" in found.location.code
    assert find_live(gan(late=False), "TT205") == []


def steps(count, norms, limit=1.0, order=("loss", "clip")):
    for step in range(count):
        for seq, name in enumerate(order):
            detail = {"max_norm": limit, "total_norm": norms(step)} if name == "clip" else {}
            yield Action(step=step, seq=seq, action=name, optimizer=0, detail=detail)
        yield optimizer(10, step=step)
        yield closing(step)


def test_two_steps_are_not_enough_and_the_number_is_a_setting():
    order = ("clip", "loss")
    # Before its first step an optimizer is not known.
    assert find(steps(3, lambda s: 1.0, order=order), "TT205") == []
    assert len(find(steps(4, lambda s: 1.0, order=order), "TT205")) == 1
    assert len(find(steps(3, lambda s: 1.0, order=order), "TT205", sustain=2)) == 1


def test_clipping_what_no_optimizer_holds_is_silent():
    order = ("clip", "loss")
    records = [
        structs.replace(r, optimizer=None) if isinstance(r, Action) else r
        for r in steps(9, lambda s: 1.0, order=order)
    ]
    assert find(records, "TT205") == []


def test_a_second_clip_in_time_is_silent():
    order = ("clip", "loss", "clip")
    assert find(steps(9, lambda s: 1.0, order=order), "TT205") == []


def test_clip_to_infinity_only_measures():
    order = ("clip", "loss")
    assert find(steps(9, lambda s: 1.0, limit="Infinity", order=order), "TT205") == []


@pytest.mark.parametrize(
    ("norm", "word"), [(2.1, "every"), (1.9, None), (0.11, None), (0.09, "none")]
)
def test_a_value_that_always_or_never_acts_is_a_note(norm, word):
    found = find(steps(110, lambda s: norm), "TT205")
    assert [(f.severity, f" {word} of the last 100" in f.message) for f in found] == (
        [] if word is None else [("note", True)]
    )


def test_one_gradient_on_the_other_side_is_enough_to_be_silent():
    assert find(steps(110, lambda s: 0.5 if s == 60 else 50.0), "TT205") == []
    assert find(steps(110, lambda s: 1.5 if s == 60 else 0.01), "TT205") == []
    assert find(steps(99, lambda s: 50.0), "TT205") == []


def test_norms_that_are_no_numbers_and_empty_runs_say_nothing():
    assert find(steps(110, lambda s: "NaN"), "TT205") == []
    assert find(steps(110, lambda s: 0.0), "TT205") == []
    assert find([], "TT205") == []


@pytest.mark.filterwarnings("ignore:.*empty generator.*", "ignore:.*no gradients.*")
@pytest.mark.parametrize("kept", ["iterator", "list"])
def test_an_iterator_that_was_used_up_clips_nothing(kept):
    def program():
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        params = model.parameters() if kept == "iterator" else list(model.parameters())
        sgd = torch.optim.SGD(params, 0.1)
        for _ in range(6):
            sgd.zero_grad()
            model(torch.rand(8, 4)).sub(1).square().mean().backward()
            nn.utils.clip_grad_norm_(params, 0.5)
            sgd.step()

    found = [f for f in find_live(program) if f.severity != "note"]
    assert [(f.code, f.step) for f in found] == ([("TT205", 2)] if kept == "iterator" else [])
    assert all("iterator" in f.fix for f in found)
