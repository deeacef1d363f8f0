"""What a test of the screen needs: wait until all is drawn, read it as text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from textual.pilot import Pilot
from textual.worker import WorkerCancelled

from tensortrace.tui.app import Viewer


async def settle(app: Viewer, pilot: Pilot[Any]) -> None:
    """Wait for the threads and for the detail, which is drawn a little after the table."""
    while workers := [worker for worker in app.workers if not worker.is_finished]:
        with contextlib.suppress(WorkerCancelled):  # a newer question replaces an older one
            await workers[0].wait()
    await pilot.pause()
    if app.view is not None:
        await until(pilot, lambda: app.view is None or app.view.ready)
    while app.details.timer is not None:
        await pilot.pause()
    await pilot.pause()


async def until(pilot: Pilot[Any], holds: Callable[[], object]) -> None:
    """Wait until something holds: a busy machine lays out and draws some turns later."""
    for _ in range(100):
        if holds():
            return
        await pilot.pause()
    assert holds()


def text_of(app: Viewer) -> str:
    """What is on the screen, as text."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


def told(app: Viewer) -> str:
    """The messages that stand at the moment, whether they are painted yet or not."""
    return "\n".join(str(one.message) for one in app._notifications)
