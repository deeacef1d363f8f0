from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import grad

from tests.checks import call, closing, find, loss, module, ok, op
from tests.checks.traced import find_live


def trained(loss_of):
    """A critic learns from a loss that is made of its slope, too."""

    def run():
        critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
        for _ in range(4):
            x = torch.randn(16, 4, requires_grad=True)
            out = critic(x)
            optimizer.zero_grad()
            loss_of(out, x, critic).backward()
            optimizer.step()

    return run


def slope(out, x, **options):
    return grad(out.sum(), x, retain_graph=True, **options)[0]


def penalty(out, x, **options):
    return (slope(out, x, **options).norm(dim=1) - 1).square().mean()


def added(out, x, critic, **options):
    return out.mean() + 10 * penalty(out, x, **options)


def in_place(out, x, critic, **options):
    total = out.mean() * 2
    total += penalty(out, x, **options)
    return total


def subtracted(out, x, critic, **options):
    return -(out.mean() - penalty(out, x, **options) / 2)


def listed(out, x, critic, **options):
    return torch.stack([out.mean(), penalty(out, x, **options)]).sum()


def by_a_module(out, x, critic, **options):
    return out.mean() + nn.MSELoss()(slope(out, x, **options), torch.ones(16, 4))


def second(out, x, critic, **options):
    first = slope(out, x, create_graph=True)
    return first.square().mean() + slope(first, x, **options).square().mean()


FAULTY = {f.__name__: f for f in (added, in_place, subtracted, listed, by_a_module, second)}


def adaptive(out, x, critic):
    """The weight of a term is a ratio of two gradients."""
    parts = out.mean(), out.square().mean()
    norms = [slope(part, critic[2].weight).norm() for part in parts]
    return parts[0] + norms[0] / (norms[1] + 1e-4) * parts[1]


def first_order(out, x, critic):
    """The inner step of a first-order meta-learner."""
    fast = critic[2].weight - 0.1 * slope(out.square(), critic[2].weight)
    return nn.functional.linear(critic[:2](x), fast).square().mean() + out.mean()


def matched(out, x, critic):
    """A gradient that is to be like one that is given."""
    wanted = slope(out.square(), x)
    return out.mean() + (slope(out, x, create_graph=True) - wanted).square().mean()


def constant(out, x, critic):
    return out.mean() + x.detach().square().mean()


def watched(out, x, critic):
    return out.mean() + penalty(out, x).item()


def known_density(out, x, critic):
    """The score of a density that has nothing to learn."""
    score = grad((-(x**2) / 2).sum(), x)[0]
    return (out**2).sum() + score.square().sum()


def frozen_network(out, x, critic):
    other = nn.Linear(4, 1).requires_grad_(False)
    return out.mean() + grad(other(x).square().sum(), x)[0].square().mean()


def linearised(out, x, critic):
    """A critic beside its own slope: the constant term completes the expansion."""
    given = slope(out, x)
    return (given * critic[0].weight.mean(0)).sum() - (given * x.detach()).sum() + out.mean() * 0


HEALTHY = {f.__name__: f for f in (
    adaptive, first_order, matched, constant, watched, known_density, frozen_network, linearised,
)}  # fmt: skip


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", FAULTY)
def test_a_term_that_is_made_of_a_gradient_without_a_graph_is_told(name, level):
    (found,) = find_live(trained(FAULTY[name]), "TT209", level=level)
    assert (found.severity, found.step, found.op) == ("warning", 0, "autograd.grad")
    assert found.location.file == __file__
    assert "grad(out.sum(), x" in found.location.code
    assert [link.op for link in found.chain][-1] == "loss"


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", FAULTY)
def test_with_a_graph_it_is_silent(name, level):
    def fixed(out, x, critic):
        return FAULTY[name](out, x, critic, create_graph=True)

    assert find_live(trained(fixed), "TT209", level=level) == []


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", HEALTHY)
def test_what_needs_no_graph_is_silent(name, level):
    assert find_live(trained(HEALTHY[name]), "TT209", level=level) == []


def test_a_term_is_not_its_factor():
    with_graph, without = ok(1, requires_grad=True, grad_fn="MeanBackward0"), ok(3)
    total = ok(4, requires_grad=True, grad_fn="AddBackward0")

    def records(joined, asked):
        return [
            module("critic", "weight"), call(0, "critic", [], [9], [ok(9, requires_grad=True)]),
            op(1, "mean", [9], [1], [with_graph]),
            op(2, "autograd.grad", [9], [2], [ok(2)], arguments=asked),
            op(3, "norm", [2], [3], [without]),
            op(4, joined, [1, 3], [4], [total]), loss(5, 1.0, 4), closing(),
        ]  # fmt: skip

    assert len(find(records("add", {}), "TT209")) == 1
    assert find(records("add", {"create_graph": True}), "TT209") == []
    assert find(records("mul", {}), "TT209") == []


def test_nothing_is_said_where_little_is_known():
    derivative = op(1, "autograd.grad", [7], [2])
    assert find([derivative, loss(2, 1.0, 9), closing()], "TT209") == []
    assert find([derivative, loss(2, 1.0), closing()], "TT209") == []
    assert find([closing()], "TT209") == []
