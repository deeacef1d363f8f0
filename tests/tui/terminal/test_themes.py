"""The themes: readable, chosen from the palette, remembered."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from rich.color import Color
from textual.command import CommandPalette

from tensortrace.tui import places
from tensortrace.tui.app import Viewer
from tensortrace.tui.terminal.looks import COLOURS, DARK, HEAT, LOOKS, look_of
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, text_of, until


def luminance(colour: Color | str) -> float:
    """Relative luminance, 0 to 1, as WCAG 2.2 defines it."""
    red, green, blue = (Color.parse(colour) if isinstance(colour, str) else colour).triplet
    linear = [
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Color | str, other: Color | str) -> float:
    """The contrast of two colours, 1 to 21, as WCAG 2.2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", LOOKS)
def test_every_text_can_be_read_on_every_ground_that_it_stands_on(name: str) -> None:
    colours, look = COLOURS[name], LOOKS[name]
    least = {"contrast": 7.0}.get(name, 4.5)  # WCAG 2.2: AAA, AA
    weak = []
    for style, held in look.styles.items():
        if style in HEAT:
            continue
        grounds = [held.bgcolor] if held.bgcolor else [
            colours.background, look.cursor.bgcolor, look.blurred.bgcolor
        ]  # fmt: skip
        weak += [
            (style, ground, round(ratio, 2))
            for ground in grounds
            if (ratio := contrast(held.color or colours.text, ground)) < least
        ]
    assert not weak


@pytest.mark.parametrize("name", LOOKS)
def test_colours_of_the_map_lead_away_from_the_ground_step_by_step(name: str) -> None:
    seen = [contrast(colour, COLOURS[name].background) for colour in COLOURS[name].heat]
    assert all(low < high for low, high in itertools.pairwise(seen))
    assert seen[0] > 1.5


def test_each_theme_has_every_style_and_another_one_is_drawn_in_the_dark() -> None:
    assert all(look.styles.keys() == DARK.styles.keys() for look in LOOKS.values())
    assert next(iter(LOOKS.values())) is DARK is look_of("textual-light")


async def test_a_theme_is_chosen_in_the_palette_and_remembered(tmp_path: Path) -> None:
    run, memory = make_open_run(tmp_path), tmp_path / "state" / "places"
    app = Viewer(run, memory=memory)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(app, pilot)
        words = text_of(app)
        await pilot.press("ctrl+p")
        await until(pilot, lambda: isinstance(app.screen, CommandPalette))
        await pilot.press(*"theme light")
        await until(pilot, lambda: "Theme: light" in text_of(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.theme == "tensortrace-light")
        await settle(app, pilot)
        await until(pilot, lambda: text_of(app) == words)
        grounds = {piece.style.bgcolor for line in app.screen._compositor.render_strips()
                   for piece in line if piece.style and piece.style.bgcolor}  # fmt: skip
        assert all(luminance(ground) > 0.5 for ground in grounds)
    again = Viewer(run, memory=memory)
    async with again.run_test(size=(80, 24)) as pilot:
        await settle(again, pilot)
        assert again.theme == "tensortrace-light"
        assert not again.has_class("-dark-mode")
        assert again.screen.styles.background.rich_color == Color.parse(COLOURS["light"].background)


@pytest.mark.parametrize("content", [b"", b"nope", b"\xff\x00", b"light\x1b]0;x", b"x" * 9000])
async def test_a_damaged_memory_of_the_theme_is_none(tmp_path: Path, content: bytes) -> None:
    run, memory = make_open_run(tmp_path), tmp_path / "places"
    memory.mkdir()
    (memory / places.THEME).write_bytes(content)
    assert Viewer(run, memory=memory).theme == DARK.theme.name


def test_a_folder_that_cannot_be_written_keeps_no_theme(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places.keep_theme("light", tmp_path / "file" / "places")
    assert places.recall_theme(tmp_path / "file" / "places") == ""
