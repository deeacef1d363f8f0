"""Which of several outermost calls is run again, and what in its replay is to blame."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrace.records import Finding
from tests.capture import record
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


class Sampler(nn.Module):
    """Returns what it has used itself, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.var, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        var = F.softplus(self.var(x)) * mask
        std = torch.sqrt(var)  # the cause
        return self.out(x + std), var


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


def returned_and_used(bad_at: int, beside: Callable[[Tensor], Tensor]) -> None:
    """The gradient of a second output is spoilt inside, and reaches it from outside as well."""
    model = Sampler()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(bad_at + 3):
        mask = torch.ones(4)
        mask[2] = float(step != bad_at)
        x = torch.randn(8, 4)
        out, var = model(x, mask)
        loss = F.mse_loss(out, x) + beside(var)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def taken_by_a_mean(bad_at: int) -> None:
    returned_and_used(bad_at, lambda var: var.mean())


def taken_without_a_graph(bad_at: int) -> None:
    returned_and_used(bad_at, lambda var: var.detach().mean())


@pytest.mark.parametrize("bad_at", [1, 33])
@pytest.mark.parametrize(("program", "code", "op"), [
    (many_modules, "TT102", "sqrt"), (called_twice, "TT102", "sqrt"),
    (mask_comes_in, "TT101", "softmax"), (taken_by_a_mean, "TT102", "sqrt"),
    (taken_without_a_graph, "TT102", "sqrt"),
])  # fmt: skip
def test_the_op_to_blame_is_found(program, code: str, op: str, bad_at: int) -> None:
    found = [f for f in find_live(lambda: program(bad_at)) if f.severity != "note"]
    assert [(f.step, f.code, f.op, f.evidence["placed"]) for f in found] == [
        (bad_at, code, op, "exact")
    ]
    assert found[0].location is not None
    assert found[0].location.code is not None
    assert found[0].location.code.endswith("# the cause")


def test_where_no_replay_is_possible_the_module_is_named_and_not_what_took_its_result() -> None:
    found = [f for f in find_live(lambda: taken_by_a_mean(1), narrow=False) if f.severity != "note"]
    assert [(f.step, f.code, f.op) for f in found] == [(1, "TT102", None)]
    told = "the backward of Sampler, or of what took its output unseen, made "
    assert found[0].message.startswith(told)


class Spikes(nn.Module):
    """Spoils a batch in two ways, one of them again and again; the loop passes those over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, step: int) -> Tensor:
        h = self.first(x)
        if step >= 3:
            h = h + torch.sqrt(-h.abs() - 1)  # the first cause
        h = self.last(h)
        return h * 0 if step < 3 else h

    def train_on(self, steps: int) -> None:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            loss = self(torch.randn(4, 4), step).square().mean()
            loss.backward()
            if loss.isfinite():
                optimizer.step()


class OtherSpikes(Spikes):
    def forward(self, x: Tensor, step: int) -> Tensor:
        y: Tensor = super().forward(x, 3 if step == 3 else 0)
        return y + torch.log(-x.abs().sum() - 1) if step == 9 else y  # the second cause


def test_a_second_cause_in_the_same_model_is_narrowed_too() -> None:
    found = find_live(lambda: OtherSpikes().train_on(12), "TT101")
    assert [(f.step, f.op, f.evidence["placed"]) for f in found] == [
        (3, "sqrt", "exact"), (9, "log", "exact"),
    ]  # fmt: skip


def test_a_cause_that_stays_is_replayed_once() -> None:
    got = record(lambda _: Spikes().train_on(12))
    assert [action.step for action in got.actions("replay")] == [3]


class Leaf(nn.Module):
    """Spoils what it returns at several lines, each in steps of its own."""

    def __init__(self, steps: dict[str, set[int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor, step: int) -> Tensor:
        if step in self.steps.get("log", ()):
            return x + torch.log(-x.abs().sum() - 1)
        if step in self.steps.get("sqrt", ()):
            return x + torch.sqrt(-x.abs() - 1)
        return x + torch.exp(x.abs() + 200) if step in self.steps.get("exp", ()) else x


class Around(Spikes):
    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: Tensor, step: int) -> Tensor:
        y: Tensor = self.last(self.leaf(self.first(x), step))
        return y

    def train_on(self, steps: int) -> None:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            self(torch.randn(4, 4), step).square().mean().backward()
            if all(bool(p.grad.isfinite().all()) for p in self.parameters() if p.grad is not None):
                optimizer.step()


@pytest.mark.parametrize("level", ["module", "op"])
def test_each_cause_in_one_leaf_is_a_finding(level: str) -> None:
    steps = {"log": {3}, "sqrt": {6, 7, 10}, "exp": {9}}
    found = find_live(lambda: Around(Leaf(steps)).train_on(12), "TT101", level=level)
    assert [(f.step, f.op) for f in found] == [(3, "log"), (6, "sqrt"), (9, "exp")]


def test_each_cause_in_the_backward_of_one_module_is_a_finding() -> None:
    steps = {"sqrt": {3, 4, 10}, "norm": {8}}

    class Own(Around):
        def forward(self, x: Tensor, step: int) -> Tensor:
            h = self.first(x)
            if step in steps["sqrt"]:
                h = h + torch.sqrt(h * 0)
            if step in steps["norm"]:
                h = h + torch.log(h * 0 + 1) * torch.sqrt((h * 0).norm(dim=1, keepdim=True))
            y: Tensor = self.last(h)
            return y

    found = find_live(lambda: Own(nn.Identity()).train_on(12), "TT102")
    assert [(f.step, f.op, f.evidence["placed"]) for f in found] == [
        (3, "sqrt", "exact"), (8, "sqrt", "exact"),
    ]  # fmt: skip
    assert found[0].location != found[1].location


def test_a_cause_that_comes_and_goes_is_one_finding_and_is_replayed_three_times() -> None:
    got = record(lambda _: Around(Leaf({"log": set(range(1, 30, 2))})).train_on(30))
    assert [action.step for action in got.actions("replay")] == [1, 3, 5]
    assert [(f.code, f.step, f.op) for f in got.of(Finding)] == [("TT101", 1, "log")]


class Block(nn.Module):
    def __init__(self, bad_from: int) -> None:
        super().__init__()
        self.layer, self.bad_from = nn.Linear(4, 4), bad_from

    def forward(self, x: Tensor, step: int) -> Tensor:
        h: Tensor = self.layer(x)
        return h + torch.log(h * 0) * 0 if step >= self.bad_from else h  # the cause


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(7), Block(5)])

    def forward(self, x: Tensor, step: int) -> Tensor:
        for block in self.blocks:
            x = block(x, step)
        return x


def test_the_same_op_in_another_block_is_another_cause() -> None:
    def program() -> None:
        model = Blocks()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(10):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 4), step).square().mean()
            loss.backward()
            if loss.isfinite():
                optimizer.step()

    found = find_live(program, "TT101")
    assert [(f.step, f.op, f.evidence["placed"]) for f in found] == [
        (5, "log", "exact"), (7, "log", "exact"),
    ]  # fmt: skip
