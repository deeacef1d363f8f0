from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks.traced import find_live

CODE = "TT212"
GAMMA = 0.9


class Batch:
    """Transitions, as a replay buffer gives them."""

    def __init__(self):
        self.state, self.following = torch.randn(8, 4), torch.randn(8, 4)
        self.action, self.reward = torch.randint(3, (8, 1)), torch.randn(8, 1)
        self.done = (torch.rand(8, 1) > 0.8).float()


def learning(loss_of):
    def run():
        net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(3):
            adam.zero_grad()
            loss_of(net, Batch()).backward()
            adam.step()

    return run


def taken(net, batch):
    return net(batch.state).gather(1, batch.action)


def best(net, batch):
    return net(batch.following).amax(1, keepdim=True)


def plain(net, batch):
    return F.mse_loss(taken(net, batch), batch.reward + GAMMA * best(net, batch))


def swapped(net, batch):
    q = taken(net, batch)
    return nn.MSELoss()(batch.reward + GAMMA * best(net, batch) * (1 - batch.done), q)


def by_index(net, batch):
    q = net(batch.state)[torch.arange(8), batch.action[:, 0]]
    future = net(batch.following).max(dim=1)[0]
    return nn.SmoothL1Loss()(q, batch.reward[:, 0] + (1 - batch.done[:, 0]) * GAMMA * future)


def by_hand(net, batch):
    error = batch.reward + GAMMA * best(net, batch) - taken(net, batch)
    return error.pow(2).mean()


def written_to_zeros(net, batch):
    """As PyTorch's tutorial on reinforcement learning has it, but for no_grad."""
    q = taken(net, batch)
    goes_on, future = batch.done[:, 0] == 0, torch.zeros(8)
    future[goes_on] = net(batch.following[goes_on]).max(1).values
    expected = future * GAMMA + batch.reward[:, 0]
    return F.huber_loss(q, expected.unsqueeze(1)) + 1e-3 * q.square().mean()


@pytest.mark.parametrize("loss_of", [plain, swapped, by_index, by_hand, written_to_zeros])
def test_target_with_a_graph_is_told_once(loss_of):
    (found,) = find_live(learning(loss_of), CODE)
    assert (found.severity, found.step, found.phase) == ("warning", 0, "forward")
    assert "what Sequential returned with gradients on" in found.message
    assert "torch.no_grad()" in found.fix
    first, *_, last = found.chain
    assert first.op in ("amax", "max")
    assert last.op == "loss"


def under_no_grad(net, batch):
    q = taken(net, batch)
    with torch.no_grad():
        target = batch.reward + GAMMA * best(net, batch)
    return F.mse_loss(q, target)


def detached(net, batch):
    target = batch.reward + GAMMA * best(net, batch)
    return F.mse_loss(taken(net, batch), target.detach())


def detached_early(net, batch):
    error = taken(net, batch) - (batch.reward + GAMMA * best(net, batch).detach())
    return error.square().mean()


def of_a_copy(net, batch):
    """Its graph leads to parameters that nothing trains."""
    return F.mse_loss(taken(net, batch), batch.reward + GAMMA * best(nn.Linear(4, 3), batch))


def priorities_beside(net, batch):
    target = batch.reward + GAMMA * best(net, batch)
    q = taken(net, batch)
    (target - q).abs()
    return F.mse_loss(q, target.detach())


def first_of(net, batch):
    """A gap between actions, wanted to be large or small."""
    q = net(batch.state)
    margin = batch.reward.abs() + q.amax(1, keepdim=True)
    return F.l1_loss(q.gather(1, batch.action), margin)


def same_state(net, batch):
    margin = batch.reward.abs() + net(batch.state).amax(1, keepdim=True)
    return F.l1_loss(taken(net, batch), margin)


def consistent(net, batch):
    """Two views of one thing, both of which learn."""
    return F.mse_loss(net(batch.state), net(batch.state + 0.1 * torch.randn(8, 4)))


def mutual(net, batch):
    one, other = net(batch.state), net(batch.following)
    return F.mse_loss(one.gather(1, batch.action), other.amax(1, keepdim=True))


def of_an_equation(net, batch):
    """The integral of a right side, in which a network is at two times."""
    later = net(batch.following)[:, :1]
    return F.mse_loss(later, net(batch.state)[:, :1] + 0.1 * batch.reward)


@pytest.mark.parametrize(
    "loss_of",
    [under_no_grad, detached, detached_early, of_a_copy, priorities_beside, first_of, same_state,
     consistent, mutual, of_an_equation],
)  # fmt: skip
def test_targets_without_a_graph_and_what_has_two_sides_are_silent(loss_of):
    assert find_live(learning(loss_of), CODE) == []


def test_each_line_is_told_for_itself():
    def both(net, batch):
        return plain(net, batch) + by_index(net, batch)

    assert len(find_live(learning(both), CODE)) == 2
