"""Lines that cost little look as Textual's do, and go without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from textual.color import Color
from textual.containers import Container
from textual.filter import ANSIToTruecolor, LineFilter, Monochrome
from textual.scrollbar import ScrollBar
from textual.strip import Strip
from textual.visual import RenderOptions, RichVisual
from textual.widget import Widget

from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.kept import Kept
from tensortrace.tui.panes import Pane
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.strips import Bar, Ground, Line, LineCache, filled
from tensortrace.tui.terminal.styled import ASCII
from tests.tui.samples import make_log, make_open_run
from tests.tui.screen import settle, text_of, until

RED, BLUE = Style(color="#ff0000"), Style(color="blue", bold=True)
PIECES = [Segment("a wide ", RED), Segment("日本", BLUE), Segment(" text", RED)]
BLACK = Color(0, 0, 0)


@pytest.mark.parametrize("cuts", [[16], [4, 16], [0, 8, 16], [3, 9, 30], [], [99]])
def test_a_line_is_cut_as_a_strip_is(cuts: list[int]) -> None:
    line, strip = Line(PIECES), Strip(PIECES)
    for _ in range(2):  # the second time from what it kept
        assert [list(part) for part in line.divide(cuts)] == [
            list(part) for part in strip.divide(cuts)
        ]
    assert [part.cell_length for part in line.divide(cuts)] == [
        part.cell_length for part in strip.divide(cuts)
    ]


def test_a_line_that_is_cut_again_elsewhere_forgets_the_first_cuts() -> None:
    line = Line(PIECES)
    first = line.divide([4, 16])
    assert line.divide([4, 16]) is first
    assert [part.text for part in line.divide([2, 16])] == ["a ", "wide 日本 text"]


@pytest.mark.parametrize("filter", [ANSIToTruecolor(DEFAULT_TERMINAL_THEME), Monochrome()])
def test_a_line_is_filtered_as_a_strip_is(filter: LineFilter) -> None:
    line, strip = Line(PIECES), Strip(PIECES)
    for ground in (BLACK, BLACK, Color(9, 9, 9)):
        assert list(line.apply_filter(filter, ground)) == list(strip.apply_filter(filter, ground))
    assert line.apply_filter(filter, BLACK) is line.apply_filter(filter, BLACK)


def test_a_line_does_all_else_that_a_strip_does() -> None:
    line, strip = Line(PIECES), Strip(PIECES)
    for name in Strip.__slots__:
        assert type(getattr(line, name)) is type(getattr(strip, name))
    assert line == strip
    assert line.crop(2, 9) == strip.crop(2, 9)
    assert line.apply_style(BLUE) == strip.apply_style(BLUE)
    with pytest.raises(AttributeError):
        getattr(line, "no_such_thing")  # noqa: B009 - a name that it has not


@pytest.mark.parametrize("width", [0, 3, 8, 16, 20])
def test_a_line_is_filled_or_cut_to_a_width(width: int) -> None:
    line = filled(PIECES, width, BLUE)
    assert line == Strip(PIECES).crop_extend(0, width, BLUE)
    assert line.cell_length == width


def count(kind: type) -> int:
    """How many objects of a kind there are."""
    return sum(type(one) is kind for one in gc.get_objects())


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "use",
    [
        lambda line: line.divide([line.cell_length]),
        lambda line: line.divide([1, line.cell_length]),
        lambda line: line.apply_filter(ANSIToTruecolor(DEFAULT_TERMINAL_THEME), BLACK),
        lambda line: line.apply_filter(Monochrome(), BLACK),
        lambda line: filled(line, line.cell_length, BLUE),
    ],
)
def test_a_line_goes_without_the_garbage_collector(use: Callable[[Line], object]) -> None:
    before, line = count(Line), Line(PIECES)
    use(line)
    assert count(Line) > before
    del line
    assert count(Line) == before


@pytest.mark.usefixtures("no_collector")
def test_the_rows_of_a_step_go_without_the_garbage_collector(tmp_path: Path) -> None:
    run = open_run(make_log(tmp_path))
    before, rows = count(Row), StepRows(run.step(1))
    held = len(rows[:])
    assert count(Row) >= before + held > before
    del rows
    assert count(Row) == before
    run.close()


def test_of_what_is_kept_the_eldest_is_given_up_first() -> None:
    kept: Kept[str, int] = Kept(2)
    kept["a"], kept["b"], kept["a"] = 1, 2, 3
    assert kept == {"a": 3, "b": 2}
    kept["c"] = 4
    assert kept == {"b": 2, "c": 4}


# ---- on the screen


def cells(strip: Strip) -> list[tuple[str, object]]:
    """Each letter with its style; of a space what is seen of one."""
    return [
        (letter, style and style.bgcolor if letter == " " else style)
        for text, style, _ in strip
        for letter in text
    ]


@pytest.mark.parametrize("no_color", ["", "1"])
async def test_a_ground_looks_as_any_container_and_draws_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_color: str
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        for key in ("1", "7"):
            await pilot.press(key)
            await settle(app, pilot)
            grounds = [one for one in app.screen.walk_children(with_self=True)
                       if isinstance(one, Ground) and one.size]  # fmt: skip
            assert len(grounds) >= 2
            for ground in grounds:
                crop = ground.size.region
                lines = ground.render_lines(crop)
                assert len({id(line) for line in lines}) == 1
                drawn = Widget.render_lines(ground, crop)
                assert [*map(cells, lines)] == [*map(cells, drawn)]


async def test_every_container_of_the_viewer_is_a_ground(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        for key in "234567":
            await pilot.press(key)
            await settle(app, pilot)
        within = app.screen_stack[0].walk_children(with_self=True)
        containers = [one for one in within if isinstance(one, Container) or one.id == "main"]
        assert len(containers) > 6
        assert all(isinstance(one, Ground) for one in containers)
        assert isinstance(app.screen_stack[0], Ground)


@pytest.mark.parametrize("state", ["rest", "over", "grabbed", "short"])
async def test_a_scrollbar_looks_as_textual_draws_it(tmp_path: Path, state: str) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 24)) as pilot:
        await settle(app, pilot)
        pane = app.pane("calls")
        await until(pilot, lambda: pane.show_vertical_scrollbar)
        bar = pane.vertical_scrollbar
        assert isinstance(bar, Bar)
        assert bar is pane.vertical_scrollbar
        bar.mouse_over = state == "over"
        bar.set_reactive(ScrollBar.grabbed, bar.region.offset if state == "grabbed" else None)
        if state == "short":
            bar.window_virtual_size = bar.window_size
        style = bar.visual_style
        options = RenderOptions(bar._get_style, bar.styles, None, None)
        width, height = bar.size
        made = bar.render()
        drawn = RichVisual(bar, ScrollBar.render(bar))
        mine, theirs = (
            one.render_strips(width, height, style, options)  # type: ignore[union-attr]
            for one in (made, drawn)
        )
        assert len(mine) == height > 3
        assert [list(line) for line in mine] == [list(line) for line in theirs]
        # What a click on it does stands in the style.
        assert [one.style.meta for (one,) in mine] == [one.style.meta for (one,) in theirs]
        bar.set_reactive(ScrollBar.grabbed, None)


async def test_what_draws_its_lines_itself_keeps_lines(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 24)) as pilot:
        await settle(app, pilot)
        for name in ("#headline", "#tabs", "#timeline", "#keys", "#calls"):
            widget = app.query_one(name)
            assert isinstance(widget._styles_cache, LineCache)
            lines = widget.render_lines(widget.outer_size.region)
            assert lines
            assert all(type(line) is Line for line in lines)
        assert isinstance(app.query_one("#calls", Pane).vertical_scrollbar._styles_cache, LineCache)


@pytest.mark.parametrize("keys", [[], ["s"], ["3"], ["4"], ["5"], ["7"], ["question_mark"]])
async def test_a_terminal_without_other_signs_gets_none(tmp_path: Path, keys: list[str]) -> None:
    app = Viewer(make_open_run(tmp_path), glyphs=ASCII)
    async with app.run_test(size=(80, 18)) as pilot:
        await settle(app, pilot)
        await pilot.press(*keys)
        await settle(app, pilot)
        text = text_of(app).replace("µs", "us")
        assert text.isascii(), [letter for letter in text if not letter.isascii()]
    if not keys:
        assert any(line.endswith("#|") for line in text.splitlines())
