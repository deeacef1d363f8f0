"""The bars of magnitudes, without a screen and on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len

from tensortrace.records import Tensor
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.step.distribution import distribution_lines
from tensortrace.tui.terminal.styled import ASCII, UNICODE
from tests.builders import make_call, make_tensor, write_log
from tests.tui.screen import settle, text_of
from tests.tui.step.test_rows import text


def ranges(**counts: int) -> tuple[int, ...]:
    """`ranges(r9=5)`: five elements from 1 up to 16."""
    return tuple(counts.get(f"r{i}", 0) for i in range(16))


def tensor(counts: tuple[int, ...] | None, **changes: object) -> Tensor:
    return make_tensor(1, 8, 8, exponents=counts, **changes)


NORMAL = ranges(r5=1, r6=40, r7=400, r8=2000, r9=800)


def test_bars_stand_over_the_magnitudes_of_their_elements() -> None:
    drawn, scale = text(distribution_lines([("output", tensor(NORMAL))], 80)).splitlines()
    assert drawn == "  output      ··········▁▁▁▁▂▂██▄▄············  62% 0.0625 to 1"
    assert scale == "  magnitudes    2.3e-10 1.5e-05 1       6.6e+04"
    # The bar of what is 1 and more stands over the 1.
    assert drawn[scale.index("1  ")] == "▄"


def test_each_tensor_has_its_row_over_one_scale() -> None:
    lines = distribution_lines(
        [("a", tensor(NORMAL)), ("b", tensor(None)), ("c", tensor(ranges(r0=1)))], 80
    )
    assert [text(line).split()[0] for line in lines] == ["a", "c", "magnitudes"]
    assert "100% below 2.3e-10" in text(lines[1])
    assert "100% from 1.7e+07" in text(distribution_lines([("", tensor(ranges(r15=3)))], 80))


def test_nothing_is_drawn_where_nothing_was_counted() -> None:
    assert distribution_lines([], 80) == []
    assert distribution_lines([("zeros", tensor(ranges()))], 80) == []


def test_ranges_that_float16_has_no_numbers_in_stay_empty() -> None:
    counts = ranges(r8=5)
    half, wide = (
        text(distribution_lines([("x", tensor(counts, dtype=dtype))], 80)).splitlines()[0][14:46]
        for dtype in ("float16", "float32")
    )
    assert half == " " * 6 + "·" * 10 + "██" + "·" * 8 + " " * 6
    assert wide == "·" * 16 + "██" + "·" * 14


def test_ascii_has_the_same_bars_in_its_own_signs() -> None:
    drawn = text(distribution_lines([("output", tensor(NORMAL))], 80, ASCII))
    assert drawn.isascii()
    assert "____..##--" in drawn


@pytest.mark.parametrize("width", [0, 1, 5, 20, 35, 40, 60, 80, 200])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII], ids=["unicode", "ascii"])
def test_lines_keep_to_the_width(width: int, glyphs: object) -> None:
    many = [("漢字" * 30, tensor(NORMAL)), ("x", tensor(ranges(r9=1)))]
    for line in distribution_lines(many, width, glyphs):  # type: ignore[arg-type]
        assert cell_len(text(line)) <= max(width, 21)


@pytest.mark.parametrize(
    "counts", [(), (1,), (1,) * 15, (1,) * 17, (0,) * 16, (-5,) * 16, (-1, *[3] * 15), (1,) * 9999]
)
def test_counts_that_are_none_are_not_drawn(counts: tuple[int, ...]) -> None:
    assert distribution_lines([("x", tensor(counts))], 80) == []


def test_counts_of_any_number_of_digits_are_drawn() -> None:
    lines = distribution_lines([("x", tensor(ranges(r1=10**400, r2=1)))], 80)
    assert "▁" in text(lines)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 12)])
async def test_detail_of_a_call_shows_it(tmp_path: Path, size: tuple[int, int]) -> None:
    call = make_call(
        1, "fc", inputs=[("input", 2)], outputs=[("output", 1)],
        tensors=[tensor(NORMAL), make_tensor(2, 8, exponents=(1, 2))],
    )  # fmt: skip
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [call])))
    async with app.run_test(size=size) as pilot:
        await settle(app, pilot)
        await pilot.press("down")
        await settle(app, pilot)
        shown = text_of(app)
        if size[1] > 20:
            assert "██▄▄" in shown
            assert "magnitudes" in shown
