"""The compiled kernel and its twins against float64 NumPy, and which memory it is given."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import threading
import tracemalloc
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.stats.queue import Stats, StatsQueue, stats_of, summarize
from tensortrace.capture.tensors import TensorDraft, TensorTable, _head
from tensortrace.records import Call, Header, Tensor

kernel: Any = compiled.kernel
needs_kernel = pytest.mark.skipif(kernel is None, reason="the kernel is not built, or switched off")

INF, NAN = math.inf, math.nan
SUBNORMAL = 1e-322
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BITS = {
    torch.float32: (np.uint32, torch.int32), torch.float64: (np.uint64, torch.int64),
    torch.float16: (np.uint16, torch.int16), torch.bfloat16: (np.uint16, torch.int16),
}  # fmt: skip


def oracle(tensor: torch.Tensor) -> Stats:
    """The definition in NumPy, wider than any element: nothing overflows or vanishes."""
    x = tensor.detach().to(torch.float64).numpy().ravel().astype(np.longdouble)
    counts = [int(np.sum(c)) for c in (np.isnan(x), x == INF, x == -INF, x == 0)]
    first = next((i for i, finite in enumerate(np.isfinite(x)) if not finite), None)
    x = x[np.isfinite(x)]
    if not len(x):
        return Stats(*counts, first_bad=first)
    spread = np.sqrt(((x - x.mean()) ** 2).mean())
    numbers = (float(v) for v in (x.min(), x.max(), x.mean(), spread))
    norm = min(float(np.sqrt((x * x).sum())), np.finfo(np.float64).max)
    return Stats(*counts, *numbers, norm, first_bad=first)


def assert_same(got: Stats, want: Stats, relative: float = 1e-6) -> None:
    assert got.unmeasured is None
    assert (got[:4], got.first_bad) == (want[:4], want.first_bad)
    assert (got.min, got.max) == (want.min, want.max)
    if want.min is None or want.max is None:
        assert got[4:9] == (None,) * 5
        return
    largest = max(abs(want.min), abs(want.max))
    # A mean of both signs, and a spread beside it, are right in relation to what was added.
    # (And to a subnormal, which has few digits.)
    assert got.mean == pytest.approx(want.mean, rel=relative, abs=1e-9 * largest + SUBNORMAL)
    assert got.std == pytest.approx(want.std, rel=relative, abs=1e-7 * largest + SUBNORMAL)
    assert got.norm == pytest.approx(want.norm, rel=relative, abs=SUBNORMAL)


def without_kernel(tensor: torch.Tensor) -> Stats:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "kernel", None)
        return summarize(tensor)


def of_bits(bits: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    signed = bits.view(bits.dtype.name.removeprefix("u"))
    return torch.from_numpy(signed.copy()).view(dtype)


@st.composite
def any_bits(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any bit patterns: subnormals, NaN with any payload, both zeros, huge numbers."""
    dtype = draw(st.sampled_from(FLOATS))
    bits = draw(npst.arrays(BITS[dtype][0], st.integers(1, 70)))
    repeats = draw(st.sampled_from([1, 1, 3, 150]))  # 150: more than one block
    return of_bits(np.tile(bits, repeats), dtype)


