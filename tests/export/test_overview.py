"""A run of any length in bounded columns: nothing extreme is lost, nothing grows with the run."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tensortrace.export import overview
from tensortrace.export.overview import Columns, look_over
from tensortrace.records import ModuleColumns, Record, Scalar, Step
from tensortrace.run import Run, open_run
from tests.builders import make_run
from tests.export.canonical import make_finding, write_log


def make(tmp_path: Path, *records: Record) -> Run:
    return open_run(write_log(tmp_path / "log.jsonl", make_run(records)))


def step(number: int, loss: Scalar | None = None, **table: list[float | None]) -> Step:
    paths = [f"m{i}" for i in range(max(map(len, table.values()), default=0))]
    return Step(step=number, seq=1, loss=loss, modules=ModuleColumns(path=paths, **table))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "most", "width", "count"),
    [(range(1), 400, 1, 1), (range(400), 400, 1, 400), (range(401), 400, 2, 201),
     (range(10, 17), 3, 3, 3), (range(2**53, 2**53 + 5), 2, 3, 2),
     (range(10**15), 400, 25 * 10**11, 400)],
)  # fmt: skip
def test_steps_are_divided_into_columns_of_equal_width(
    steps: range, most: int, width: int, count: int
) -> None:
    columns = Columns.over(steps, most)
    assert (columns.width, columns.count) == (width, count)
    spans = [columns.span(i) for i in (0, count - 1)]
    assert (spans[0][0], spans[-1][1]) == (steps[0], steps[-1])
    for number in (steps[0], steps[len(steps) // 2], steps[-1]):
        first, last = columns.span(columns.of(number))
        assert first <= number <= last
        assert 0 < columns.share(number) <= 1


def test_a_curve_keeps_the_smallest_largest_and_last_value_of_each_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "CURVE_COLUMNS", 2)
    losses: list[Scalar | None] = [3.0, 9.0, 1.0, 4.0, "NaN", None, "Infinity"]
    run = make(tmp_path, *(step(i, loss) for i, loss in enumerate(losses)))
    curve = look_over(run, run.steps).loss
    assert (curve.low[0], curve.high[0], curve.last[0]) == (1.0, 9.0, 4.0)
    assert math.isnan(curve.low[1])
    assert curve.broken.tolist() == [0, 2]
    assert curve.first_broken == 4
    assert not curve.empty
    assert look_over(run, run.steps).grad_norm.empty


def test_a_map_keeps_the_largest_of_a_column_and_whether_any_was_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MAP_COLUMNS", 2)
    spike = step(1, grad_rms=[5.0, None])
    bad = Step(step=3, seq=1, modules=ModuleColumns(path=["m1"], grad_rms=[None], flags=["i"]))
    run = make(tmp_path, step(0, grad_rms=[1.0, None]), spike, step(2, grad_rms=[2.0, 7.0]), bad)
    maps = look_over(run, run.steps).maps
    assert maps.paths == ["m0", "m1"]
    expected = np.array([[5.0, 2.0], [np.nan, 7.0]])
    np.testing.assert_array_equal(maps.values["grad_rms"], expected)
    assert all(b.tolist() == [[False, False], [False, True]] for b in maps.broken.values())


def test_a_column_of_steps_at_rest_has_the_numbers_before_it(tmp_path: Path) -> None:
    seen, quiet = step(0, output_rms=[1.0, 4.0]), step(1, output_rms=[2.0, None])
    rests = msgspec.structs.replace(quiet, rested=True)
    maps = look_over(run := make(tmp_path, seen, rests), run.steps).maps
    assert maps.values["output_rms"].tolist() == [[1.0, 2.0], [4.0, 4.0]]
    assert maps.rested
    maps = look_over(run := make(tmp_path, seen, quiet), run.steps).maps
    np.testing.assert_array_equal(maps.values["output_rms"], [[1.0, 2.0], [4.0, np.nan]])
    assert not maps.rested


def test_a_map_tells_outputs_that_are_not_finite_from_gradients(tmp_path: Path) -> None:
    paths = ["grads", "outputs", "both", "unsaid"]
    columns = ModuleColumns(path=paths, grad_rms=[1.0] * 4, output_rms=[1.0] * 4,
                            flags=["ng", "io", "ogni", "nf"])  # fmt: skip
    run = make(tmp_path, Step(step=0, seq=1, modules=columns))
    broken = look_over(run, run.steps).maps.broken
    assert broken["grad_rms"][:, 0].tolist() == [True, False, True, True]
    assert broken["output_rms"][:, 0].tolist() == [False, True, True, True]
    assert broken["update_ratio"].all()


def test_modules_beyond_the_room_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MOST_MODULES", 70)
    run = make(tmp_path, *(step(i, grad_rms=[1.0] * 100) for i in range(3)))
    maps = look_over(run, run.steps).maps
    assert (len(maps.paths), maps.left_out) == (70, 30)
    assert maps.values["grad_rms"].shape == (70, 3)
    assert not np.isnan(maps.values["grad_rms"]).any()


def test_only_some_steps_and_modules_are_looked_at_and_each_is_told(tmp_path: Path) -> None:
    run = make(
        tmp_path, *(step(i, float(i), grad_rms=[1.0] * 3) for i in range(9)), make_finding(step=8)
    )
    ticked: list[int] = []
    seen = look_over(run, range(2, 5), ["m1"], ticked.append)
    assert ticked == [2, 3, 4]
    assert (seen.closed, seen.maps.paths) == (3, ["m1"])
    assert seen.loss.last.tolist() == [2.0, 3.0, 4.0]
