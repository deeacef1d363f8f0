"""Strings that a terminal or rich would obey: terminal escapes, bidi controls, markup."""

from __future__ import annotations

import re

PAYLOADS = {
    "clipboard": "\x1b]52;c;cHduZWQ=\x07",
    "title, unterminated": "\x1b]0;owned",
    "colour": "\x1b[31mred",
    "device control": "\x1bPq#0;2;0;0;0\x1b\\",
    "c1": "\x9b31m\x9d52;c;aGk=\x9c",
    "bell, backspace, return": "a\x07b\x08c\rd",
    "nul and delete": "a\x00b\x7fc",
    "bidi": "\u202eevil\u2066\u2069",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "zero width": "a\u200bb\ufeffc",
    "style markup": "[red]no[/red]",
    "closing markup": "[/foo]",
    "action markup": "[@click=app.bell()]x[/]",
    "emoji markup": ":boom: [link=file:///etc/passwd]x[/link]",
    "braces": "{0} %s {x!r}",
}
# What no output may hold: every control but the line feed, bidi and zero-width characters.
FORBIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)
