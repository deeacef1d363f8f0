from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action
from tests.checks import brief, closing, find
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def tune_head(*, frozen=False, clips=None):
    """A new head on a network in eval mode; the optimizer gets the head alone."""

    def program():
        backbone, head = convnet()[:-1].eval(), nn.Linear(16, 4)
        model = nn.Sequential(backbone, head)
        backbone.requires_grad_(not frozen)
        sgd = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(7):
            x, y = images(8)
            F.cross_entropy(model(x), y).backward()
            if clips is not None:
                nn.utils.clip_grad_norm_(clips(model, head), 1.0)
            sgd.step()
            sgd.zero_grad()

    return program


def test_backbone_that_is_not_frozen_is_a_note():
    (found,) = find_live(tune_head(), "TT208")
    assert brief([found]) == [("TT208", "note", "0.0")]
    assert (found.step, found.value, found.limit, found.param) == (4, 4, 4, "0.0.weight")
    assert "6 parameters that no optimizer holds" in found.message


def test_clipping_together_with_them_is_a_warning():
    (found,) = find_live(tune_head(clips=lambda model, head: model.parameters()), "TT208")
    assert found.severity == "warning"
    assert "clipping counts them" in found.message
    assert "clip_grad_norm_" in found.location.code


def test_clipping_what_the_optimizer_holds_stays_a_note_and_freezing_is_silent():
    (found,) = find_live(tune_head(clips=lambda model, head: head.parameters()), "TT208")
    assert found.severity == "note"
    assert find_live(tune_head(frozen=True, clips=lambda m, h: m.parameters()), "TT208") == []


def adapt(**zero):
    def program():
        model = LanguageModel()
        adam = torch.optim.Adam(model.blocks[-1].parameters(), lr=1e-3)
        for _ in range(7):
            next_word_loss(model, sentences()).backward()
            adam.step()
            model.zero_grad() if zero.get("model") else adam.zero_grad()

    return program


def test_language_model_of_which_one_block_is_trained():
    (found,) = find_live(adapt(), "TT208")
    assert "embed.weight" in found.message
    assert find_live(adapt(model=True), "TT208") == []


class Agent(nn.Module):
    """Never called itself, as an agent whose networks are: soft actor-critic."""

    def __init__(self):
        super().__init__()
        self.policy, self.log_alpha = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))


def tune_temperature(learn=lambda agent, i: None, *, leaf=None, steps=45):
    """Learn a policy and its temperature; `leaf` makes what stands in for the temperature."""

    def program():
        agent = Agent()
        adam = torch.optim.Adam(agent.policy.parameters(), lr=1e-3)
        for i in range(steps):
            p = agent.policy(torch.randn(8, 4)).softmax(-1)
            entropy = -(p * p.log()).sum(-1)
            adam.zero_grad()
            (-entropy).mean().backward()
            adam.step()
            alpha = agent.log_alpha if leaf is None else leaf(agent, i)
            (alpha.exp() * (entropy.detach() - 0.6)).mean().backward()
            learn(agent, i)

    return program


def test_a_temperature_that_no_optimizer_holds_is_a_note():
    (found,) = find_live(tune_temperature(), "TT208")
    assert brief([found]) == [("TT208", "note", None)]
    assert (found.step, found.value, found.limit) == (30, 29, 20)
    assert found.message.startswith("a parameter of shape [] keeps its gradient, added to over 29")
    assert "alpha.exp()" in found.location.code


def by_hand(agent, i):
    with torch.no_grad():
        agent.log_alpha -= 0.1 * agent.log_alpha.grad
    agent.log_alpha.grad.zero_()


def by_hand_as_in_old_programs(agent, i):
    agent.log_alpha.data -= 0.1 * agent.log_alpha.grad.data
    agent.log_alpha.grad.data.zero_()


def by_hand_without_clearing(agent, i):
    with torch.no_grad():
        agent.log_alpha -= 0.1 * agent.log_alpha.grad


def cleared_only(agent, i):
    agent.log_alpha.grad = None


def in_every_tenth_step():
    made = []

    def learn(agent, i):
        made[:] = made or [torch.optim.SGD([agent.log_alpha], lr=0.1)]
        if i % 10 == 9:
            made[0].step()
            made[0].zero_grad()

    return learn


@pytest.mark.parametrize(
    "learn",
    [by_hand, by_hand_as_in_old_programs, by_hand_without_clearing, cleared_only,
     in_every_tenth_step()],
    ids=["by hand", "by data", "momentum by hand", "cleared", "every tenth step"],
)  # fmt: skip
def test_a_temperature_that_is_learnt_or_cleared_is_silent(learn):
    assert find_live(tune_temperature(learn), "TT208") == []


def one_input():
    kept = []

    def leaf(agent, i):
        kept[:] = kept or [torch.zeros((), requires_grad=True)]
        return kept[0]

    return leaf


@pytest.mark.parametrize(
    "leaf",
    [
        lambda agent, i: agent.policy.weight.mean(),
        lambda agent, i: nn.Parameter(torch.zeros(())),
        lambda agent, i: torch.zeros((), requires_grad=True),
        one_input(),
    ],
    ids=["held", "made anew", "an input made anew", "an input that is kept"],
)
def test_inputs_that_require_a_gradient_are_silent(leaf):
    assert find_live(tune_temperature(leaf=leaf), "TT208") == []


def lone(updates, absmax=1.0):
    detail = {"left": 2, "left_shape": [3], "left_updates": updates, "left_absmax": absmax}
    return [Action(step=0, seq=1, action="loss", detail=detail), closing()]


def test_twenty_steps_of_growth_are_enough_and_the_number_is_a_setting():
    assert find(lone(19), "TT208") == []
    (found,) = find(lone(20), "TT208")
    assert found.message.startswith("2 parameters, one of shape [3], keep their gradients, added")
    assert len(find(lone(19), "TT208", alone=19)) == 1
    assert find(lone(20, absmax=0.0), "TT208") == []


def zeroing(count):
    for step in range(count):
        detail = {"left": 7, "left_names": ["a.weight", "a.bias"], "grown": step}
        yield Action(step=step, seq=1, action="zero_grad", optimizer=0, detail=detail)
        yield closing(step)


def test_three_calls_are_not_enough_and_the_number_is_a_setting():
    assert find(zeroing(4), "TT208") == []
    (found,) = find(zeroing(9), "TT208")
    assert found.step == 4
    assert "a.weight, a.bias, ..." in found.message
    assert len(find(zeroing(4), "TT208", sustain=3)) == 1


def test_nothing_says_nothing():
    assert find([], "TT208") == []
    assert find([Action(step=0, seq=1, action="zero_grad"), closing()], "TT208") == []


def test_a_tied_weight_is_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.body(self.embed(x)).tanh())

    def program():
        model = Tied()
        adam = torch.optim.Adam(model.body.parameters())
        for _ in range(7):
            x = torch.randint(20, (16,))
            F.cross_entropy(model(x), x).backward()
            adam.step()
            adam.zero_grad()

    (found,) = find_live(program, "TT208")
    assert found.message.startswith("1 parameter that no optimizer holds keeps its gradient, added")
    assert found.evidence["parameters"] == ["embed.weight"]
