from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import call, closing, find, loss, module, ok, op
from tests.checks.traced import find_live

TURNS = 12


class Hard(nn.Module):
    """A criterion that counts what is wrong."""

    def forward(self, out, y):
        return (out.argmax(1) != y).float().mean()


class Models:
    """A classifier, a teacher of its shape, and what judges both."""

    def __init__(self):
        def net(*sizes):
            return nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))

        self.student, self.teacher = net(6, 16, 4), net(6, 32, 4)
        self.critic, self.hard = net(4, 8, 1), Hard()
        self.ema, self.codes = 0.0, torch.randn(5, 4)

    def judged(self, x):
        with torch.no_grad():
            return self.teacher(x)


def trained(loss_of, turns=TURNS):
    """A classifier learns from a loss with more than one term."""

    def run():
        m = Models()
        optimizer = torch.optim.SGD([*m.student.parameters(), *m.critic.parameters()], 0.05)
        for turn in range(turns):
            x, y = torch.randn(16, 6), torch.randint(0, 4, (16,))
            out = m.student(x)
            optimizer.zero_grad()
            loss_of(m, out, x, y, turn).backward()
            optimizer.step()

    return run


def by_argmax(m, out, x, y, turn):
    wrong = out.argmax(1) != y
    return F.cross_entropy(out, y) + 0.5 * wrong.float().mean()


def by_comparison(m, out, x, y, turn):
    total = F.cross_entropy(out, y)
    total += (out > 0).float().sum() / 16
    return total / 2


def by_a_criterion(m, out, x, y, turn):
    return sum([F.cross_entropy(out, y), m.hard(out, y)])


def by_detach(m, out, x, y, turn):
    score = m.critic(out).detach()
    return F.cross_entropy(out, y) + F.binary_cross_entropy_with_logits(score, torch.ones(16, 1))


def by_detached_parameters(m, out, x, y, turn):
    """The divergence of a Gaussian from the standard one, of what was detached before."""
    mean, log_var = out.detach()[:, :2], out.detach()[:, 2:]
    divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()
    return F.cross_entropy(out, y) + 0.1 * divergence


def by_data(m, out, x, y, turn):
    return torch.stack([F.cross_entropy(out, y), (out.data**2).mean()]).sum()


def by_the_wrong_model(m, out, x, y, turn):
    given = m.judged(x)
    soft = F.kl_div(given.log_softmax(1), given.softmax(1) + 0.1, reduction="batchmean")
    return F.cross_entropy(out, y) + 10 * soft


def by_no_grad(m, out, x, y, turn):
    with torch.no_grad():
        weight = out.softmax(1)
    return F.cross_entropy(out, y) - 0.1 * -(weight * weight.log()).sum()


# What is named, and a part of its line.
FAULTY = {
    by_argmax: ("argmax", "out.argmax(1)"), by_comparison: ("gt", "out > 0"),
    by_a_criterion: (None, "m.hard(out"), by_detach: ("binary_cross_entropy_with_logits", "score"),
    by_data: ("pow", "out.data"), by_detached_parameters: ("getitem", "out.detach()"),
    by_the_wrong_model: (None, "self.teacher"),
    by_no_grad: ("softmax", "out.softmax"),
}  # fmt: skip


# What was asked for with gradients off was meant, or so it may be.
NOTES = (by_the_wrong_model, by_no_grad)


def soft_argmax(m, out, x, y, turn):
    wrong = 1 - out.softmax(1).gather(1, y[:, None])
    return F.cross_entropy(out, y) + 0.5 * wrong.mean()


def divergence_from_a_teacher(m, out, x, y, turn):
    """Its own entropy makes a divergence of a cross entropy."""
    given = m.judged(x).softmax(1)
    cross = -(given * out.log_softmax(1)).sum(1).mean()
    return cross - -(given * given.log()).sum(1).mean()


def divergence_from_a_detached(m, out, x, y, turn):
    given, taken = m.teacher(x).softmax(1), out.log_softmax(1)
    cross = -(given.detach() * taken).sum(1).mean()
    return cross + (given.detach() * given.detach().log()).sum(1).mean()


def another_value(m, out, x, y, turn):
    """The value of one loss with the gradient of another."""
    mine, shown = F.cross_entropy(out, y), F.mse_loss(out, F.one_hot(y, 4).float())
    return mine + (shown - mine).detach()


def shown_in_full(m, out, x, y, turn):
    return F.cross_entropy(out, y) + out.square().mean().detach() * 0.5


def wasserstein(m, out, x, y, turn):
    """The generator's step: what the critic says of real data is a constant."""
    with torch.no_grad():
        real = m.critic(torch.randn(16, 4))
    return real.mean() - m.critic(out).mean()


def frozen(m, out, x, y, turn):
    m.teacher.requires_grad_(False)
    return F.cross_entropy(out, y) + F.mse_loss(m.teacher(x), torch.zeros(16, 4))


def of_data(m, out, x, y, turn):
    return F.cross_entropy(out, y) + x.square().mean()


def balanced_by_ratio(m, out, x, y, turn):
    first, second = F.cross_entropy(out, y), out.square().mean()
    return first + (first / second).detach() * second


def moving_average(m, out, x, y, turn):
    mine = F.cross_entropy(out, y)
    m.ema = 0.9 * m.ema + 0.1 * mine.detach()
    return mine - m.ema


