"""When the screen is painted: at once, but for one that was painted a moment ago.

Textual looks whether there is something to paint on a beat of 16.7 ms and, after a rest, misses the
first (`Timer._run` of textual 8.2.8): a key whose answer comes in two parts, the place and then
what is there, showed the second 17 to 33 ms later, doing nothing meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from textual.screen import Screen, ScreenResultType

# As often as a screen may be painted.
PAINT_EVERY_S = 1 / 120


class Paints:
    """Stands for the timer of a screen: `resume` asks for a painting, `pause` takes that back."""

    def __init__(self, paint: Callable[[], object]) -> None:
        self.paint, self.last = paint, float("-inf")
        self.asked: asyncio.TimerHandle | None = None

    def resume(self) -> None:
        """Paint as soon as one may."""
        if self.asked is None:
            loop = asyncio.get_running_loop()
            self.asked = loop.call_at(max(loop.time(), self.last + PAINT_EVERY_S), self._begin)

    def pause(self) -> None:
        """Paint no more for now."""
        if self.asked is not None:
            self.asked.cancel()
            self.asked = None

    def _begin(self) -> None:
        self.asked, self.last = None, asyncio.get_running_loop().time()
        self.paint()


class Immediate(Screen[ScreenResultType]):
    """A screen that is painted at once."""

    _paints: Paints | None = None

    @property
    def _update_timer(self) -> Any:
        if self._paints is None:
            self._paints = Paints(self._paint)
        return self._paints

    def _paint(self) -> None:
        """Paint what has changed; what goes wrong ends the program, as in any timer of Textual."""
        if self.app._exit or not self.is_running:
            return
        try:
            self._on_timer_update()
        except Exception as error:
            self.app._handle_exception(error)
