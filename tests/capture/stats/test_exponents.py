from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.stats import kernels
from tensortrace.capture.stats import queue as module
from tensortrace.capture.stats.exponents import LEAST, RUN, SAMPLE, count_exponents
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.records import Call, Param

kernel: Any = compiled.kernel
needs_kernel = pytest.mark.skipif(kernel is None, reason="the kernel is not built, or switched off")

INF, NAN = math.inf, math.nan
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALF)


def count_by_log2(tensor: torch.Tensor) -> tuple[int, ...]:
    """The definition of the buckets, one element at a time."""
    counts = [0] * 16
    for value in tensor.double().flatten().tolist():
        if value and math.isfinite(value):
            exponent = math.frexp(value)[1] - 1
            counts[min(15, max(0, (exponent + 32) // 4 + 1))] += 1
    return tuple(counts)


def by_kernel(tensor: torch.Tensor) -> tuple[int, ...]:
    place = compiled.place(tensor)
    assert place is not None
    counts: tuple[int, ...] = kernel.measure_closely(*place, SAMPLE, RUN)[-1]
    return counts


def by_torch(tensor: torch.Tensor) -> tuple[int, ...]:
    counts = count_exponents(tensor)
    assert counts is not None
    return tuple(counts.tolist())


def closely(tensor: torch.Tensor) -> tuple[int, ...] | None:
    queue = StatsQueue()
    queue.counts = True
    queue.add(tensor)
    return queue.resolve()[0].exponents


@pytest.fixture(params=["compiled", "torch", "device", "device without snapshots"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "compiled":
        monkeypatch.setattr(compiled, "kernel", None)
    elif kernel is None:
        pytest.skip("the kernel is not built, or switched off")
    if request.param.startswith("device"):
        monkeypatch.setattr(kernels, "SMALL", 0)
        monkeypatch.setattr(module, "_HOST", frozenset())
    if "without" in request.param:
        monkeypatch.setattr(kernels, "SNAPSHOT", 0)
    return str(request.param)


def edges() -> torch.Tensor:
    powers = [2.0**e for e in range(-40, 30)]
    below = [value * (1 - 2**-9) for value in powers]
    values = torch.tensor([*powers, *below, 0.0, -0.0, NAN, INF, -INF, 1e-45, 1e-320]).double()
    return torch.cat([values, -values])


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_are_counted_at_every_edge(dtype: torch.dtype) -> None:
    tensor = edges().to(dtype)
    assert by_kernel(tensor) == count_by_log2(tensor)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_is_in_its_bucket(dtype: torch.dtype) -> None:
    for bits in torch.arange(-(2**15), 2**15).to(torch.int16).split(SAMPLE):
        tensor = bits.view(dtype)
        assert by_torch(tensor) == count_by_log2(tensor)
        if kernel is not None:
            assert by_kernel(tensor) == count_by_log2(tensor)


@needs_kernel
@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=8, max_size=800), st.sampled_from(FLOATS))
def test_any_bits_are_counted(memory: bytes, dtype: torch.dtype) -> None:
    whole = len(memory) - len(memory) % 8
    tensor = torch.from_numpy(np.frombuffer(memory[:whole], np.uint8).copy()).view(dtype)
    assert by_kernel(tensor) == count_by_log2(tensor)


@needs_kernel
@pytest.mark.parametrize("n", [1, 63, SAMPLE, SAMPLE + 1, 3 * SAMPLE, 20 * SAMPLE + 3, 1_000_003])
def test_both_ways_take_the_same_sample(n: int) -> None:
    for dtype in HALF:
        tensor = (torch.randn(n) * torch.logspace(-9, 9, n)).to(dtype)
        assert by_kernel(tensor) == by_torch(tensor)
        assert sum(by_torch(torch.ones(n).to(dtype))) <= min(n, SAMPLE)


@needs_kernel
def test_sample_is_spread_over_the_whole() -> None:
    n = 20 * SAMPLE + 3
    counts = by_kernel(torch.arange(float(n)))
    assert SAMPLE * 0.9 < sum(counts) <= SAMPLE
    # From 2**16 on.
    assert counts[13] / sum(counts) == pytest.approx(1 - 2**16 / n, abs=0.01)


def test_distribution_comes_with_the_statistics(way: str) -> None:
    for dtype in HALF if way != "compiled" else FLOATS:
        tensor = torch.cat([torch.full((300,), 0.5), torch.full((9,), 1e-5), torch.zeros(7)])
        tensor = tensor.to(dtype)
        assert closely(tensor) == count_by_log2(tensor)
        assert closely(tensor.view(4, 79).t()) == count_by_log2(tensor)
        assert closely(tensor[: LEAST - 1]) is None
        assert closely(tensor[:LEAST]) == count_by_log2(tensor[:LEAST])
        assert closely(edges().to(dtype)) == count_by_log2(edges().to(dtype))


def test_several_on_one_device_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernel", None)
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(module, "_HOST", frozenset())
    queue = StatsQueue()
    queue.counts = True
    tensors = [torch.randn(n).to(d) for n in (10, 100, 5000) for d in (torch.float32, *HALF)]
    for tensor in tensors:
        queue.add(tensor)
    found = queue.resolve()
    for stats, tensor in zip(found, tensors, strict=True):
        assert stats.max == float(tensor.max())
        asked = tensor.dtype in HALF and tensor.numel() >= LEAST
        assert stats.exponents == (by_torch(tensor) if asked else None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("way")
def test_what_has_gaps_or_no_values_has_no_distribution() -> None:
    half = torch.ones(200, 2, dtype=torch.float16)
    others = [
        half[:, 0],
        half[:, :1].expand(200, 9),
        torch.ones(200, dtype=torch.int64),
        torch.ones(200, dtype=torch.float16, device="meta"),
        torch.nested.nested_tensor([half, half]),
        torch.eye(30, dtype=torch.float16).to_sparse(),
    ]
    for tensor in others:
        assert closely(tensor) is None


def test_queue_is_asked_for_it_and_at_the_full_level_only() -> None:
    tensor = torch.ones(100, dtype=torch.float16)
    for level, counts, lean in (
        ("full", False, False), ("full", True, True), ("minmax", True, False), ("none", True, False)
    ):  # fmt: skip
        queue = StatsQueue(level)  # type: ignore[arg-type]
        queue.counts, queue.lean = counts, lean
        queue.add(tensor)
        assert queue.resolve()[0].exponents is None


@needs_kernel
def test_calls_and_parameters_of_full_steps_have_it() -> None:
    records: list[object] = []
    model = nn.Linear(10, 20)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=records.append, every=1):
        out = model(torch.randn(8, 10))
        out.pow(2).sum().backward()
        before = count_by_log2(model.weight)
        sgd.step()
    calls = [r for r in records if isinstance(r, Call)]
    given = [tensor for call in calls for tensor in call.tensors if tensor.shape == (8, 20)]
    # The gradient of sum() is expanded: it has no such memory.
    assert {sum(tensor.exponents) for tensor in given if tensor.exponents} == {160}
    assert count_by_log2(out) in [tensor.exponents for tensor in given]
    weight, bias = (r.value for r in records if isinstance(r, Param))
    assert weight.exponents is not None
    assert sum(weight.exponents) == sum(before) == 200
    assert bias.exponents is None
