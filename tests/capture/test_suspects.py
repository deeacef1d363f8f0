"""Which of several outermost calls is run again, and what in its replay is to blame."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.checks.traced import find_live


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        norm = torch.sqrt(x.square().sum(1, keepdim=True))  # the cause
        return x / (norm + 1e-6)


class Distance(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sqrt((a - b).square().sum(1))  # the cause


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) + mask
        weights = F.softmax(scores, -1)  # the cause
        return self.out((weights @ v).mean(1))


def many_modules(bad_at: int) -> None:
    """One module spoils the gradient, and four that are called after it do not."""
    modules = [nn.Linear(4, 8, bias=False), Unit(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8),
               nn.Linear(8, 1)]  # fmt: skip
    optimizer = torch.optim.Adam([p for m in modules for p in m.parameters()])
    for step in range(bad_at + 3):
        x = torch.randn(8, 4)
        x[3] = 0.0 if step == bad_at else 0.1
        for module in modules:
            x = module(x)
        optimizer.zero_grad()
        x.square().mean().backward()
        optimizer.step()


def called_twice(bad_at: int) -> None:
    """Of two calls of one module the first spoils the gradient."""
    embed, distance = nn.Linear(4, 8), Distance()
    optimizer = torch.optim.Adam(embed.parameters())
    for step in range(bad_at + 3):
        anchor, same, other = (torch.randn(8, 4) for _ in range(3))
        if step == bad_at:
            same[2] = anchor[2]
        near = distance(embed(anchor), embed(same))
        far = distance(embed(anchor), embed(other))
        optimizer.zero_grad()
        (near - far + 1).relu().mean().backward()
        optimizer.step()


def mask_comes_in(bad_at: int) -> None:
    """A row of -inf throughout, in a mask that is an input: adding it is no fault, softmax is."""
    model = Attention()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(bad_at + 3):
        hidden = torch.arange(6) >= torch.tensor([6, 5, 0 if step == bad_at else 1, 3])[:, None]
        mask = torch.zeros(4, 1, 6).masked_fill(hidden[:, None], -math.inf)
        optimizer.zero_grad()
        model(torch.randn(4, 6, 8), mask).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bad_at", [1, 33])
@pytest.mark.parametrize(("program", "code", "op"), [
    (many_modules, "TT102", "sqrt"), (called_twice, "TT102", "sqrt"),
    (mask_comes_in, "TT101", "softmax"),
])  # fmt: skip
def test_the_op_to_blame_is_found(program, code: str, op: str, bad_at: int) -> None:
    found = [f for f in find_live(lambda: program(bad_at)) if f.severity != "note"]
    assert [(f.step, f.code, f.op, f.evidence["placed"]) for f in found] == [
        (bad_at, code, op, "exact")
    ]
    assert found[0].location is not None
    assert found[0].location.code is not None
    assert found[0].location.code.endswith("# the cause")
