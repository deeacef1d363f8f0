"""Writing to the terminal what changed on the screen, and no more.

Textual writes whole regions: a line that scrolls by one is a pane written anew, 40 kB for a page at
120x40, which is what one waits for over ssh. What the terminal shows is kept here cell by cell;
runs of cells that differ are written. One cursor move in a table is then under 1 kB.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from textual._compositor import ChopsUpdate, CompositorUpdate, LayoutUpdate
from textual.strip import Strip

# What a character stands in, as the numbers of escape codes: attributes, colour, background.
Look = tuple[str, str, str]
# A character and its look; the second half of a wide one is "".
Cell = tuple[str, Look]
PLAIN: Look = ("", "", "")
NOTHING: Cell = ("", ("?", "", ""))
# So many equal cells between two changes are written again: to move the cursor costs as much.
GAP = 6


class Painted:
    """What a terminal of `width` by `height` cells shows, as far as we wrote it."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.lines: list[list[Cell]] = [[NOTHING] * width for _ in range(height)]
        # The strips that a line was made of, by their first cell: most come again unchanged.
        self.strips: list[dict[int, Strip]] = [{} for _ in range(height)]
        self.looks: dict[tuple[Style | None, bool], Look] = {}
        # What the terminal writes in at the moment.
        self.look = PLAIN

    def look_of(self, style: Style | None, blank: bool, system: ColorSystem) -> Look:
        """How a style looks; of a blank cell only what is seen of one."""
        held = self.looks.get((style, blank))
        if held is None:
            shown = style
            if style and blank and not (style.reverse or style.underline or style.strike):
                shown = Style(bgcolor=style.bgcolor)
            held = self.looks[style, blank] = _look(shown, system) if shown else PLAIN
        return held

    def cells(self, strip: Strip, system: ColorSystem) -> list[Cell]:
        """The cells of a strip."""
        held: list[Cell] = []
        for text, style, control in strip:
            if control:
                continue
            full, empty = self.look_of(style, False, system), self.look_of(style, True, system)
            if text.isascii():
                blank = (" ", empty)
                held += [blank if letter == " " else (letter, full) for letter in text]
                continue
            for letter in text:
                wide = cell_len(letter)
                if wide == 0 and held:  # it joins the character before
                    held[-1] = (held[-1][0] + letter, held[-1][1])
                else:
                    look = empty if letter == " " else full
                    held += [(letter, look), *[("", look)] * (wide - 1)]
        return held

    def paint(self, y: int, x: int, strip: Strip, system: ColorSystem) -> str:
        """Take in a strip; give what is to be written for it."""
        if not 0 <= y < self.height or not 0 <= x < self.width:
            return ""
        known, stop = self.strips[y], x + strip.cell_length
        if known.get(x) == strip:
            return ""
        for at in [at for at, old in known.items() if at < stop and at + old.cell_length > x]:
            del known[at]
        known[x] = strip
        return self._write(y, x, self.cells(strip, system)[: self.width - x])

    def _write(self, y: int, x: int, new: list[Cell]) -> str:
        line = self.lines[y]
        old = line[x : x + len(new)]
        if old == new:
            return ""
        line[x : x + len(new)] = new
        changed = [at for at in range(len(old)) if old[at] != new[at]]
        written: list[str] = []
        first = last = changed[0]
        for at in [*changed[1:], len(new) + GAP + 2]:
            if at - last > GAP:
                written.append(self._run(y, x, new, first, last + 1))
                first = at
            last = at
        return "".join(written)

    def _run(self, y: int, x: int, cells: list[Cell], first: int, stop: int) -> str:
        """Write some cells; never half of a wide character."""
        while first > 0 and not cells[first][0]:
            first -= 1
        while stop < len(cells) and not cells[stop][0]:
            stop += 1
        written, look = [f"\x1b[{y + 1};{x + first + 1}H"], self.look
        for letter, style in cells[first:stop]:
            if style is not look and style != look:
                written.append(_from_to(look, style))
                look = style
            written.append(letter)
        self.look = look
        return "".join(written)

    def end(self) -> str:
        """Leave the terminal as it was found: what others write stands in no look of ours."""
        look, self.look = self.look, PLAIN
        return "" if look == PLAIN else "\x1b[0m"


def _look(style: Style, system: ColorSystem) -> Look:
    """Take the codes of a style apart: 30 to 38 colour the letters, 40 to 48 the ground."""
    codes = style.render("x", color_system=system).partition("x")[0][2:-1].split(";")
    parts: dict[str, list[str]] = {"": [], "3": [], "4": []}
    at = 0
    while at < len(codes):
        code = codes[at]
        length = {"2": 5, "5": 3}[codes[at + 1]] if code in ("38", "48") else 1
        bright = {"9": "3", "10": "4"}.get(code[:-1])
        kind = bright or (code[0] if len(code) == 2 and code[0] in "34" else "")
        parts[kind] += codes[at : at + length]
        at += length
    attributes, colour, ground = (";".join(part) for part in parts.values())
    return attributes, colour, ground


def _from_to(old: Look, new: Look) -> str:
    """The codes that change one look into another."""
    if new == PLAIN:
        return "\x1b[0m"
    if old[0] != new[0] and old[0]:
        return f"\x1b[0;{';'.join(filter(None, new))}m"
    changed = [new[0]] if old[0] != new[0] else []
    if new[1] != old[1]:
        changed.append(new[1] or "39")
    if new[2] != old[2]:
        changed.append(new[2] or "49")
    return f"\x1b[{';'.join(changed)}m"


class Changes(CompositorUpdate):
    """An update of the screen without what the terminal shows already."""

    def __init__(self, update: CompositorUpdate, painted: Painted) -> None:
        self.update, self.painted = update, painted

    def render_segments(self, console: Console) -> str:
        """What is to be written for it."""
        system = console._color_system or ColorSystem.TRUECOLOR
        paint = self.painted.paint
        written = [paint(y, x, strip, system) for y, x, strip in pieces(self.update)]
        return "".join([*written, self.painted.end()])


def pieces(update: CompositorUpdate) -> Iterator[tuple[int, int, Strip]]:
    """The strips of an update, each with its line and first cell."""
    if isinstance(update, LayoutUpdate):
        for y, line in enumerate(update.strips, update.region.y):
            x = update.region.x
            for strip in line:
                yield y, x, strip
                x += strip.cell_length
    elif isinstance(update, ChopsUpdate):
        for y, low, high in update.spans:
            for stop, (x, held) in zip(update.chop_ends[y], update.chops[y].items(), strict=False):
                if held is not None and x <= high and stop > low:
                    yield y, x, held if stop <= high else held.crop(0, high - x)