def straight_through(m, out, x, y, turn):
    """A quantiser whose table is moved by averages, and learns nothing by its own term."""
    nearest = torch.cdist(out, m.codes).argmin(1)
    code = m.codes[nearest]
    m.codes = m.codes + 0.01 * torch.randn(5, 4)
    passed = out + (code - out).detach()
    commit, table = F.mse_loss(out, code), F.mse_loss(code, out.detach())
    return m.critic(passed).mean().square() + commit + 0.25 * table


def switched_off(m, out, x, y, turn):
    return F.cross_entropy(out, y) + 0.0 * (out.argmax(1) != y).float().mean()


def by_turns(m, out, x, y, turn):
    """Each of two parts is learnt while the other waits."""
    mine = out.detach() if turn % 2 else out
    other = m.critic(out if turn % 2 else out.detach())
    first = F.mse_loss(mine, torch.zeros(16, 4))
    return first + other.square().mean()


def weighed_by_count(m, out, x, y, turn):
    right = (out.argmax(1) == y).float()
    each = F.cross_entropy(out, y, reduction="none")
    return (each * (1 - right)).sum() / (1 + right.sum()) + each.mean()


def straight_through_scalar(m, out, x, y, turn):
    """The number of open gates, with the gradient of how open they are."""
    gates = out.sigmoid()
    hard, soft = (out > 0).float().mean(), gates.mean()
    return F.cross_entropy(out, y) + 0.1 * (hard - soft.detach() + soft)


def self_paced(m, out, x, y, turn):
    """What is learnt is what is easy; how much that is counts, too."""
    each = F.cross_entropy(out, y, reduction="none")
    return each[each < 9].sum() - 0.1 * (each < 9).float().sum()


class Ponders(nn.Module):
    """How long it thought, as a share that is learnt and a count that is not."""

    def forward(self, out):
        return out.sigmoid().mean(), (out > 0).float().mean()


def pondered(m, out, x, y, turn):
    share, count = Ponders()(out)
    return F.cross_entropy(out, y) + 0.01 * (share + count)


HEALTHY = (
    straight_through_scalar, self_paced, pondered, soft_argmax, divergence_from_a_teacher,
    divergence_from_a_detached, another_value,
    shown_in_full, wasserstein, frozen, of_data, balanced_by_ratio, moving_average,
    straight_through, switched_off, by_turns, weighed_by_count,
)  # fmt: skip


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("loss_of", FAULTY)
def test_a_term_that_is_cut_off_is_told_with_the_line_that_does_it(loss_of, level):
    (found,) = find_live(trained(loss_of), "TT211", level=level)
    name, code = FAULTY[loss_of]
    assert (found.severity, found.step, found.op) == (
        "note" if loss_of in NOTES else "warning",
        7,
        name,
    )
    assert found.location.file == __file__
    assert code in found.location.code
    assert [link.op for link in found.chain][-1] == "loss"


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("loss_of", HEALTHY)
def test_what_is_no_mistake_is_silent(loss_of, level):
    assert find_live(trained(loss_of), "TT211", level=level) == []


def test_a_few_steps_say_nothing():
    assert find_live(trained(by_argmax, turns=7), "TT211") == []
    assert len(find_live(trained(by_argmax, turns=8), "TT211")) == 1


def test_several_terms_of_one_line_are_one_step():
    def twice(m, out, x, y, turn):
        return F.cross_entropy(out, y) + 0.1 * m.hard(out, y) + 0.1 * m.hard(out, y)

    (found,) = find_live(trained(twice), "TT211")
    assert found.step == 7


def test_a_penalty_without_create_graph_is_told_once():
    def penalised(m, out, x, y, turn):
        slope = torch.autograd.grad(out.sum(), m.student[2].weight, retain_graph=True)[0]
        return F.cross_entropy(out, y) + slope.square().mean()

    assert {f.code for f in find_live(trained(penalised), "TT209", "TT211")} == {"TT209"}


def step(number, term):
    """The loss is made of what `net` returns, and of one term more."""
    of = {"step": number}
    return [
        module("net", "weight"), call(0, "net", [], [1], [ok(1, requires_grad=True)], **of),
        op(1, "mean", [1], [2], [ok(2, requires_grad=True)], **of),
        op(2, "argmax", [1], [3], [ok(3)], **of), op(3, "float", [3], [4], [term], **of),
        op(4, "add", [2, 4], [5], [ok(5, requires_grad=True)], **of),
        loss(5, 1.0, 5, **of), closing(**of),
    ]  # fmt: skip


def steps(term):
    return [record for number in range(TURNS) for record in step(number, term)]


def test_only_a_number_counts():
    one = ok(4, shape=(), numel=1, min=2.0, max=2.0)
    assert len(find(steps(one), "TT211")) == 1
    assert find(steps(ok(4, shape=(3,), numel=3, min=2.0, max=2.0)), "TT211") == []
    assert find(steps(ok(4, shape=(), numel=1, min=0.0, max=0.0)), "TT211") == []
    assert find(steps(ok(4, shape=(), numel=1, dtype="int64")), "TT211") == []


def test_nothing_is_said_where_little_is_known():
    assert find([loss(0, 1.0, 9), closing()], "TT211") == []
    assert find([loss(0, 1.0), closing()], "TT211") == []
