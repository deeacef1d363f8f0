from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensortrace.records import Optimizer
from tests.capture import record


def first(make: Any) -> Optimizer:
    def program(_: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        optimizer = make(model)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()

    one, two = record(program).of(Optimizer)
    assert two.eps == [], "told with the parameters only"
    return one


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters(), "eps": 1e-6}, {"params": model[1].parameters()}]


@pytest.mark.parametrize(
    ("make", "eps"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), [1e-8]),
        (lambda m: torch.optim.AdamW(groups(m), eps=1e-4), [1e-6, 1e-4]),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), []),
    ],
)
def test_epsilon_of_each_group_comes_with_the_names_of_its_parameters(
    make: Any, eps: list[float]
) -> None:
    assert first(make).eps == eps
