"""Threads that read give way to keys; the slow part of a view is made before it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensortrace.tui import ahead, background
from tensortrace.tui.app import Viewer
from tensortrace.tui.footer import Keys
from tensortrace.tui.tabs import TABS
from tensortrace.tui.terminal import quick
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, text_of, until


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(quick, "time", clock)
    return clock


def test_a_thread_stands_still_while_a_key_is_answered(clock: Clock) -> None:
    turns = quick.Turns()
    turns.asked()
    turns.breathe()
    assert quick.ANSWERED_S <= clock.slept < quick.ANSWERED_S + 2 * quick.LOOK_EVERY_S


def test_a_thread_goes_on_where_nothing_was_asked(clock: Clock) -> None:
    turns = quick.Turns()
    clock.sleep(1.0)
    clock.slept = 0.0
    turns.breathe()
    assert clock.slept == quick.BREATHE_S


def test_a_key_that_is_held_down_does_not_stop_a_thread_for_ever(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = quick.Turns()
    sleep = clock.sleep

    def sleep_and_ask(seconds: float) -> None:
        sleep(seconds)
        turns.asked()

    monkeypatch.setattr(clock, "sleep", sleep_and_ask)
    turns.breathe()
    assert quick.LONGEST_S <= clock.slept < quick.LONGEST_S + 2 * quick.LOOK_EVERY_S


def test_stillness_begins_some_time_after_the_last_key(clock: Clock) -> None:
    turns = quick.Turns()
    assert not turns.still
    clock.sleep(quick.STILL_S + 0.1)
    assert turns.still
    turns.asked()
    assert not turns.still


class Garbage:
    """A collector that notes what it was asked for."""

    def __init__(self, young: int) -> None:
        self.young, self.asked = young, list[int]()

    def get_count(self) -> tuple[int, int, int]:
        return self.young, 0, 0

    def collect(self, generation: int) -> None:
        self.asked.append(generation)


@pytest.mark.parametrize(
    ("rested_s", "young", "asked"),
    [
        (quick.TIDY_AFTER_S + 0.01, quick.WORTH, [0]),
        (quick.TIDY_AFTER_S - 0.01, quick.WORTH, []),
        (quick.TIDY_AFTER_S + 0.01, quick.WORTH - 1, []),
    ],
)
def test_garbage_is_collected_between_keys_where_it_is_worth_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, rested_s: float, young: int, asked: list[int]
) -> None:
    garbage = Garbage(young)
    monkeypatch.setattr(quick, "gc", garbage)
    turns = quick.Turns()
    turns.asked()
    clock.sleep(rested_s)
    turns.tidy()
    assert garbage.asked == asked


def test_all_garbage_is_collected_only_when_nobody_is_there(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = Garbage(quick.WORTH)
    monkeypatch.setattr(quick, "gc", garbage)
    turns = quick.Turns()
    clock.sleep(1.0)
    for _ in range(quick.ALL_EVERY + 1):
        turns.tidy()
    assert garbage.asked == [0, 0, 1] * 7
    clock.sleep(quick.TIDY_ALL_AFTER_S)
    turns.tidy()
    turns.tidy()
    assert garbage.asked[quick.ALL_EVERY + 1 :] == [2, 0]


class Ticks:
    """A timer that notes whether it runs."""

    runs = True

    def pause(self) -> None:
        self.runs = False

    def resume(self) -> None:
        self.runs = True


def test_nobody_looks_for_garbage_where_nothing_happens(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage, ticks = Garbage(0), Ticks()
    monkeypatch.setattr(quick, "gc", garbage)
    turns = quick.Turns()
    turns.tidying = ticks  # type: ignore[assignment]
    turns.tidy()
    assert ticks.runs
    clock.sleep(quick.TIDY_ALL_AFTER_S + 0.1)
    garbage.young = quick.WORTH
    turns.tidy()
    assert ticks.runs
    garbage.young = 0
    turns.tidy()
    assert not ticks.runs
    turns.changed()
    assert ticks.runs
    turns.tidy()
    assert not ticks.runs
    turns.asked()
    assert ticks.runs


async def test_a_quiet_log_is_looked_at_once_a_second_and_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        waits: list[float] = []
        drawn: list[bool] = []
        draw_top = app.draw_top
        monkeypatch.setattr(app, "set_timer", lambda wait, _: waits.append(wait))
        monkeypatch.setattr(app, "draw_top", lambda: (drawn.append(True), draw_top()))
        app.reader.keep_looking()
        app.reader.changed_at -= background.IDLE_AFTER_S + 1
        app.reader.keep_looking()
        assert waits == [background.POLL_S, background.IDLE_POLL_S]
        assert not drawn
        # The writer was killed, and the file is as it was.
        monkeypatch.setattr(type(app.log_), "killed", True)
        monkeypatch.setattr(type(app.log_), "end", None)
        monkeypatch.setattr(type(app.log_), "live", False)
        for _ in range(3):
            app.reader.keep_looking()
        assert len(drawn) == 1
        await until(pilot, lambda: "killed" in text_of(app))


async def test_what_is_there_once_all_views_are_made_is_no_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(ahead, "keep_what_is_there", lambda: kept.append(True))
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        app.ahead.timer.stop()
        app.turns.asked_at -= quick.STILL_S
        for name in TABS[1:]:
            assert not kept
            app.ahead.make()
            await until(pilot, lambda name=name: app.query(f"#view-{name}"))
            await settle(app, pilot)
        app.ahead.make()
        assert kept == [True]


async def test_views_are_made_ahead_and_look_no_different(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        before = text_of(app)
        app.turns.asked_at -= quick.STILL_S
        for name in TABS[1:]:
            app.ahead.make()
            await until(pilot, lambda name=name: app.query(f"#view-{name}"))
            await settle(app, pilot)
        app.ahead.make()
        assert (app.shown, text_of(app)) == ("step", before)
        assert app.focused is app.pane("calls")
        await pilot.press("7")
        await settle(app, pilot)
        assert "[7 Findings]" in text_of(app)


async def test_no_view_is_made_while_keys_are_pressed(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        app.turns.asked()
        app.ahead.make()
        await settle(app, pilot)
        assert not app.query(".view")


@pytest.mark.parametrize("width", [120, 40])
async def test_a_click_on_the_line_of_keys_presses_the_key(tmp_path: Path, width: int) -> None:
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(width, 24)) as pilot:
        await settle(app, pilot)
        line = text_of(app).splitlines()[-1]
        assert line.startswith(" ] Step+  e Finding ")
        await pilot.click(Keys, offset=(line.index("Step+"), 0))
        await until(pilot, lambda: app.number == 3)
        await pilot.click(Keys, offset=(line.index(" ]"), 0))
        await until(pilot, lambda: app.number == 4)


async def test_a_click_behind_the_last_key_does_nothing(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(160, 40)) as pilot:
        await settle(app, pilot)
        await pilot.click(Keys, offset=(159, 0))
        await settle(app, pilot)
        assert (app.number, len(app.screen_stack)) == (2, 1)


async def test_a_resize_is_no_key(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        app.turns.asked_at = 0.0
        await pilot.resize_terminal(100, 30)
        await settle(app, pilot)
        assert app.turns.asked_at == 0.0
        await pilot.press("j")
        assert app.turns.asked_at > 0.0
