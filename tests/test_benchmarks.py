"""The benchmark's own parts: workloads that train, medians, the table in the README."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from xml.etree import ElementTree

import pytest
import torch

from tensortrace.capture import compiled
from tests.benchmarks import __main__ as command
from tests.benchmarks import gpu, table
from tests.benchmarks.curve import Point, draw
from tests.benchmarks.kernel import kernel_table
from tests.benchmarks.measure import Cell, compare, tracing, without_exponents
from tests.benchmarks.workloads import build, build_gpt2, build_mlp

CELL = Cell("mlp", "`trace(every=1)`", [1.5, 1.1, 1.2, 1.4, 1.3], base_ms=20.0, bytes_per_step=5e3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmark runs: two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_cell_says_median_and_quartiles_of_its_pairs() -> None:
    assert CELL.median == 1.3
    assert CELL.quartiles == (1.2, 1.4)
    assert CELL.as_json()["quartiles"] == (1.2, 1.4)


def test_two_workloads_of_one_name_start_equal() -> None:
    one, other = build("lstm"), build("lstm")
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_traced_pairs_are_timed_and_their_bytes_counted() -> None:
    cell = compare(partial(build, "lstm"), "traced", tracing(every=1), pairs=1)
    assert len(cell.ratios) == 1
    assert cell.bytes_per_step > 1000


@pytest.mark.skipif(compiled.kernel is None, reason="of f32 they are counted by the kernel only")
def test_exponents_are_left_out_where_their_cost_is_measured() -> None:
    with without_exponents(tracing(every=1))(build("lstm")) as turn:
        turn.run()
        without = turn.nbytes()
    with tracing(every=1)(build("lstm")) as turn:
        turn.run()
        assert turn.nbytes() > 1.05 * without


def test_thinned_steps_are_those_of_a_long_run() -> None:
    with tracing(every="auto", after=1001)(build("lstm")) as turn:
        turn.run()
        before = turn.nbytes()
        turn.run()
        assert 0 < turn.nbytes() - before < 5000


def test_table_has_a_row_for_each_way_and_what_is_no_ratio() -> None:
    extra = {
        "peak_mib": {"mlp": (300.0, 307.0)},
        "check_ms": {"mlp": {"TT101": 0.1, "engine": 0.1}},
    }
    other = Cell("mlp", "`trace(every=1)` without it", [1.1], base_ms=70.0, bytes_per_step=7e3)
    lines = table.render([CELL, other], extra).splitlines()
    assert lines[0] == "| step time traced / untraced | MLP |"
    assert "| `trace(every=1)` | **1.30** 1.20-1.40 |" in lines
    assert "| log, kB a step, `every=1` | 5 |" in lines
    assert "| peak memory, MiB more | 7 (of 300) |" in lines
    assert "| all checks, share of the step | 1.0% |" in lines


def test_table_replaces_an_older_one_and_nothing_else() -> None:
    text = f"before\n{table.BEGIN}\n\nold\n{table.END}\nafter\n"
    once = table.replace_between_markers(text, "new\n")
    assert once == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.replace_between_markers(once, "new\n") == once
    with pytest.raises(ValueError, match="needs one line"):
        table.replace_between_markers("no markers", "new\n")


def test_both_kernels_are_timed_beside_a_plain_read() -> None:
    head, *rows = kernel_table((1, 300)).splitlines()
    assert head.split()[2:5] == ["compiled", "torch", "read"]
    assert [row.split()[0] for row in rows] == ["float32", "float64", "float16", "bfloat16"] * 2
    assert rows[0].endswith(" us")
    assert all(float(cell) >= 0 for row in rows for cell in row.split()[2:7])


def test_larger_sizes_of_a_family_have_the_same_modules() -> None:
    for build_one, small, large in (
        (build_mlp, (64,), (128,)),
        (build_gpt2, (32, 1, 16), (64, 1, 8)),
    ):
        names = [[n for n, _ in build_one(*size).model.named_modules()] for size in (small, large)]
        assert names[0] == names[1]


def test_the_curve_is_higher_where_more_is_added() -> None:
    points = [Point("a <b>", "every=1", 1.0, 1.5), Point("a <b>", "every=1", 100.0, 1.1),
              Point("a <b>", "auto", 1.0, 1.0)]  # fmt: skip
    svg = ElementTree.fromstring(draw(points, "of this test"))
    inside = "{http://www.w3.org/2000/svg}"
    ends = [line.attrib["points"] for line in svg.iter(f"{inside}polyline")]
    (x1, y1), (x2, y2) = (tuple(map(float, end.split(","))) for end in ends[0].split())
    assert x1 < x2
    assert y1 < y2  # downwards
    lowest = max(float(line.attrib["y2"]) for line in svg.iter(f"{inside}line"))
    assert float(ends[1].split(",")[1]) == lowest
    assert any(text.text == "every=1: a <b>" for text in svg.iter(f"{inside}text"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tests.benchmarks", "--gpu"])
    assert command.main() == 2
    assert capsys.readouterr().err == f"{gpu.NO_GPU}\n"


def test_the_benchmark_of_a_gpu_runs_on_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_STEPS", {"lstm": 1})
    monkeypatch.setattr(gpu, "_COUNTS", (10,))
    ways = ("`trace(every=1)`", "`trace(every=1)` without Triton")
    monkeypatch.setattr(gpu, "WAYS", {way: gpu.WAYS[way] for way in ways})
    gpu.print_gpu(["lstm"], 1, device="cpu")
    out = capsys.readouterr().out
    assert out.count("trace(every=1)") == 4
    assert "0 / 0" in out  # the CPU launches nothing, and waits for nothing
    assert "bfloat16" in out


def test_launches_and_waits_are_told_apart_by_their_names() -> None:
    names = ["aten::add", "cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync",
             "cudaStreamSynchronize", "cudaLaunchKernel"]  # fmt: skip
    assert gpu.counted(names) == (3, 1)
