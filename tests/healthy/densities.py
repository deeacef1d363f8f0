"""Losses that are no classification: densities, rewards, bounds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from tests.healthy import healthy


class Coupling(nn.Module):
    """An affine coupling of RealNVP over two dims; starts at the identity."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.swap = swap
        self.net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.flip(1).chunk(2, 1) if self.swap else x.chunk(2, 1)
        scale, shift = self.net(kept).chunk(2, 1)
        scale = scale.tanh()
        out = torch.cat([kept, moved * scale.exp() + shift], dim=1)
        return out.flip(1) if self.swap else out, scale.sum(1)


@healthy
def normalising_flow(steps: int) -> None:
    """The density of narrow data is high: the negative log-likelihood is below zero."""
    flow = nn.ModuleList(Coupling(bool(i % 2)) for i in range(4))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        x = 0.02 * torch.randn(64, 2)
        z, logdet = x / 0.05, torch.full((64,), -2 * math.log(0.05))
        for coupling in flow:
            z, more = coupling(z)
            logdet = logdet + more
        loglik = Normal(0.0, 1.0).log_prob(z).sum(1) + logdet
        loss = -loglik.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def mixture_density_network(steps: int) -> None:
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        y = torch.rand(64, 1) * 4 - 2
        x = y + 0.3 * torch.sin(3 * y) + 0.05 * torch.randn_like(y)
        logits, mean, logstd = model(x).chunk(3, dim=1)
        each = Normal(mean, logstd.clamp(-5, 2).exp()).log_prob(y)
        loss = -torch.logsumexp(logits.log_softmax(1) + each, dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def corridor(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Walk left, stay or right among five cells; the reward is at the right end."""
    place = (place + action - 1).clamp(0, 4)
    return place, (place == 4).float()


def masked_logits(policy: nn.Module, place: Tensor) -> Tensor:
    """There is no way left of the first cell nor right of the last."""
    logits = policy(F.one_hot(place, 5).float())
    wall = torch.stack([place == 0, torch.zeros_like(place).bool(), place == 4], dim=1)
    return logits.masked_fill(wall, -torch.inf)


@healthy
def policy_gradient_with_action_masks(steps: int) -> None:
    """REINFORCE with a baseline; many short walks at once."""
    policy = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(steps):
        place, chances, rewards = torch.randint(5, (16,)), [], []
        for _ in range(5):
            walk = Categorical(logits=masked_logits(policy, place))
            action = walk.sample()
            chances.append(walk.log_prob(action))
            place, reward = corridor(place, action)
            rewards.append(reward)
        gains = torch.stack(rewards).flip(0).cumsum(0).flip(0)
        gains = (gains - gains.mean()) / (gains.std() + 1e-8)
        loss = -(torch.stack(chances) * gains).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def actor_critic_with_clipped_ratio(steps: int) -> None:
    """PPO: a rollout without gradients, three passes over it, an entropy bonus with masks."""
    actor = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    critic = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    both = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(both, lr=5e-3, eps=1e-5)
    for _ in range(max(1, steps // 4)):
        place = torch.randint(5, (32,))
        with torch.no_grad():
            walk = Categorical(logits=masked_logits(actor, place))
            action = walk.sample()
            before = walk.log_prob(action)
            after, reward = corridor(place, action)
            value = critic(F.one_hot(place, 5).float()).squeeze(1)
            goal = reward + 0.9 * critic(F.one_hot(after, 5).float()).squeeze(1)
            gain = goal - value
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        for _ in range(3):
            logits = masked_logits(actor, place)
            ratio = (Categorical(logits=logits).log_prob(action) - before).exp()
            bound = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            chance = logits.softmax(1)
            entropy = -(chance * (chance + 1e-8).log()).sum(1)
            error = F.mse_loss(critic(F.one_hot(place, 5).float()).squeeze(1), goal)
            loss = -bound.mean() + 0.5 * error - 0.01 * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(both, 0.5)
            optimizer.step()


@healthy
def q_learning_with_target_network(steps: int) -> None:
    """Acts by argmax without gradients, learns from a memory, follows with a slow target."""
    q = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    target = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    target.load_state_dict(q.state_dict())
    optimizer = torch.optim.Adam(q.parameters(), lr=5e-3)
    memory: list[tuple[Tensor, ...]] = []
    place = torch.randint(5, (8,))
    for _ in range(steps):
        with torch.no_grad():
            best = q(F.one_hot(place, 5).float()).argmax(1)
        action = torch.where(torch.rand(8) < 0.3, torch.randint(3, (8,)), best)
        after, reward = corridor(place, action)
        memory = [*memory[-20:], (place, action, after, reward)]
        place = torch.where(torch.rand(8) < 0.2, torch.randint(5, (8,)), after)
        chosen = torch.randint(len(memory), (4,)).tolist()
        here, did, there, got = (torch.cat(column) for column in
                                 zip(*(memory[i] for i in chosen), strict=True))  # fmt: skip
        value = q(F.one_hot(here, 5).float()).gather(1, did[:, None]).squeeze(1)
        with torch.no_grad():
            goal = got + 0.9 * target(F.one_hot(there, 5).float()).max(1).values
        loss = F.smooth_l1_loss(value, goal)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(q.parameters(), 100.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), q.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
