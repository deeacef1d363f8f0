"""Statistics against NumPy in double precision, on every way that leads to them."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tensortrace.capture import compiled
from tensortrace.capture.stats import kernels
from tensortrace.capture.stats import queue as module
from tensortrace.capture.stats.queue import Stats, StatsQueue, stats_of, summarize
from tensortrace.capture.tensors import TensorTable
from tensortrace.capture.unwrap import plain, quiet

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["compiled", "torch"])
def kernel(request, monkeypatch):
    """Dense CPU tensors are measured by this kernel."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "kernel", None)
    elif compiled.kernel is None:
        pytest.skip("the kernel is not built, or switched off")


@pytest.fixture(
    params=[
        "compiled", "host", "device", "device snapshots", "device in small blocks",
        "host in small blocks",
    ]
)  # fmt: skip
def way(request, monkeypatch):
    """Every tensor takes this way to its numbers, the branch-free kernels included."""
    if request.param != "compiled":
        monkeypatch.setattr(compiled, "kernel", None)
    elif compiled.kernel is None:
        pytest.skip("the kernel is not built, or switched off")
    if request.param.startswith("device"):
        monkeypatch.setattr(kernels, "SMALL", 0)
        monkeypatch.setattr(module, "_HOST", frozenset())
        monkeypatch.setattr(kernels, "SNAPSHOT", 40 if "snapshots" in request.param else 0)
    if request.param == "device in small blocks":
        monkeypatch.setattr(module, "_DEVICE_BYTES", 7 * 4)
    if request.param == "host in small blocks":
        monkeypatch.setattr(kernels, "SMALL", 3)
        monkeypatch.setattr(module, "_BLOCK", 7)
    return request.param


def oracle(tensor) -> Stats:
    """The definition, in NumPy and long doubles."""
    if tensor.is_complex():
        wide = tensor.detach().resolve_conj().to(torch.complex128).numpy().ravel()
        bad = np.isnan(wide.real) | np.isnan(wide.imag)
        x = np.where(bad, np.nan, np.hypot(wide.real, wide.imag)).astype(np.longdouble)
    elif tensor.is_floating_point():
        x = tensor.detach().resolve_neg().to(torch.float64).numpy().ravel().astype(np.longdouble)
    else:
        x = tensor.numpy().ravel().astype(np.longdouble)
    counts = [int(np.sum(c)) for c in (np.isnan(x), x == INF, x == -INF, x == 0)]
    first = next((i for i, finite in enumerate(np.isfinite(x)) if not finite), None)
    x = x[np.isfinite(x)]
    if not len(x):
        return Stats(*counts, first_bad=first)
    numbers = x.min(), x.max(), x.mean(), np.sqrt(((x - x.mean()) ** 2).mean())
    norm = np.sqrt((x * x).sum())
    return Stats(*counts, *(float(number) for number in numbers), float(norm), first_bad=first)


def assert_same(got: Stats, want: Stats, relative=1e-5, bounds=0.0):
    assert got[:4] == want[:4]
    assert got.unmeasured is None
    assert got.first_bad in (want.first_bad, None)  # None where it is not on the host
    if want.min is None:
        assert got[4:10] == (None,) * 6
        return
    assert (got.min, got.max) == pytest.approx((want.min, want.max), rel=bounds, abs=0)
    largest = max(abs(want.min), abs(want.max))
    assert got.mean == pytest.approx(want.mean, rel=relative, abs=1e-6 * largest)
    assert got.std == pytest.approx(want.std, rel=relative, abs=3e-7 * abs(want.mean))
    assert got.norm == pytest.approx(want.norm, rel=relative)
    assert all(type(count) is int for count in got[:4])
    assert all(type(number) is float for number in got[4:9])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
