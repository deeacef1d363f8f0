"""The colours of the viewer: three themes, and in each what the names of styles stand for.

Colours are of the Okabe-Ito palette (blue against orange, told apart by every kind of colour
vision), darker on a light ground, and only repeat what a glyph or a word already says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.style import Style
from textual.theme import Theme

# Ten steps of viridis (matplotlib, CC0), for small to large; brightened where it begins, so that
# it is seen on a dark ground. Lightness grows all the way.
VIRIDIS = (
    "#5b3f8c", "#54559b", "#4569a3", "#377ea8", "#2c93a7", "#28a89c", "#41bd84", "#76cf5f",
    "#b5da3c", "#fde725",
)  # fmt: skip
# The same the other way round for a light ground: what is large is far from it.
DARKENING = (
    "#c3b01c", "#a0b52c", "#74ae42", "#4aa35a", "#2b9570", "#218580", "#28738a", "#33608b",
    "#3d4985", "#440f5c",
)  # fmt: skip
HEAT = tuple(f"heat{at}" for at in range(len(VIRIDIS)))


@dataclass(frozen=True, slots=True)
class Colours:
    """The colours of a theme: blue says what is well or active, the others what is wrong."""

    background: str
    panel: str
    text: str
    faint: str
    rule: str
    blue: str
    op: str
    orange: str
    yellow: str
    vermillion: str
    # Grounds: of the step and column one is at, of a line of source, of the line of the cursor.
    here: str
    mark: str
    cursor: str
    blurred: str
    heat: tuple[str, ...] = VIRIDIS


COLOURS = {
    "dark": Colours(
        background="#11151a", panel="#1b222b", text="#e3e8ee", faint="#93a1b0", rule="#3b4856",
        blue="#56b4e9", op="#a9d6f5", orange="#e69f00", yellow="#f0e442", vermillion="#ff7f2a",
        here="#286b99", mark="#5a3410", cursor="#153853", blurred="#2a3440",
    ),
    "light": Colours(
        background="#fcfdfe", panel="#e8edf2", text="#161c23", faint="#525e6a", rule="#a7b2bd",
        blue="#005f94", op="#004468", orange="#8a4b00", yellow="#6b5600", vermillion="#a83200",
        here="#bfe0f7", mark="#ffdfb5", cursor="#d3e9f8", blurred="#e6ebf0", heat=DARKENING,
    ),
    "contrast": Colours(
        background="#000000", panel="#000000", text="#ffffff", faint="#d0d6dc", rule="#aab4be",
        blue="#8fd3ff", op="#c4e8ff", orange="#ffc04d", yellow="#fff27a", vermillion="#ffa366",
        here="#00507f", mark="#5c2e00", cursor="#002f4a", blurred="#23282d",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """A theme as our lines and as Textual have it; `cursor` lies under the selected line.

    The cursor glyph says the same without colour.
    """

    theme: Theme
    styles: Mapping[str, Style]
    cursor: Style
    blurred: Style


def make_look(name: str, colours: Colours) -> Look:
    """Make the styles of a theme from its colours."""
    c = colours
    styles = {
        "": Style(),
        "faint": Style(color=c.faint),
        "head": Style(color=c.faint, underline=True),
        "strong": Style(bold=True),
        "name": Style(color=c.text),
        "op": Style(color=c.op),
        "section": Style(color=c.blue, bold=True),
        "ok": Style(color=c.blue),
        "note": Style(color=c.blue, bold=True),
        "warning": Style(color=c.yellow, bold=True),
        "error": Style(color=c.vermillion, bold=True),
        "here": Style(color=c.text, bgcolor=c.here, bold=True),
        "mark": Style(color=c.text, bgcolor=c.mark, bold=True),
        "bar": Style(color=c.text, bgcolor=c.panel),
        "bar-strong": Style(color=c.blue, bgcolor=c.panel, bold=True),
        "bar-faint": Style(color=c.faint, bgcolor=c.panel),
        "bar-error": Style(color=c.vermillion, bgcolor=c.panel, bold=True),
        "bar-live": Style(color=c.background, bgcolor=c.orange, bold=True),
        "flag": Style(color=c.background, bgcolor=c.vermillion, bold=True),
        "flagged": Style(color=c.background, bgcolor=c.yellow, bold=True),
        "zero": Style(color=c.faint),
    }
    styles |= {name: Style(color=heat) for name, heat in zip(HEAT, c.heat, strict=True)}
    theme = Theme(
        name="tensortrace" if name == "dark" else f"tensortrace-{name}",
        primary=c.blue,
        secondary=c.blue,
        accent=c.orange,
        warning=c.yellow,
        error=c.vermillion,
        success=c.blue,
        foreground=c.text,
        background=c.background,
        surface=c.background,
        panel=c.panel,
        dark=name != "light",
        variables={
            "border": c.blue, "border-blurred": c.rule, "footer-key-foreground": c.blue,
        },
    )  # fmt: skip
    cursor = Style(bgcolor=c.cursor, bold=True)
    return Look(theme, styles, cursor, Style(bgcolor=c.blurred))


# By the name that a person chooses; the first is that of the beginning.
LOOKS = {name: make_look(name, colours) for name, colours in COLOURS.items()}
DARK = LOOKS["dark"]
_BY_THEME = {look.theme.name: look for look in LOOKS.values()}


def look_of(theme: str) -> Look:
    """The look that a theme of Textual belongs to; the dark one for a theme that is not ours."""
    return _BY_THEME.get(theme, DARK)
