from __future__ import annotations

import math
from typing import Any

import numpy as np
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


def test_numbers_that_are_not_finite_come_with_every_step() -> None:
    def program(_: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(groups(model), lr=math.inf)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.param_groups[1].update(weight_decay=np.float64("nan"), betas=(0.9, math.inf))
            optimizer.param_groups[0]["max_norm"] = math.inf

    one, two = record(program).of(Optimizer)
    assert one.stray == {}, "of the learning rate `lr` tells"
    assert two.stray == {"1.weight_decay": "NaN", "1.betas": "Infinity"}