VALUES = {
    "random": random(40),
    "one": torch.tensor([0.7]),
    "zero": torch.zeros(5),
    "negative zero": torch.tensor([-0.0, 0.0, 1.0]),
    "nan": torch.tensor([1.0, NAN, 0.0, 3.0]),
    "all nan": torch.full((20,), NAN),
    "infinities": torch.tensor([INF, -INF, INF, 2.0, -5.0]),
    "all infinite": torch.tensor([INF, -INF, INF]),
    "all bad": torch.tensor([INF, NAN, -INF]),
    "positive with a nan": torch.tensor([3.0, NAN, 5.0]),
    "negative with an infinity": torch.tensor([-3.0, INF, -5.0]),
    "constant": torch.full((50,), 0.1),
    "large mean": 1000 + random(60),
    "large mean, half nan": torch.where(torch.arange(60) % 2 == 0, 1000 + random(60), NAN),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_floats_agree_with_the_oracle(way, values, dtype):
    tensor = values.to(dtype)
    assert_same(summarize(tensor), oracle(tensor))


EXTREMES = {
    "squares overflow": torch.tensor([1e30, -2e30, 3e29]),
    "opposite ends": torch.tensor([3.4e38, -3.4e38, -3.4e38, -3.4e38]),
    "squares vanish": torch.tensor([1e-30, -2e-30, 0.0]),
    "denormals": torch.tensor([1e-45, 1e-40, 0.0, -0.0]),
    "wide range": torch.tensor([1e-38, 1.0, 1e20, 3e38, NAN]),
    "doubles overflow": torch.tensor([1e200, -3e200, 1e180, INF], dtype=torch.float64),
    "doubles vanish": torch.tensor([1e-200, 3e-200, 0.0], dtype=torch.float64),
    "smallest doubles": torch.tensor([5e-324, 1e-310, 0.0], dtype=torch.float64),
    "far doubles": torch.tensor([1e-300, 1e300], dtype=torch.float64),
}


@pytest.mark.parametrize("tensor", EXTREMES.values(), ids=EXTREMES)
def test_no_square_overflows_or_vanishes(way, tensor):
    assert_same(summarize(tensor), oracle(tensor))


def test_the_norm_of_doubles_saturates():
    got = summarize(torch.full((9,), 1.7e308, dtype=torch.float64))
    assert (got.norm, got.mean) == pytest.approx((1.797e308, 1.7e308), rel=1e-3)


INTEGERS = [
    torch.tensor([-(2**63), 2**63 - 1, 0]),
    torch.tensor([2**64 - 1, 0], dtype=torch.uint64),
    torch.tensor([True, False, True]),
    torch.tensor([-128, 127, 0, 0], dtype=torch.int8),
    *(
        torch.arange(30).to(dtype)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32)
    ),
]


@pytest.mark.parametrize("tensor", INTEGERS, ids=lambda t: str(t.dtype))
def test_integers_are_summed_as_doubles(way, tensor):
    assert_same(summarize(tensor), oracle(tensor))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_cast(way, dtype):
    tensor = torch.tensor([1.0, -2.0, 0.0, NAN]).to(dtype)
    assert_same(summarize(tensor), oracle(tensor.float()))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_a_complex_number_is_its_modulus(way, dtype):
    numbers = [3 + 4j, 0j, complex(NAN, 1), complex(INF, NAN), complex(-INF, 1), 1 - 1j]
    tensor = torch.tensor(numbers).to(dtype)
    assert_same(summarize(tensor), oracle(tensor), bounds=1e-7)
    assert_same(summarize(tensor[3:].conj()), oracle(tensor[3:].conj()), bounds=1e-7)


def test_the_modulus_does_not_overflow(way):
    assert summarize(torch.tensor([3e30 + 4e30j])).max == pytest.approx(5e30)


