from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.checks.traced import find_live

CODE = "TT413"


class Stack(nn.Module):
    """Runs its layers one after another, each followed by `between`."""

    def __init__(self, layers, between=lambda x, y: y):
        super().__init__()
        self.layers, self.between = nn.ModuleList(layers), between

    def forward(self, x):
        for layer in self.layers:
            x = self.between(x, layer(x))
        return x


class Heads(nn.Module):
    """One head for each of several features, as detectors have it at each layer of a decoder."""

    def __init__(self, width=8, residual=0.0):
        super().__init__()
        self.residual = residual
        self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.heads = nn.ModuleList([nn.Linear(8, width)] * 3)

    def forward(self, x):
        total = 0.0
        for layer, head in zip(self.body, self.heads, strict=True):
            x = self.residual * x + layer(x)
            total = total + head(x)
        return total


class Loop(nn.Module):
    """As ALBERT does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(4):
            x = F.gelu(self.layer(x))
        return x


class Named(Stack):
    def __init__(self):
        super().__init__([nn.Linear(8, 8)] * 3)
        self.layer = self.layers[0]


def block():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8))


def training(build):
    def run():
        model = build()
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            sgd.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            sgd.step()

    return run


FAULTS = {
    "sequential": lambda: nn.Sequential(*[block()] * 4),
    "list": lambda: Stack([nn.Linear(8, 8)] * 4),
    "with activations": lambda: nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), *[nn.Linear(8, 8), nn.Tanh()] * 4, nn.Linear(8, 1)
    ),
    "in place": lambda: nn.Sequential(*[nn.Linear(8, 8), nn.ReLU(inplace=True)] * 4),
    "activation between": lambda: Stack([nn.Linear(8, 8)] * 4, lambda _, y: F.silu(y)),
    "residual": lambda: Stack([block()] * 4, lambda x, y: x + y),
    "dropout": lambda: Stack([block()] * 4, lambda _, y: F.dropout(y, 0.1)),
    "inside": lambda: nn.Sequential(nn.Linear(8, 8), Stack([block()] * 4), nn.Linear(8, 1)),
}


@pytest.mark.parametrize("build", FAULTS.values(), ids=FAULTS.keys())
def test_stack_of_one_layer_is_told_once(build):
    found = find_live(training(build), CODE)
    first, *others = found
    assert (first.severity, first.step, first.value) == ("note", 0, 4)
    assert "4 times in a row" in first.message
    assert "for _ in range(4)]" in first.fix
    assert not others or "LayerNorm" in others[0].message


def around():
    first = nn.Linear(8, 8)
    return nn.Sequential(first, block(), first)


def of_one_activation():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu)


def tied():
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight = one.weight
    return nn.Sequential(one, other)


def frozen():
    model = nn.Sequential(*[nn.Linear(8, 8)] * 3, nn.Linear(8, 1))
    return model.requires_grad_(False).append(nn.Linear(1, 1))


def recomputed():
    layers = nn.ModuleList(block() for _ in range(3))
    return Stack(layers, lambda x, y: y + checkpoint(layers[0], x, use_reentrant=False))


SILENT = {
    "mended": lambda: nn.Sequential(*[block() for _ in range(4)]),
    "copies": lambda: Stack([copy.deepcopy(layer) for layer in [block()] * 4]),
    "a loop": Loop,
    "a name of its own": Named,
    "heads": Heads,
    "narrow heads": lambda: Heads(1),
    "residual heads": lambda: Heads(residual=0.5),
    "first and last": around,
    "activation": of_one_activation,
    "tied weights": tied,
    "nothing to train": frozen,
    "called again": recomputed,
}


@pytest.mark.parametrize("build", SILENT.values(), ids=SILENT.keys())
def test_layers_of_their_own_and_what_is_shared_on_purpose_are_silent(build):
    assert find_live(training(build), CODE) == []


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        encoder = block()
        self.body = nn.Linear(8, 16)
        self.encoders = nn.ModuleDict({"query": encoder, "key": encoder})

    def forward(self, x):
        query, key = self.body(x).chunk(2, -1)
        return self.encoders["query"](F.relu(query)) * self.encoders["key"](F.relu(key))


def test_one_encoder_for_two_inputs_is_no_stack():
    assert find_live(training(Towers), CODE) == []