@st.composite
def ordinary(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of moderate numbers, some of them bad, of odd length, at any scale."""
    dtype = draw(st.sampled_from(FLOATS))
    n = draw(st.integers(1, 10_000))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    scale = 10.0 ** draw(st.integers(-4, 4))
    values = (generator.standard_normal(n) + draw(st.sampled_from([0.0, 3.0]))) * scale
    for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -0.0]), max_size=6)):
        values[generator.integers(n, size=1 + n // 50)] = value
    return torch.from_numpy(values).to(dtype)


@needs_kernel
@settings(deadline=None, max_examples=300)
@given(any_bits() | ordinary())
def test_compiled_statistics_agree_with_the_oracle(tensor: torch.Tensor) -> None:
    assert_same(summarize(tensor), oracle(tensor))


@settings(deadline=None, max_examples=150)
@given(ordinary())
def test_torch_statistics_agree_with_the_oracle(tensor: torch.Tensor) -> None:
    assert_same(without_kernel(tensor), oracle(tensor), relative=1e-5)


@needs_kernel
@settings(deadline=None, max_examples=150)
@given(any_bits())
def test_both_kernels_say_the_same_of_any_bits(tensor: torch.Tensor) -> None:
    assert_same(summarize(tensor), without_kernel(tensor), relative=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 4095, 4096, 4097, 140_003])
def test_no_element_is_left_out_or_read_twice(dtype: torch.dtype, n: int) -> None:
    for at in {0, n // 2, n - 1}:
        tensor = torch.ones(n, dtype=dtype)
        tensor[at] = -3
        assert_same(summarize(tensor), oracle(tensor))
        tensor[at] = INF
        assert summarize(tensor).first_bad == at


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_storm_of_bad_elements_is_counted(dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((20_001,), value, dtype=dtype)
    assert_same(summarize(tensor), oracle(tensor))
    tensor[5000:9500] = 0.5
    assert_same(summarize(tensor), oracle(tensor))


@needs_kernel
def test_memory_needs_no_alignment() -> None:
    for dtype in FLOATS:
        values = torch.randn(1000).to(dtype)
        raw = values.view(torch.uint8).numpy().tobytes()
        for shift in range(9):
            moved = bytearray(shift) + raw
            memory = np.frombuffer(moved, np.uint8)
            address, code = memory.ctypes.data + shift, compiled._DTYPES[dtype][1]
            assert_same(Stats(*kernel.measure(address, 1000, code)), oracle(values))


LAYOUTS = {
    "0-d": torch.tensor(2.0),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
    "with dims of one": torch.randn(4, 1, 3, 1).transpose(0, 2),
    "inside a storage": torch.arange(100.0)[13:31],
}


@needs_kernel
@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_dense_strides_in_any_order_are_read_in_place(tensor: torch.Tensor) -> None:
    assert compiled.place(tensor) is not None
    assert_same(summarize(tensor), oracle(tensor.clone()))
    assert compiled.place(torch.nn.Parameter(tensor)) is not None


def test_first_bad_is_row_by_row_where_memory_is_not() -> None:
    tensor = torch.zeros(3, 4)
    tensor[2, 0] = tensor[1, 2] = NAN
    assert summarize(tensor.t().contiguous().t()).first_bad == 6


ROWS = {
    "a step of a sequence": torch.randn(5, 7, 20)[:, 3],
    "a step of one feature": torch.arange(40.0).reshape(8, 5)[:, 2],
    "a chunk": torch.randn(2, 3, 60).chunk(3, -1)[1],
    "a chunk of heads": torch.randn(2, 3, 4, 60)[..., 20:40].transpose(1, 2),
    "every second row": torch.randn(9, 17)[::2],
    "with dims of one": torch.randn(4, 1, 30, 1)[:, :, :11],
    "doubles": torch.randn(3, 40, dtype=torch.float64)[:, 1:38],
    "bf16": torch.randn(300, 50).to(torch.bfloat16)[:, :33],
}


@needs_kernel
@pytest.mark.parametrize("tensor", ROWS.values(), ids=ROWS)
def test_rows_with_gaps_between_them_are_read_in_place(tensor: torch.Tensor) -> None:
    assert compiled.place(tensor) is None
    assert compiled.rows_place(tensor) is not None
    assert_same(summarize(tensor), oracle(tensor.clone()))


@needs_kernel
@settings(deadline=None, max_examples=200)
@given(any_bits() | ordinary(), st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_gaps_are_not_read(tensor: torch.Tensor, columns: int, gap: int, lean: bool) -> None:
    rows = len(tensor) // columns
    if rows < 2:
        return
    inner = tensor[: rows * columns].reshape(rows, columns)
    memory = torch.full((rows, columns + gap), NAN, dtype=tensor.dtype)
    memory[:, :columns] = inner
    place = compiled.rows_place(memory[:, :columns])
    if place is None:  # long columns of few elements
        assert columns < 16
        return
    row, full = Stats(*kernel.measure_rows(*place, lean)), oracle(inner)
    if lean and tensor.dtype != torch.float64:
        assert (row[:4], row.first_bad) == (full[:4], full.first_bad)
        assert row.norm == (full.norm and pytest.approx(full.norm, rel=1e-6, abs=0))
    elif lean:
        assert row.norm == (full.norm and pytest.approx(full.norm, rel=1e-6, abs=SUBNORMAL))
    else:
        assert_same(row, full)


def test_thinned_steps_measure_rows_with_gaps_as_they_measure_others() -> None:
    tensor = torch.randn(100, 200)[:, :150]
    full = oracle(tensor)
    assert lean(tensor).zeros == full.zeros
    assert lean(tensor).norm == pytest.approx(full.norm, rel=1e-6)
    tensor[7, 9] = NAN
    assert_same(lean(tensor), oracle(tensor))


@needs_kernel
def test_rows_that_are_none_are_refused() -> None:
    address, columns, code, rows, pitch = compiled.rows_place(torch.ones(4, 9)[:, :5])
    for wrong in ((columns, code, 0, pitch), (columns, code, rows, columns - 1),
                  (0, code, rows, pitch), (columns, code, 2**62, pitch)):  # fmt: skip
        with pytest.raises(ValueError, match="no such rows"):
            kernel.measure_rows(address, *wrong, False)
    with pytest.raises(TypeError):
        kernel.measure_rows(address, columns, code)


class Liar(torch.Tensor):
    def data_ptr(self) -> int:
        return 8


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def shrunk() -> torch.Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(8)
    return tensor


def shrunk_rows() -> torch.Tensor:
    tensor = torch.ones(4, 6)[:, :5]
    tensor.untyped_storage().resize_(4 * 22)  # an element less than it ends with
    return tensor


OTHERS = {
    "empty": lambda: torch.empty(0),
    "integers": lambda: torch.ones(3, dtype=torch.int32),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e5m2),
    "with gaps in two dims": lambda: torch.ones(4, 4, 4)[:, :3, :3],
    "long columns": lambda: torch.ones(5000, 2)[:, 0],
    "expanded": lambda: torch.ones(1).expand(5),
    "overlapping": lambda: torch.ones(20).unfold(0, 8, 1),
    "equal strides": lambda: torch.ones(4).as_strided((2, 2), (1, 1)),
    "negative view": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "zero tensor": lambda: torch._efficientzerotensor((2, 3)),
    "meta": lambda: torch.ones(3, device="meta"),
    "fake": fake,
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "storage too small": shrunk,
    "storage too small for rows": shrunk_rows,
    "subclass": lambda: torch.ones(3).as_subclass(Liar),
    "not a tensor": lambda: [1.0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_no_address_is_taken_of_anything_else(make: Any) -> None:
    with torch._C.DisableTorchFunction():
        assert compiled.place(make()) is None
        assert compiled.rows_place(make()) is None
        assert kernel is None or kernel.sample(make(), 4096, 64) is None


def made_by_ops() -> list[torch.Tensor]:
    x = torch.randn(3, 5, requires_grad=True)
    changed = torch.randn(4, requires_grad=True) * 1
    view = changed[1:]
    view.mul_(2)
    with torch.inference_mode():
        unversioned = torch.ones(3).view(3)
    detached = torch.ones(6).view(2, 3)
    detached.add_(1)
    return [x, x * 2, (x @ x.t()).sum(), x.view(15), view, changed, unversioned, detached,
            x.detach(), torch.nn.Parameter(torch.ones(2), requires_grad=False),
            torch.tensor([1.0, NAN, INF]), torch.ones(2, 0), torch.arange(3)]  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("mode", ["full", "closely", "lean", "minmax"])
def test_a_look_says_what_asking_one_thing_at_a_time_does(mode: str) -> None:
    queue = StatsQueue("minmax" if mode == "minmax" else "full")
    queue.lean, queue.counts = mode == "lean", mode == "closely"
    large = torch.randn(10_000)
    large_and_bad = large.clone()
    large_and_bad[9_000] = -INF
    looked_at = 0
    with torch._C.DisableTorchFunction():
        for tensor in [*LAYOUTS.values(), *ROWS.values(), *made_by_ops(), large, large_and_bad]:
            found = queue.look(tensor, 7)
            want = queue.add(tensor)
            queue.resolve()
            if found is not None:
                looked_at += found[0] is not None
                assert found[0] in (None, _head(tensor, 7))
                assert found[0] is None or type(found[0][1]) is tuple
                assert Stats(*found[1]) == stats_of(want)
    assert looked_at > 12


@needs_kernel
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_nothing_else_is_looked_at(make: Any) -> None:
    with torch._C.DisableTorchFunction():
        assert StatsQueue().look(make(), 0) is None


@needs_kernel
def test_a_look_that_is_told_nonsense_says_so() -> None:
    for wrong in ((torch.ones(1), 0, 3), (torch.ones(1), 0), (torch.ones(1), 0, -1)):
        with pytest.raises(TypeError, match="look"):
            kernel.look(*wrong)
    for wrong in ((8192, 0, 4096, 64), (8192, 64, 0, 64), (8192, 64, 4096, 2**40)):
        with pytest.raises(ValueError, match="nothing to sample"):
            kernel.prepare(torch.Tensor, torch.nn.Parameter, {}, *wrong)


def test_no_address_is_taken_inside_functorch() -> None:
    seen: list[Any] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(compiled.place(x) or compiled.rows_place(x))
        if kernel is not None:
            seen.append(kernel.look(x, 0, 1))
            seen.append(kernel.look(x.t(), 0, 0))
        return (x * x).sum()

    torch.func.vmap(look)(torch.ones(3, 4, 2))
    torch.func.vmap(torch.func.vmap(look))(torch.ones(3, 4, 2, 2))
    torch.func.grad(look)(torch.ones(3, 2))
    torch.func.functionalize(look)(torch.ones(3, 2))
    assert seen == [None] * (4 if kernel is None else 12)


@needs_kernel
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_views_of_anything_else_are_not_looked_at_either(make: Any) -> None:
    with torch._C.DisableTorchFunction():
        for view in (lambda x: x.t(), lambda x: x[None], lambda x: x[:2], lambda x: x.detach()):
            try:
                seen = view(make())
            except Exception:
                continue
            if isinstance(seen, torch.Tensor) and not compiled.is_dense_cpu(seen):
                assert kernel.look(seen, 0, 1) is None


def test_memory_that_moved_is_read_where_it_is_now() -> None:
    tensor = torch.ones(10)
    assert summarize(tensor).max == 1
    tensor.resize_(1_000_000).fill_(2)
    assert summarize(tensor).max == 2
    tensor.set_(torch.full((5,), 3.0))
    assert summarize(tensor).max == 3
    tensor.untyped_storage().resize_(0)
    assert summarize(tensor).unmeasured == "no storage"
    tensor.untyped_storage().resize_(20)
    tensor.fill_(4)
    assert summarize(tensor).max == 4


@needs_kernel
def test_calls_without_memory_are_refused() -> None:
    for wrong in ((0, 3, 0), (8, -1, 0), (8, 2**62, 0), (8, 1, 4), (8, 1, -1)):
        with pytest.raises(ValueError, match="no"):
            kernel.measure(*wrong)
        with pytest.raises(ValueError, match="no"):
            kernel.measure_closely(*wrong, 4096, 16)
    for args in ((), (1, 2), ("a", 1, 0)):
        with pytest.raises(TypeError):
            kernel.measure(*args)
    for wrong in ((0, 16), (4096, 0), (-1, 1), (2**31, 16), (4096, 2**31)):
        with pytest.raises(ValueError, match="nothing to sample"):
            kernel.measure_closely(8, 1, 0, *wrong)
    assert kernel.measure(0, 0, 0) == (0, 0, 0, 0, *[None] * 8)


@needs_kernel
def test_denormals_are_seen_where_a_thread_flushes_them() -> None:
    tensor = torch.tensor([1e-45, 0.0, -1e-40] * 20)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        got = summarize(tensor)
        flushed = float(tensor[0] + 0)
    finally:
        torch.set_flush_denormal(False)
    assert flushed == 0, "what the user asked for stays as it was"
    assert_same(got, oracle(tensor))


@needs_kernel
def test_threads_measure_at_once() -> None:
    tensors = [torch.full((300_000,), float(k)) for k in range(4)]
    wrong: list[Stats] = []

    def work(k: int) -> None:
        for _ in range(20):
            if (got := summarize(tensors[k])).max != k or got.zeros != (0 if k else 300_000):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernel
def test_elements_that_another_thread_writes_leave_finite_numbers() -> None:
    tensor, stop = torch.ones(200_000), threading.Event()

    def write() -> None:
        while not stop.is_set():
            tensor.fill_(NAN)
            tensor.fill_(1e30)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        rows = [summarize(tensor) for _ in range(200)]
    finally:
        stop.set()
        writer.join()
    for row in rows:
        assert all(value is None or math.isfinite(value) for value in row[4:9])
        assert row.nan + row.posinf + row.neginf <= 200_000


@needs_kernel
def test_no_memory_is_left_behind() -> None:
    tensor = torch.tensor([1.5, NAN, 0.0] * 10)
    place = compiled.place(tensor)
    weight = torch.nn.Parameter(torch.ones(30))
    others = [weight * 2, weight, tensor.view(3, 10).t(), tensor.to_sparse(), [1.0]]
    turned, numbers = torch.ones(5, 6).t(), Numbers()
    grads = (turned, turned, None, *others)
    names = sys.intern("float32"), sys.intern("cpu"), torch.float32
    gc.collect()  # what earlier tests left behind holds such words too
    counted = [sys.getrefcount(x) for x in (*names, *others)]

    def turns(n: int) -> None:
        for _ in range(n):
            for other in others:
                kernel.look(other, 300, 1)
            numbers.next_id = 300
            found, _, _ = kernel.look_all(Tensor, numbers, grads, grads, 1)
            kernel.name_all(Tensor, ("x", "y"), ("z",), (found[0], None, found[1]))
            kernel.measure(*place)
            kernel.measure_closely(*place, 64, 16)
            with pytest.raises(ValueError, match="sample"):
                kernel.measure_closely(*place, 0, 16)

    turns(5)
    gc.collect()
    tracemalloc.start()
    try:
        turns(5)
        before = tracemalloc.get_traced_memory()[0]
        turns(500)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 5000
    finally:
        tracemalloc.stop()
    now = [sys.getrefcount(x) for x in (*names, *others)]
    assert all(abs(a - b) < 50 for a, b in zip(now, counted, strict=True))


def test_header_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def written() -> str:
        records: list[object] = []
        with trace(out=records.append):
            pass
        assert isinstance(records[0], Header)
        return records[0].kernel

    assert written() == ("torch" if kernel is None else "compiled")
    monkeypatch.setattr(compiled, "kernel", None)
    assert written() == "torch"


def test_variable_forces_the_torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORTRACE_KERNEL", "torch")
    assert compiled._load() is None


@pytest.mark.parametrize("form", [None, 0])
def test_loops_in_c_that_were_built_from_other_sources_are_not_used(
    monkeypatch: pytest.MonkeyPatch, form: int | None
) -> None:
    stale = ModuleType("tensortrace.capture.compiled._turns")
    if form is not None:
        vars(stale)["FORM"] = form
    monkeypatch.setitem(sys.modules, stale.__name__, stale)
    monkeypatch.setattr(compiled, "_turns", stale, raising=False)
    assert compiled._load_turns() is None


def lean(tensor: torch.Tensor) -> Stats:
    queue = StatsQueue()
    queue.lean = True
    queue.add(tensor)
    return queue.resolve()[0]


@needs_kernel
def test_thinned_steps_measure_counts_and_norm_of_large_tensors() -> None:
    tensor = torch.randn(10_000).relu()
    full = oracle(tensor)
    assert lean(tensor) == Stats(zeros=full.zeros, norm=pytest.approx(full.norm, rel=1e-6))
    assert_same(lean(tensor[:8000]), oracle(tensor[:8000]))
    tensor[77] = NAN
    assert_same(lean(tensor), oracle(tensor))


def lean_row(tensor: torch.Tensor) -> Stats:
    return Stats(*kernel.measure_lean(*compiled.place(tensor)))  # type: ignore[misc]


@needs_kernel
@settings(deadline=None, max_examples=300)
@given(any_bits() | ordinary())
def test_lean_counts_are_exact_and_the_norm_has_six_digits(tensor: torch.Tensor) -> None:
    row, full = lean_row(tensor), oracle(tensor)
    assert (row[:4], row.first_bad) == (full[:4], full.first_bad)
    if full.norm is None:  # no finite element
        assert row.norm is None
    else:
        assert row.norm == pytest.approx(full.norm, rel=1e-6, abs=0)


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 127, 128, 129, 4095, 4096, 4097, 140_003])
def test_lean_leaves_no_element_out(dtype: torch.dtype, n: int) -> None:
    for at in {0, n // 2, n - 1}:
        tensor = torch.ones(n, dtype=dtype)
        tensor[at] = 0
        row = lean_row(tensor)
        assert (row.zeros, row.norm) == (1, pytest.approx(math.sqrt(n - 1)))


def taken_from(tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
    taken = kernel.sample(tensor, 4096, 64)
    values = torch.frombuffer(bytearray(taken[0]), dtype=tensor.dtype)
    assert taken[1:3] == (len(values), tensor.numel())
    return taken, values


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 4096, 4097, 12_289, 100_003, 1_000_000])
def test_sample_is_spread_over_the_parameter_and_within_its_bound(
    dtype: torch.dtype, n: int
) -> None:
    tensor = torch.zeros(n, dtype=dtype)
    tensor[-(n // 4) - 1 :] = 1  # the last quarter
    _, values = taken_from(tensor)
    assert (n if n <= 4096 else 1024) <= len(values) <= 4096
    assert values.double().mean().item() == pytest.approx(tensor.double().mean().item(), abs=0.06)


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 5, 4096, 50_001])
def test_moved_is_the_norm_of_the_change_of_the_sample(dtype: torch.dtype, n: int) -> None:
    before = torch.randn(n).to(dtype)
    after = (before.double() + 0.1 * torch.randn(n, dtype=torch.float64)).to(dtype)
    taken, was = taken_from(before)
    _, now = taken_from(after)
    change, weight = kernel.moved(after, 4096, 64, taken)
    assert weight == pytest.approx(was.double().norm().item(), rel=1e-6)
    assert change == pytest.approx((now.double() - was.double()).norm().item(), rel=1e-6)


@needs_kernel
def test_moved_says_what_is_not_finite_any_more() -> None:
    tensor = torch.ones(10)
    taken, _ = taken_from(tensor)
    tensor[3] = NAN
    assert math.isnan(kernel.moved(tensor, 4096, 64, taken)[0])
    tensor[3] = INF
    assert kernel.moved(tensor, 4096, 64, taken)[0] == INF


@needs_kernel
def test_a_sample_of_something_else_is_refused() -> None:
    tensor = torch.ones(100)
    with pytest.raises(ValueError, match="something else"):
        kernel.moved(tensor, 4096, 64, (b"1234", 1, 100, 0))
    for most, run in ((0, 64), (4096, 0), (-1, 1)):
        with pytest.raises(ValueError, match="nothing to sample"):
            kernel.sample(tensor, most, run)
    with pytest.raises(TypeError):
        kernel.sample(tensor)
    for taken in ((b"1234", 1, 100), (1234, 1, 100, 0), b"1234"):
        with pytest.raises(TypeError, match="moved"):
            kernel.moved(tensor, 4096, 64, taken)


@needs_kernel
def test_a_parameter_of_another_length_or_dtype_has_not_moved() -> None:
    taken, _ = taken_from(torch.ones(100))
    for other in (torch.ones(101), torch.ones(100).double(), torch.ones(100, device="meta")):
        assert kernel.moved(other, 4096, 64, taken) is None


@needs_kernel
@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_sample_of_dense_strides_in_any_order_is_of_the_memory_in_its_order(
    tensor: torch.Tensor,
) -> None:
    (values, *rest) = kernel.sample(tensor, 1 << 20, 64)
    memory = torch.frombuffer(bytearray(values), dtype=tensor.dtype).sort().values
    assert rest[:2] == [tensor.numel()] * 2
    assert torch.equal(memory, tensor.flatten().sort().values)


@needs_kernel
@pytest.mark.parametrize("tensor", ROWS.values(), ids=ROWS)
def test_no_sample_is_taken_where_there_are_gaps(tensor: torch.Tensor) -> None:
    assert kernel.sample(tensor, 4096, 64) is None


@needs_kernel
def test_head_is_what_a_measured_tensor_has() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    for tensor in (x, x * 2, torch.nn.Parameter(torch.ones(2)), torch.tensor(1.5).double()):
        (head, _) = kernel.look(tensor, 7, 0)
        assert kernel.head(tensor, 7) == head
    # Else the one who asks one thing at a time describes it.
    assert kernel.head(torch.ones(3, 4).t(), 7) is None
    with pytest.raises(TypeError, match="head"):
        kernel.head(x)


class Numbers:
    """What gives out ids."""

    def __init__(self, next_id: int = 0) -> None:
        self.next_id = next_id


X = torch.randn(6, 30)
GRADIENTS: list[tuple[list[torch.Tensor | None], list[torch.Tensor | None]]] = [
    ([torch.randn(3, 4)], [torch.randn(100, 7), None, torch.randn(70)]),
    ([], []),
    ([None], [None, None]),
    ([torch.randn(2, 9).t()], [torch.randn(20, 10)[:, :7], torch.zeros(3)[:0]]),
    ([torch.tensor([1.0, NAN])], [torch.tensor([[INF, 2.0], [3.0, 4.0]]).t(), torch.ones(2)]),
    ([torch.ones(2).to_sparse()], [torch.ones(3, dtype=torch.int64), torch.nn.Parameter(X)]),
    ([X], [X.t(), X.view(-1), X[:2], X.clone(), X.expand(2, *X.shape)]),
]


@needs_kernel
@pytest.mark.parametrize("mode", ["full", "closely", "lean"])
@pytest.mark.parametrize(("arrived", "made"), GRADIENTS, ids=range(len(GRADIENTS)))
def test_gradients_looked_at_together_are_what_each_is(
    arrived: list[torch.Tensor | None], made: list[torch.Tensor | None], mode: str
) -> None:
    together, singly = StatsQueue(), StatsQueue()
    for queue in (together, singly):
        queue.lean, queue.counts = mode == "lean", mode == "closely"
    table, other = TensorTable(together), TensorTable(singly)
    table.next_id = other.next_id = 5
    with torch._C.DisableTorchFunction():
        found = table.gradients(tuple(arrived), tuple(made))
        want = [
            other.gradient(grad, None)[1] if grad is not None else None
            for grad in (*arrived, *made)
        ]
    assert together.alarmed == singly.alarmed
    together.resolve()
    singly.resolve()
    assert [g.record() if isinstance(g, TensorDraft) else g for g in found] == [
        g and g.record() for g in want
    ]
    assert table.next_id == other.next_id == 5 + sum(g is not None for g in (*arrived, *made))


@needs_kernel
@pytest.mark.parametrize("level", ["minmax", "none"])
def test_few_statistics_are_asked_for_one_at_a_time(level: Any) -> None:
    table = TensorTable(StatsQueue(level))
    (found,) = table.gradients((torch.tensor([1.0, 2.0]),), ())
    assert isinstance(found, TensorDraft)
    assert found.stats()[7] is None


@needs_kernel
def test_memory_that_two_gradients_share_is_read_once() -> None:
    x = torch.randn(300, 1000)
    others = [x.t(), x.view(-1), x]
    (first, *rest), bad, left = kernel.look_all(Tensor, Numbers(), (x,), tuple(others), 1)
    assert not bad and not left
    assert all(tensor.exponents is first.exponents for tensor in rest)
    assert [tensor.stride for tensor in rest] == [(1, 1000), None, None]
    x[1, 2] = NAN
    (first, turned, *_), bad, left = kernel.look_all(Tensor, Numbers(), (x,), tuple(others), 1)
    assert first.first_bad == 1002 and bad
    assert turned == 1 and left, "where the first is, row by row, is asked of somebody else"


@needs_kernel
def test_gradients_are_named_by_their_place() -> None:
    a, b, c = (Tensor(i) for i in (3, 4, 5))
    named = kernel.name_all(Tensor, ("x", "y"), ("z", "v"), (a, None, b, c))
    assert named == ([("x", 3)], [("z", 4), ("v", 5)], [a, b, c])
    assert kernel.name_all(Tensor, (), (), ()) == ([], [], [])
    assert kernel.name_all(Tensor, ("x",), (), (7,)) is None
    many = tuple(Tensor(i) for i in range(100))
    assert kernel.name_all(Tensor, ("x",) * 100, (), many) is None
    assert kernel.look_all(Tensor, Numbers(), (torch.ones(1),) * 100, (), 0) is None


@needs_kernel
def test_records_of_op_level_are_nothing_to_the_garbage_collector() -> None:
    records: list[Any] = []
    model = torch.nn.LSTMCell(3, 3)
    with trace(out=records.append, level="op", checks=[]):
        model(torch.ones(2, 3))[0].sum().backward()
    calls = [record for record in records if isinstance(record, Call) and record.op]
    assert {call.phase for call in calls} == {"forward", "backward"}
    held = [[call, call.inputs, call.outputs, call.tensors] for call in calls]
    assert held and not any(map(gc.is_tracked, itertools.chain(*held)))
    with pytest.raises(TypeError, match="list or a dict"):
        kernel.untracked(object())


@needs_kernel
def test_nonsense_about_gradients_is_refused() -> None:
    x = torch.ones(1)
    for wrong in ((Tensor, Numbers(), (x,), (), 3), (Tensor, Numbers(), [x], (), 0), (Tensor,)):
        with pytest.raises(TypeError, match="look_all"):
            kernel.look_all(*wrong)
    with pytest.raises(AttributeError):
        kernel.look_all(Tensor, object(), (x,), (), 0)
    for wrong in ((Tensor, ("x",), (), ()), (Tensor, ["x"], (), (1,)), ()):
        with pytest.raises(TypeError, match="name_all"):
            kernel.name_all(*wrong)
