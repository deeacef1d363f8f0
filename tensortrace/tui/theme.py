"""Colours, style names and glyphs of the viewer.

A line on the screen is a list of ``(text, style name)`` pieces: plain data that tests read without
a terminal. Colours are of the Okabe-Ito palette (blue against orange, told apart by every kind of
colour vision) and only repeat what a glyph or a word already says.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from textual.theme import Theme

from tensortrace.records import Severity

# One line of the screen: pieces of escaped text, each with a name out of STYLES.
Styled = list[tuple[str, str]]

ORANGE, SKY, YELLOW, VERMILLION = "#e69f00", "#56b4e9", "#f0e442", "#ff7f2a"
BACKGROUND, PANEL, TEXT, FAINT, RULE = "#11151a", "#1b222b", "#e3e8ee", "#93a1b0", "#3b4856"

THEME = Theme(
    name="tensortrace",
    primary=SKY,
    secondary=SKY,
    accent=ORANGE,
    warning=YELLOW,
    error=VERMILLION,
    success=SKY,
    foreground=TEXT,
    background=BACKGROUND,
    surface=BACKGROUND,
    panel=PANEL,
    dark=True,
    variables={"border": SKY, "border-blurred": RULE, "footer-key-foreground": SKY},
)

STYLES = {
    "": Style(),
    "faint": Style(color=FAINT),
    "head": Style(color=FAINT, underline=True),
    "strong": Style(bold=True),
    "name": Style(color=TEXT),
    "op": Style(color="#a9d6f5"),
    "section": Style(color=SKY, bold=True),
    "ok": Style(color=SKY),
    "note": Style(color=SKY, bold=True),
    "warning": Style(color=YELLOW, bold=True),
    "error": Style(color=VERMILLION, bold=True),
    "here": Style(color=TEXT, bgcolor="#2a6f9f", bold=True),
    "mark": Style(color=TEXT, bgcolor="#5a3410", bold=True),
    "bar": Style(color=TEXT, bgcolor=PANEL),
    "bar-strong": Style(color=SKY, bgcolor=PANEL, bold=True),
    "bar-faint": Style(color=FAINT, bgcolor=PANEL),
    "bar-error": Style(color=VERMILLION, bgcolor=PANEL, bold=True),
    "bar-live": Style(color=BACKGROUND, bgcolor=ORANGE, bold=True),
}

# Ten steps of viridis (matplotlib, CC0), for small to large; brightened where it begins, so that
# it is seen on a dark ground. Lightness grows all the way.
VIRIDIS = (
    "#5b3f8c", "#54559b", "#4569a3", "#377ea8", "#2c93a7", "#28a89c", "#41bd84", "#76cf5f",
    "#b5da3c", "#fde725",
)  # fmt: skip
HEAT = tuple(f"heat{at}" for at in range(len(VIRIDIS)))
STYLES.update(
    {name: Style(color=colour) for name, colour in zip(HEAT, VIRIDIS, strict=True)}
    | {
        "flag": Style(color=BACKGROUND, bgcolor=VERMILLION, bold=True),
        "flagged": Style(color=BACKGROUND, bgcolor=YELLOW, bold=True),
        "zero": Style(color=FAINT),
    }
)

# Laid under the selected line; the cursor glyph says the same without colour.
CURSOR = Style(bgcolor="#1d4f73", bold=True)
CURSOR_BLURRED = Style(bgcolor="#2a3440")


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The signs the viewer draws with; every set has the same meaning."""

    bars: str
    cursor: str
    unknown: str
    more: str
    arrow: str
    rule: str
    here: str
    folded: str
    unfolded: str
    heat: str


UNICODE = Glyphs(
    bars="▁▂▃▄▅▆▇█", cursor="▶", unknown="·", more="…", arrow="→", rule="─", here="▲",
    folded="▸", unfolded="▾", heat="·░▒▓█",
)  # fmt: skip
ASCII = Glyphs(
    bars="_.,-:=+#", cursor=">", unknown=" ", more="~", arrow="->", rule="-", here="^",
    folded="+", unfolded="-", heat=".:-=+*%@",
)  # fmt: skip

SEVERITY_GLYPH: dict[Severity, str] = {"error": "x", "warning": "!", "note": "i"}


def clip(text: str, width: int, glyphs: Glyphs = UNICODE) -> str:
    """Cut a text to a width in terminal cells, with a sign where something is missing."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)) + glyphs.more if width > 0 else ""


def joined(line: Styled) -> Styled:
    """Put neighbours of one style together: drawing a piece costs as much as a long one."""
    held: Styled = []
    for text, style in line:
        if held and held[-1][1] == style:
            held[-1] = (held[-1][0] + text, style)
        else:
            held.append((text, style))
    return held


def cut(line: Styled, width: int, glyphs: Glyphs = UNICODE) -> Styled:
    """Cut a line of pieces to a width, with a sign where something is missing."""
    held: Styled = []
    if cell_len("".join(text for text, _ in line).rstrip()) <= width:
        return line
    room = width - cell_len(glyphs.more)
    for text, style in line:
        if cell_len(text) > room:
            return [*held, (set_cell_size(text, max(0, room)) + glyphs.more, style)]
        held.append((text, style))
        room -= cell_len(text)
    return held


def fit(text: str, width: int, glyphs: Glyphs = UNICODE, *, right: bool = False) -> str:
    """Cut or pad a text to exactly a width in terminal cells."""
    text = clip(text, width, glyphs)
    padding = " " * (width - cell_len(text))
    return padding + text if right else text + padding
