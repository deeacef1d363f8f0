"""Choosing one of many by a few letters of its name: Textual's palette over a list of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from textual.app import App
from textual.command import CommandPalette, DiscoveryHit, Hit, Hits, Provider
from textual.content import Content

from tensortrace.text import escape
from tensortrace.tui.dialogs.over import Over

# So many names are compared before the screen may draw again.
AT_ONCE = 200
MOST_SHOWN = 200


class Palette(CommandPalette, Over[None]):
    """Textual's palette, over the screen as all that stands over it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A name, and what it stands for."""

    name: str
    value: object
    help: str = ""


class Choices(Provider):
    """Finds choices by some of their letters; subclasses say which there are."""

    def choices(self) -> Sequence[Choice]:
        """All of them."""
        raise NotImplementedError

    def take(self, choice: Choice) -> object:
        """Do what a choice means."""
        raise NotImplementedError

    async def discover(self) -> Hits:
        """Show the first ones before anything is typed."""
        for choice in self.choices()[:MOST_SHOWN]:
            yield DiscoveryHit(
                Content(escape(choice.name)), partial(self.take, choice),
                text=escape(choice.name), help=_plain(choice.help),
            )  # fmt: skip

    async def search(self, query: str) -> Hits:
        """Show those that have the letters."""
        matcher, shown = self.matcher(query), 0
        for at, choice in enumerate(self.choices()):
            if at % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            name = escape(choice.name)
            score = matcher.match(name)
            if score > 0 and shown < MOST_SHOWN:
                shown += 1
                yield Hit(
                    score, Content(name), partial(self.take, choice), text=name,
                    help=_plain(choice.help),
                )  # fmt: skip


def _plain(text: str) -> Any:
    """A text that is no markup: Textual draws what it is given, and reads markup in a string."""
    return Content(escape(text)) if text else None


def choose(
    app: App[int], question: str, choices: Sequence[Choice], take: Callable[[object], object]
) -> None:
    """Ask for one of some choices; nothing happens if none is chosen."""

    class Asked(Choices):
        def choices(self) -> Sequence[Choice]:
            return choices

        def take(self, choice: Choice) -> object:
            return take(choice.value)

    app.push_screen(Palette(providers=[Asked], placeholder=question))