LAYOUTS = {
    "0-d": torch.tensor(3.0),
    "transposed": random(6, 5).t(),
    "strided": random(8, 9)[::2, 1::3],
    "flipped by hand": random(40).as_strided((3, 4), (1, 7), 2),
    "overlapping": random(20).unfold(0, 8, 1),
    "expanded": random(5, 1).expand(5, 7),
    "expanded twice": torch.tensor([1.0, NAN, INF]).expand(4, 2, 3),
    "expanded scalar": torch.tensor(2.5).expand(6),
    "channels last": random(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted slice": random(4, 5, 6).permute(2, 0, 1)[:, 1:3],
    "negative view": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "zero tensor": torch._efficientzerotensor((2, 3)),
    "inside a storage": random(100)[13:31],
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(way, tensor):
    assert_same(summarize(tensor), oracle(tensor.clone()))


def described(tensor) -> Stats:
    """The statistics that a hook's description of a tensor has."""
    queue = StatsQueue()
    with torch._C.DisableTorchFunction():
        _, draft = TensorTable(queue).identify(tensor)
    queue.resolve()
    return Stats(*draft.stats())


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["random", "one", "negative zero", "nan", "all bad", "constant"])
def test_a_description_has_the_numbers_of_the_oracle(name):
    assert_same(described(VALUES[name]), oracle(VALUES[name]))


@pytest.mark.usefixtures("kernel")
def test_a_description_knows_how_nearly_equal_numbers_differ():
    nearly = 1e7 + torch.arange(6000.0) % 3
    assert described(nearly).std == pytest.approx((2 / 3) ** 0.5, rel=1e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_a_description_reads_what_its_strides_say(tensor):
    assert_same(described(tensor), oracle(tensor.clone()))


@pytest.mark.usefixtures("kernel")
def test_a_description_reads_nothing_that_is_wrapped_or_not_there():
    shrunk = torch.ones(8)[4:]
    shrunk.untyped_storage().resize_(20)
    for gone in (freed(), shrunk):
        assert described(gone).unmeasured == "no storage"
    assert described(torch._to_functional_tensor(torch.ones(2))).unmeasured == "functional"
    seen = []
    torch.vmap(lambda row: seen.append(described(row)) or row)(torch.full((2, 3), 5.0))
    assert (seen[0].min, seen[0].unmeasured) == (5.0, None)


def test_an_expanded_tensor_is_not_unfolded():
    got = summarize(torch.tensor([0.0, 3.0, NAN]).expand(2**40, 3))
    assert (got.nan, got.zeros, got.max) == (2**40, 2**40, 3.0)
    assert got.norm == pytest.approx(3 * 2**20)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_an_empty_tensor_has_no_numbers(way, shape):
    assert summarize(torch.empty(shape)) == Stats()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1.0]), min_size=1),
    st.sampled_from([0, 3]),
)
def test_small_arrays_agree_with_the_oracle(values, small):
    tensor = torch.tensor(values, dtype=torch.float32)
    want = oracle(tensor)
    assert_same(summarize(tensor), want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "kernel", None)
        patch.setattr(kernels, "SMALL", small)
        if not small:
            patch.setattr(module, "_HOST", frozenset())
            patch.setattr(kernels, "SNAPSHOT", 0)
        assert_same(summarize(tensor), want)


LARGE = {
    "normal": random,
    "relu": lambda n: random(n).relu(),
    "uniform": lambda n: random(n).abs().clamp(max=1),
    "constant": lambda n: torch.full((n,), 0.1),
    "large mean": lambda n: 300 + random(n),
    "one nan": lambda n: random(n).index_fill(0, torch.tensor([n - 2]), NAN),
    "huge": lambda n: random(n) * 1e30,
    "tiny": lambda n: random(n) * 1e-30,
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", FLOATS[:2] + FLOATS[3:])
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_many_elements_lose_no_precision(make, dtype):
    tensor = make(100_001).to(dtype)
    assert_same(summarize(tensor), oracle(tensor))


@pytest.mark.usefixtures("kernel")
def test_large_strided_tensors_are_cut_into_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 10_000)
    for tensor in (random(200, 400)[:, ::3], random(30_000, 2)[:, 0], random(3, 50_000)[:, ::2]):
        assert_same(summarize(tensor), oracle(tensor))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint16, torch.uint8])
