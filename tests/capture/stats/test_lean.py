"""What thinned steps measure without the compiled kernel: counts exactly, and the norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.stats.queue import Stats, StatsQueue, summarize
from tensortrace.records import Call, Step


@pytest.fixture(autouse=True)
def torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernel", None)


LARGE = 1_300_001  # three blocks, and a rest that fills no row


def measure(tensor: torch.Tensor) -> Stats:
    queue = StatsQueue()
    queue.lean = True
    queue.add(tensor)
    return queue.resolve()[0]


def test_zeros_are_counted_and_the_norm_has_six_digits() -> None:
    tensor = torch.randn(LARGE).relu()
    expected = Stats(
        zeros=int((tensor == 0).sum()),
        norm=pytest.approx(tensor.double().norm().item(), rel=1e-6),
    )
    assert measure(tensor) == expected


@pytest.mark.parametrize("value", [0.1, 1e-30, 1e30, -3.4e38, 0.0])
def test_norm_of_equal_elements_is_right_at_any_scale(value: float) -> None:
    tensor = torch.full((LARGE,), value)
    norm = abs(tensor[0].double().item()) * math.sqrt(LARGE)
    assert measure(tensor).norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, LARGE // 2, LARGE - 1])
def test_one_element_that_is_not_finite_is_counted(bad: float, at: int) -> None:
    tensor = torch.randn(LARGE)
    tensor[at] = bad
    found, full = measure(tensor), summarize(tensor)
    assert (found.nan, found.posinf, found.neginf) == (full.nan, full.posinf, full.neginf)
    assert found.nan + found.posinf + found.neginf == 1


def test_small_tensors_are_measured_in_full() -> None:
    tensor = torch.randn(8192)
    assert measure(tensor) == summarize(tensor)


def test_step_line_of_a_thinned_step_is_that_of_a_full_one() -> None:
    def lines(every: int) -> tuple[list[Step], list[Call]]:
        torch.manual_seed(0)
        records: list[object] = []
        model = nn.Sequential(nn.Linear(100, 200), nn.ReLU())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with trace(out=records.append, every=every):
            for _ in range(3):
                model(torch.randn(64, 100)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        steps = [record for record in records if isinstance(record, Step)]
        return steps, [record for record in records if isinstance(record, Call)]

    (full, calls), (thinned, left) = lines(1), lines(2)
    assert len(left) < len(calls)
    assert [step.full for step in thinned] == [True, False, True]
    for one, other in zip(full, thinned, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert one.modules.path == other.modules.path
        assert one.modules.zero_frac == other.modules.zero_frac
        for column in ("output_rms", "grad_rms", "param_grad_rms"):
            expected = pytest.approx(getattr(one.modules, column), rel=1e-5)
            assert getattr(other.modules, column) == expected
        # From 4,096 elements instead of all 20,000: known to a percent and a half.
        assert other.modules.update_ratio == pytest.approx(one.modules.update_ratio, rel=0.06)
