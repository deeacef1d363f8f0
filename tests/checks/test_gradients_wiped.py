from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import PAD, sentences
from tests.healthy.language import CharLSTM


def train_lstm(wipes, steps=5, **how):
    def program():
        model = CharLSTM()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            tokens = sentences(length=8).T
            logits, _ = model(tokens[:-1], None)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten(), ignore_index=PAD)
            if not wipes:
                adam.zero_grad()
            loss.backward()
            if wipes == "optimizer":
                adam.zero_grad(**how)
            elif wipes:
                model.zero_grad()
            adam.step()

    return program


def test_zero_grad_between_backward_and_step_is_an_error_after_three_steps():
    # The first step of an optimizer is the first that the check sees of it.
    (found,) = find_live(train_lstm("optimizer"), "TT207")
    assert brief([found]) == [("TT207", "error", None)]
    assert (found.value, found.limit) == (3, 3)
    assert "found all 11 gradients None or 0 in 3 steps running (limit 3)" in found.message
    assert "adam.zero_grad" in found.location.code


def test_zeroing_in_place_and_by_the_module_are_the_same_fault():
    assert len(find_live(train_lstm("optimizer", set_to_none=False), "TT207")) == 1
    assert len(find_live(train_lstm("module"), "TT207")) == 1


def test_an_optimizer_that_therefore_never_meets_a_gradient_is_no_second_finding():
    (found,) = find_live(train_lstm("optimizer", steps=9), "TT207", "TT409")
    assert found.code == "TT207"


def test_the_right_order_is_silent():
    assert find_live(train_lstm(None), "TT207") == []


def test_micro_batches_that_lose_all_but_the_last_are_not_this_fault():
    def program():
        model = nn.Linear(4, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            for _ in range(2):
                sgd.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
            sgd.step()

    assert find_live(program, "TT207") == []


def steps(count, order=("loss", "zero_grad"), *, whose=0, **changes):
    fields = {"grad_norm": None, "no_grad": 2, **changes}
    for step in range(count):
        for seq, name in enumerate(order):
            index = whose if name == "zero_grad" else None
            yield Action(step=step, seq=seq, action=name, optimizer=index)
        held = ["a.weight", "a.bias"] if step == 0 else None
        yield optimizer(10, step=step, parameters=held, **fields)
        yield closing(step)


def test_two_steps_are_not_enough_and_the_number_is_a_setting():
    # The cycle before the first step belongs to an optimizer not known yet.
    assert find(steps(3), "TT207") == []
    assert len(find(steps(4), "TT207")) == 1
    assert len(find(steps(3), "TT207", sustain=2)) == 1


def test_a_step_with_any_gradient_or_without_backward_is_silent():
    assert find(steps(9, no_grad=1, grad_norm=0.5), "TT207") == []
    assert find(steps(9, ("zero_grad",)), "TT207") == []
    assert find(steps(9, ("zero_grad", "loss")), "TT207") == []
    assert find(steps(9, whose=1), "TT207") == []
    assert find(steps(9, skipped=True), "TT207") == []
    assert find([], "TT207") == []


def test_gradients_of_zero_count_as_none():
    assert len(find(steps(5, no_grad=0, grad_norm=0.0), "TT207")) == 1
