"""The Triton kernels in Triton's interpreter, against the oracle of test_queue.

Run by test_kernel.py in a process of its own: Triton decides when it is imported whether it
interprets, and a torch with CUDA imports it by itself.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensortrace.capture import compiled
from tensortrace.capture.stats import kernels
from tensortrace.capture.stats import queue as module
from tensortrace.capture.stats.cuda import launch as cuda_launch
from tensortrace.capture.stats.cuda import rows as cuda_rows
from tensortrace.capture.stats.cuda.launch import Launcher, divide
from tensortrace.capture.stats.exponents import count_exponents
from tensortrace.capture.stats.queue import Stats, StatsQueue
from tests.capture.stats.devices import queue_on_host
from tests.capture.stats.test_queue import (
    EXTREMES,
    FLOATS,
    INF,
    INTEGERS,
    LARGE,
    LAYOUTS,
    NAN,
    VALUES,
    assert_same,
    oracle,
    random,
    views_with_one_bad,
)

# Triton's interpreter makes numbers of arrays of one element; NumPy 2.4 refuses that.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The kernels, read by Triton's interpreter."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    return importlib.import_module("tensortrace.capture.stats.cuda.kernel")


@pytest.fixture
def queue(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> StatsQueue:
    """Every tensor is on a device, and is reduced by the Triton kernels."""
    monkeypatch.setattr(compiled, "kernel", None)
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(module, "_HOST", frozenset())
    launcher = Launcher()
    launcher._kernels, launcher._kinds = interpreted, dict(cuda_launch._KINDS)
    return queue_on_host(launcher=launcher)


def measure(queue: StatsQueue, *tensors: torch.Tensor) -> list[Stats]:
    for tensor in tensors:
        queue.add(tensor)
    found = queue.resolve()
    assert queue.devices.reducer.launcher.trouble is None
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_agree_with_the_oracle(queue: StatsQueue, dtype: torch.dtype) -> None:
    tensors = [values.to(dtype) for values in VALUES.values()]
    for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
        assert_same(got, oracle(tensor), relative=1e-12)
        assert got.first_bad == oracle(tensor).first_bad


def test_no_square_overflows_or_vanishes(queue: StatsQueue) -> None:
    for got, tensor in zip(measure(queue, *EXTREMES.values()), EXTREMES.values(), strict=True):
        assert_same(got, oracle(tensor), relative=1e-12)


def test_integers_are_summed_as_doubles(queue: StatsQueue) -> None:
    for got, tensor in zip(measure(queue, *INTEGERS), INTEGERS, strict=True):
        assert_same(got, oracle(tensor))


def test_what_no_kernel_reads_is_cast_first(queue: StatsQueue) -> None:
    eighth = torch.tensor([1.0, -2.0, 0.0, NAN]).to(torch.float8_e4m3fn)
    modulus = torch.tensor([3 + 4j, 0j, complex(NAN, 1), complex(-INF, 1), 1 - 1j])
    assert_same(measure(queue, eighth)[0], oracle(eighth.float()))
    for tensor in (modulus, modulus.conj(), modulus.to(torch.complex128)):
        assert_same(measure(queue, tensor)[0], oracle(tensor), bounds=1e-7)


def test_strides_do_not_matter(queue: StatsQueue) -> None:
    for got, tensor in zip(measure(queue, *LAYOUTS.values()), LAYOUTS.values(), strict=True):
        assert_same(got, oracle(tensor.clone()), relative=1e-12)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1.0]),
        min_size=1, max_size=40,
    )
)  # fmt: skip
def test_any_floats_agree_with_the_oracle(queue: StatsQueue, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    for each in (tensor, tensor.double()):
        (got,) = measure(queue, each)
        assert_same(got, oracle(each), relative=1e-9)
        assert got.first_bad == oracle(each).first_bad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_many_elements_lose_no_precision(queue: StatsQueue, make: Any, dtype: torch.dtype) -> None:
    tensor = make(100_001).to(dtype)
    assert divide(tensor.numel())[0] > 20
    assert_same(measure(queue, tensor)[0], oracle(tensor), relative=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [64, 4096, 5000, 100_003])
def test_exponents_are_counted_of_the_same_sample_as_by_torch(
    queue: StatsQueue, dtype: torch.dtype, n: int
) -> None:
    values = random(n) * torch.exp2(torch.randint(-40, 40, (n,)).float())
    values[::7], values[3], values[5] = 0.0, NAN, INF
    tensor = values.to(dtype)
    queue.counts = True
    (got,) = measure(queue, tensor)
    expected = count_exponents(tensor)
    assert expected is not None
    assert got.exponents == tuple(expected.tolist())
    assert_same(got, oracle(tensor))


def test_the_memory_of_a_stream_is_used_again_when_it_is_full(
    queue: StatsQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_rows, "_PARTS", 40)
    monkeypatch.setattr(cuda_rows, "_TENSORS", 7)
    queue.counts = True
    for _ in range(3):
        tensors = [random(n, seed=n) for n in (5, 90_000, 100, 20_000, 1, 70_001, 64, 3, 9, 5000)]
        for got, tensor in zip(measure(queue, *tensors), tensors, strict=True):
            assert_same(got, oracle(tensor), relative=1e-11)
            assert (got.exponents is None) == (tensor.numel() < 64)
    (lane,) = queue.devices.reducer._lanes.values()
    assert len(lane.pages) == 1


def test_single_numbers_come_over_as_they_are(queue: StatsQueue) -> None:
    values = [torch.tensor(x) for x in (1.5, NAN, INF, -INF, 0.0, -2.0) * 5]
    (first, *_), _ = results = queue.devices.numbers(values), queue.add(random(5000))
    assert results[0] is not None
    assert first.by_kernel
    queue.resolve()
    queue.devices.fetch(results[0])
    for result, value in zip(results[0], values, strict=True):
        want = oracle(value)
        assert result.rows[0][:3] == want[:3]
        assert result.rows[0][4:7] == (
            (0, 0.0, 0.0) if want.min is None else (1, want.min, want.max)
        )


@pytest.mark.parametrize("index", range(12))
def test_first_bad_element_is_found_row_by_row_whatever_lies_where_in_memory(
    queue: StatsQueue, index: int
) -> None:
    tensor, expected = views_with_one_bad()[index]
    queue.locates = True
    assert measure(queue, tensor)[0].first_bad == expected