def test_no_bit_pattern_warns(dtype):
    if dtype is torch.uint32:
        bits = torch.tensor([0x7F800001, 0xFF800001, 0x7FC00000, 1]).to(dtype)
        views = [bits.view(torch.float32)]
    elif dtype is torch.uint16:
        bits = torch.arange(2**16).to(dtype)[:: 2**4].contiguous()
        views = [bits.view(torch.float16), bits.view(torch.bfloat16)]
    else:
        views = [torch.arange(256).to(dtype).view(torch.float8_e4m3fn)]
    for view in views:
        assert_same(summarize(view), oracle(view.float()))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_give_the_values_that_they_store():
    dense = torch.tensor([[0.0, 2.0], [3.0, NAN]])
    for sparse in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        assert_same(summarize(sparse), oracle(torch.tensor([2.0, 3.0, NAN])))
    with_zeros = torch.sparse_coo_tensor([[0, 0, 1]], [1.0, 2.0, 0.0], (3,))
    assert_same(summarize(with_zeros), oracle(torch.tensor([1.0, 2.0, 0.0])))
    assert not with_zeros.is_coalesced()
    assert with_zeros._nnz() == 3


def test_jagged_tensors_give_all_their_values():
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert_same(summarize(nested), oracle(torch.cat(parts)))


def test_functorch_levels_are_unwrapped():
    seen = []

    def loss(x):
        seen.append(summarize(x))
        return (x * x).sum()

    tensor = random(3, 4)
    torch.func.vmap(torch.func.grad(loss))(tensor)
    assert_same(seen[0], oracle(tensor))


class Plain(torch.Tensor):
    pass


class Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("not to be called")


@pytest.mark.usefixtures("kernel")
def test_a_subclass_without_dispatch_is_measured():
    tensor = random(5)
    for kind in (Plain, Refuses, torch.nn.Parameter):
        with torch._C.DisableTorchFunction():
            other = tensor.clone().as_subclass(kind)
        assert_same(summarize(other), oracle(tensor))


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("not to be called")


def freed():
    tensor = torch.ones(8)
    view = tensor[4:]
    tensor.untyped_storage().resize_(0)
    return view


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


UNREADABLE = {
    "meta": lambda: torch.empty(3, device="meta"),
    "fake": fake,
    "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "subclass Wrapper": lambda: Wrapper(torch.ones(2)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(2)),
    "no storage": freed,
    "error: TypeError": lambda: "not a tensor",
}


@pytest.mark.parametrize(("why", "make"), UNREADABLE.items(), ids=UNREADABLE)
def test_what_cannot_be_read_says_why(way, why, make):
    assert summarize(make()) == Stats(unmeasured=why)


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_nested_tensors_are_only_described():
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    assert summarize(quantized).unmeasured == "quantized"
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert summarize(nested).unmeasured == "nested"


