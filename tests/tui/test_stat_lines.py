"""The statistics of tensors in a table, or in lines where columns would touch."""

from __future__ import annotations

import pytest

from tensortrace.tui.step.detail import stat_lines
from tests.builders import make_tensor


@pytest.mark.parametrize("width", [60, 106, 200])
@pytest.mark.parametrize("number", [0.5, -0.00503, -1.9e-10, -1.234e100])
def test_no_two_numbers_touch(number: float, width: int) -> None:
    fields = dict.fromkeys(("min", "max", "mean", "std", "norm"), number)
    lines = stat_lines([("output[0]", make_tensor(0, 32, 64, zeros=1015, **fields))], width)
    words = " ".join("".join(text for text, _ in line) for line in lines).replace("/", " ").split()
    shown = {0.5: "0.5", -0.00503: "-0.00503", -1.9e-10: "-1.9e-10", -1.234e100: "-1.2e+100"}
    assert words.count(shown[number]) == 5
    assert "1015" in words


@pytest.mark.parametrize("width", [60, 200])
def test_only_a_count_that_is_not_zero_has_the_colour_of_an_error(width: int) -> None:
    lines = stat_lines([("output[0]", make_tensor(0, 32, 64, nan=7))], width)
    styles = {text.strip(): style for line in lines for text, style in line}
    counts = ("nan 7", "inf 0") if width == 60 else ("7", "0")
    assert [styles[count] for count in counts] == ["error", ""]


@pytest.mark.parametrize("width", [60, 200])
def test_what_nobody_measured_has_no_counts(width: int) -> None:
    none = dict.fromkeys(("min", "max", "mean", "std", "norm"))
    lines = stat_lines([("value", make_tensor(0, 32, 64, unmeasured="not asked", **none))], width)
    pieces = [(text.strip(), style) for line in lines for text, style in line]
    told = " ".join(text for text, _ in pieces)
    assert "unmeasured: not asked" in told
    assert not {"0", "nan 0", "inf 0", "zero 0"} & {text for text, _ in pieces}
    assert "error" not in {style for _, style in pieces}
