"""What the palette offers beside the keys: every finding, every module, every step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits
from textual.content import Content

from tensortrace.records import Finding
from tensortrace.tui.dialogs.choose import Choice, Choices

if TYPE_CHECKING:
    from tensortrace.tui.app import Viewer

STEP = re.compile(r"(?:step\s*)?(\d{1,18})", re.IGNORECASE)
MOST_DISCOVERED = 20
# Letters of a name score some tens; a number that is typed is a step before all else.
BEST = 1e6


class Places(Choices):
    """Places of the run by their names."""

    @property
    def viewer(self) -> Viewer:
        """The program."""
        return cast("Viewer", self.app)

    def choices(self) -> Sequence[Choice]:
        """Findings first, then modules."""
        found = [
            Choice(f"{f.code} {f.check}, step {f.step}", f, f.message[:200])
            for f in self.viewer.found
        ]
        modules = [
            Choice(f"{path or module.cls} in step {self.viewer.number}", path, module.cls)
            for path, module in self.viewer.modules.items()
        ]
        return [*found, *modules]

    def take(self, choice: Choice) -> object:
        """Go there."""
        viewer, value = self.viewer, choice.value
        viewer.stand.remember()
        viewer.stand.following = False
        if isinstance(value, Finding):
            return viewer.call_later(viewer.go_to_finding, value)
        if isinstance(value, int):
            return viewer.call_later(viewer.stand.go_to, value)
        path = str(value)
        return viewer.call_later(
            viewer.stand.go_to, viewer.number, lambda rows: rows.find_module(path)
        )

    async def discover(self) -> Hits:
        """Show the first findings before anything is typed."""
        shown = 0
        async for hit in super().discover():
            if shown < min(MOST_DISCOVERED, len(self.viewer.found)):
                shown += 1
                yield cast("DiscoveryHit", hit)

    async def search(self, query: str) -> Hits:
        """A number is a step; letters find findings and modules."""
        number = STEP.fullmatch(query.strip())
        if number is not None:
            first, last = self.viewer.log_.first_step(), self.viewer.log_.last_step()
            step = max(first, min(last, int(number[1])))
            choice = Choice(f"Step {step}", step)
            yield Hit(BEST, Content(choice.name), lambda: self.take(choice), text=choice.name)
        async for hit in super().search(query):
            yield hit
