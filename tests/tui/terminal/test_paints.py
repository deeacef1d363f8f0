"""A screen is painted at once, and what a view reads waits for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tensortrace.tui.app import Viewer
from tensortrace.tui.terminal import paints
from tensortrace.tui.terminal.paints import PAINT_EVERY_S, Immediate, Paints
from tensortrace.tui.views import view
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, until


class Loop:
    """A loop whose time stands still; what it was asked to call is called by the test."""

    def __init__(self) -> None:
        self.now = 50.0
        self.calls: list[tuple[float, Callable[[], object]]] = []
        self.cancelled = 0

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, call: Callable[[], object]) -> Loop:
        self.calls.append((at, call))
        return self

    def cancel(self) -> None:
        self.calls.pop()
        self.cancelled += 1

    def run(self) -> None:
        """Do what was asked for, at its time."""
        self.now, call = self.calls.pop()
        call()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(paints.asyncio, "get_running_loop", lambda: loop)
    return loop


def test_a_screen_at_rest_is_painted_at_once_and_then_after_a_moment(loop: Loop) -> None:
    painted: list[float] = []
    asked = Paints(lambda: painted.append(loop.now))
    for _ in range(3):  # asked for thrice, painted once
        asked.resume()
    assert [at for at, _ in loop.calls] == [50.0]
    loop.run()
    asked.resume()
    loop.run()
    loop.now += 1.0
    asked.resume()
    loop.run()
    assert painted == [50.0, 50.0 + PAINT_EVERY_S, 51.0 + PAINT_EVERY_S]
    assert not loop.calls


def test_a_painting_that_is_taken_back_may_be_asked_for_again(loop: Loop) -> None:
    painted: list[float] = []
    asked = Paints(lambda: painted.append(loop.now))
    asked.pause()
    asked.resume()
    asked.pause()
    assert (loop.calls, loop.cancelled) == ([], 1)
    asked.resume()
    loop.run()
    assert painted == [50.0]


async def test_every_screen_of_the_viewer_is_painted_at_once(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        for key in ("question_mark", "C", "c", "ctrl+p"):
            await pilot.press(key)
            await until(pilot, lambda: len(app.screen_stack) == 2)
            for screen in app.screen_stack:
                assert isinstance(screen, Immediate)
                assert isinstance(screen._update_timer, Paints)
            await pilot.press("escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)


async def test_what_goes_wrong_while_painting_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Viewer(make_open_run(tmp_path))
    told: list[Exception] = []
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        screen: Any = app.screen

        def fail() -> None:
            raise OverflowError

        with monkeypatch.context() as patch:
            patch.setattr(app, "_handle_exception", told.append)
            patch.setattr(screen, "_on_timer_update", fail)
            screen._paint()
            assert [type(error) for error in told] == [OverflowError]
            patch.setattr(app, "_exit", True)  # it is ending: nothing is painted any more
            screen._paint()
            assert len(told) == 1


async def test_a_view_reads_once_what_it_knows_is_painted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await pilot.press("5")
        await settle(app, pilot)
        shown = app.view
        assert shown is not None
        done: list[bool] = []
        begins: list[Callable[[], object]] = []
        painted: list[Callable[[], object]] = []
        with monkeypatch.context() as patch:
            patch.setattr(app, "run_worker", lambda begin, **_: begins.append(begin))
            patch.setattr(shown, "call_after_refresh", painted.append)
            patch.setattr(view, "DRAWN_S", 60.0)
            shown.work(lambda: done.append(True))
            thread = Thread(target=begins.pop())
            thread.start()
            assert not done
            painted.pop()()
            thread.join()
            assert done == [True]
            # A screen that is painted no more holds nobody up.
            patch.setattr(view, "DRAWN_S", 0.0)
            shown.work(lambda: done.append(True))
            begins.pop()()
            assert done == [True, True]