def test_a_queue_returns_by_ticket_and_is_empty_afterwards(way):
    queue = StatsQueue()
    tensors = [random(n, seed=n) for n in (1, 30, 5)]
    tickets = [queue.add(tensor) for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert len(queue) == 3
    queue.resolve()
    for ticket, n in zip(tickets, (1, 30, 5), strict=True):
        assert_same(stats_of(ticket), oracle(random(n, seed=n)))
    assert len(queue) == 0
    assert queue.resolve() == []


def test_level_minmax_counts_and_bounds_only(way):
    queue = StatsQueue("minmax")
    queue.add(torch.tensor([0.0, 4.0, -1.0]))
    queue.add(torch.tensor([NAN, 4.0, INF]))
    results = [stats._replace(first_bad=None) for stats in queue.resolve()]
    assert results == [Stats(min=-1.0, max=4.0), Stats(1, 1, 0, min=4.0, max=4.0)]


def test_level_light_has_counts_and_norm_of_larger_tensors(way):
    x = random(9000, seed=3)
    x[7], x[11], x[5] = 0.0, NAN, -INF
    queue = StatsQueue("light")
    for each in (x, random(9000, seed=4), random(9000, seed=4).half(), random(9, seed=5)):
        queue.add(each)
    bad, plain, half, small = queue.resolve()
    want = oracle(x)
    assert bad[:4] == want[:4]
    assert bad.norm == pytest.approx(want.norm, rel=1e-5)
    assert plain == Stats(norm=pytest.approx(oracle(random(9000, seed=4)).norm, rel=1e-5))
    assert half.norm == pytest.approx(plain.norm, rel=1e-3)
    if not way.startswith("device") and way != "host in small blocks":
        assert_same(small, oracle(random(9, seed=5)))


def test_level_none_measures_nothing():
    queue = StatsQueue("none")
    queue.add(torch.ones(3))
    assert queue.resolve() == [Stats(unmeasured="off")]


def test_a_scalar_that_has_no_memory_or_is_none_is_not_read():
    freed = torch.ones(1)
    freed.untyped_storage().resize_(0)
    queue = StatsQueue()
    tickets = queue.add_scalars([torch.empty(0), freed, torch.ones(1, device="meta")])
    queue.resolve()
    assert [stats_of(ticket).min for ticket in tickets] == [None, None, None]
    assert [stats_of(ticket).unmeasured for ticket in tickets] == [None, "no storage", "meta"]


@pytest.mark.parametrize("level", ["full", "light", "minmax", "none"])
def test_scalars_are_queued_at_any_level(way, level):
    queue = StatsQueue(level)
    values = [torch.tensor(2.5), torch.tensor(NAN), torch.tensor(7, dtype=torch.int32)]
    tickets = queue.add_scalars(values)
    values[0].zero_()
    queue.resolve()
    assert [stats_of(ticket).min for ticket in tickets] == [2.5, None, 7.0]
    assert stats_of(tickets[1]).nan == 1


def test_no_tensor_is_kept_alive(way):
    queue = StatsQueue()
    tensor = random(2000)
    alive = weakref.ref(tensor)
    storage = weakref.ref(tensor.untyped_storage())
    queue.add(tensor)
    del tensor
    assert alive() is None
    assert storage() is None


@pytest.mark.parametrize("n", [5, 20_000])
def test_the_tensor_is_left_as_it_was(way, n):
    tensor = random(n)
    leaf = random(n).requires_grad_()
    with torch.inference_mode():
        inference = random(n)
    before, version, state = tensor.clone(), tensor._version, torch.get_rng_state()
    for each in (tensor, leaf, leaf * 2, inference):
        assert summarize(each).unmeasured is None
    assert torch.equal(tensor, before)
    assert tensor._version == version
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert leaf.grad_fn is None
    tensor.resize_(10 * n)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class CountingFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [5, 20_000])
def test_user_modes_see_nothing(way, n):
    tensors = [random(n), random(n).to(torch.complex64), random(n, 2)[:, 0], random(n).to_sparse()]
    with Counting() as dispatch, CountingFunctions() as functions:
        results = [summarize(tensor) for tensor in tensors]
        assert all(result.unmeasured is None for result in results)
    assert (dispatch.count, functions.count) == (0, 0)


@pytest.mark.parametrize("n", [5, 20_000])
def test_fake_mode_vmap_and_autocast_do_not_reach_us(way, n):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensor = random(n)
    want, seen = oracle(tensor), []
    with FakeTensorMode():
        seen.append(summarize(tensor))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(summarize(tensor))
    torch.func.vmap(lambda x: seen.append(summarize(tensor)) or x)(torch.ones(2))
    torch.set_default_device("meta")
    try:
        seen.append(summarize(tensor))
    finally:
        torch.set_default_device(None)
    for got in seen:
        assert_same(got, want)


@pytest.mark.usefixtures("kernel")
def test_user_settings_of_numpy_do_not_reach_us():
    with np.errstate(all="raise"):
        for values in (*VALUES.values(), *EXTREMES.values()):
            assert summarize(values).unmeasured is None


