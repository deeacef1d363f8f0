"""On a device one gate is one transfer: what is measured after it travels with the next."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.stats.queue import Stats, StatsQueue


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the tracer believe in a device; collects the size of each transfer."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    # It measures what is in host memory at once: nothing would wait for the gate.
    monkeypatch.setattr(compiled, "kernel", None)
    sizes: list[int] = []
    resolve = StatsQueue.resolve

    def count(queue: StatsQueue) -> list[Stats]:
        if len(queue):
            sizes.append(len(queue))
        return resolve(queue)

    monkeypatch.setattr(StatsQueue, "resolve", count)
    return sizes


def test_each_optimizer_step_is_one_transfer(transfers: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=io.BytesIO(), narrow=False):
        for _ in range(5):
            loss = model(torch.randn(3, 4)).square().mean()
            loss.backward()
            optimizer.step()
            loss.detach() * 2  # a metric after the gate
            optimizer.zero_grad()
    assert len(transfers) == 5 + 1  # the last one is the end of the block


def test_each_step_without_a_gate_of_its_own_is_one_transfer(transfers: list[int]) -> None:
    model = nn.Linear(4, 2)
    with trace(out=io.BytesIO(), narrow=False), torch.no_grad():
        for _ in range(5):
            model(torch.randn(3, 4))
    assert len(transfers) == 5