def test_out_of_memory_costs_one_tensor(monkeypatch):
    def fail(tensor):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(compiled, "kernel", None)
    queue = StatsQueue()
    queue.add(torch.ones(2))
    with monkeypatch.context() as patch:
        patch.setattr(module, "plain", fail)
        patch.setattr(kernels, "SMALL", 0)
        queue.add(torch.ones(2))
    queue.add(torch.ones(3))
    assert [stats.unmeasured for stats in queue.resolve()] == [None, "out of memory", None]


@pytest.mark.usefixtures("kernel")
def test_many_threads_share_a_queue():
    queue = StatsQueue()
    tickets: list[tuple[Any, int]] = []

    def work(start):
        for number in range(start, start + 50):
            tickets.append((queue.add(torch.tensor([float(number)])), number))
            if number % 20 == 0:  # a gate of another thread
                queue.resolve()

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.resolve()
    assert len(tickets) == 200
    assert all(stats_of(ticket).max == number for ticket, number in tickets)


@pytest.mark.usefixtures("kernel")
def test_the_end_of_a_run_that_garbage_collection_meets_finds_the_queue_free() -> None:
    queue, asked, kept = StatsQueue(), [], []

    class Ends:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            asked.append(queue.resolve())

    def work() -> None:
        for _ in range(300):
            Ends()
            queue.add(torch.ones(3))
            kept.append(queue.resolve())

    most = gc.get_threshold()
    gc.set_threshold(20)
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(timeout=60)
    finally:
        gc.set_threshold(*most)
    assert not thread.is_alive()
    assert asked


def test_quiet_blocks_nest_and_restore():
    with quiet():
        assert not torch.is_grad_enabled()
        with quiet():
            assert isinstance(plain(torch.ones(1)), torch.Tensor)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="mine"), quiet():
        raise ValueError("mine")
    with Counting() as dispatch:
        torch.ones(2)
    assert dispatch.count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_syncs_once_however_many_tensors():
    tensors = [values.cuda() for values in (*VALUES.values(), *EXTREMES.values())]
    tensors += [make(100_001).cuda() for make in LARGE.values()]
    queue = StatsQueue()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tensor in tensors:
            queue.add(tensor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, tensor in zip(queue.resolve(), tensors, strict=True):
        assert_same(got, oracle(tensor.cpu()))


def views_with_one_bad() -> list[tuple[torch.Tensor, int]]:
    """Tensors of each kind that is measured in its own way, and where their first bad one is."""
    small, large = torch.zeros(5, 7), torch.zeros(1100, 1000)
    found = []
    for whole in (small, small.double(), small.bfloat16(), small.to(torch.complex64), large):
        for view in (whole.clone(), whole.clone().t(), whole.clone()[:, ::2]):
            rows, columns = view.shape
            view[rows - 2, 1] = math.nan
            view[rows - 1, 0] = -math.inf
            found.append((view, (rows - 2) * columns + 1))
    return found


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("index", range(15))
def test_first_bad_element_is_found_row_by_row_whatever_lies_where_in_memory(index: int) -> None:
    tensor, expected = views_with_one_bad()[index]
    assert summarize(tensor).first_bad == expected


@pytest.mark.usefixtures("kernel")
def test_nothing_is_first_where_all_is_finite_or_cannot_be_said() -> None:
    assert summarize(torch.zeros(3)).first_bad is None
    assert summarize(torch.zeros(20_000)).first_bad is None
    # The values that a sparse tensor stores have other places than its elements.
    sparse = torch.tensor([[0.0, math.nan]]).to_sparse()
    assert (summarize(sparse).nan, summarize(sparse).first_bad) == (1, None)


@pytest.mark.usefixtures("kernel")
def test_first_bad_element_of_each_of_many_small_tensors() -> None:
    queue = StatsQueue()
    for i in range(40):
        x = torch.zeros(i + 1)
        if i % 3:
            x[i // 2 :] = math.inf
        queue.add(x)
    firsts = [stats.first_bad for stats in queue.resolve()]
    assert firsts == [i // 2 if i % 3 else None for i in range(40)]
