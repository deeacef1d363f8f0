"""Writing what is on the screen to a file: as text, or as a picture."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from tensortrace.run import Run
from tensortrace.text import escape
from tensortrace.tui.panes import Pane

# Lines of a pane; a step of a million calls makes no file of a million lines.
MOST_LINES = 20_000
NARROWEST = 40
# What the name of a view may end with; whatever else it is would not be what its name says.
SUFFIXES = ("", ".txt", ".svg")


def free_name(run: Run, step: int, view: str) -> str:
    """A name that no file here has: ``log-step7-layers.txt``."""
    stem = run.path.name.split(".")[0] or "log"
    stem = "run" if stem == "-" else stem  # from standard input; a name like an option is a trap
    for at in range(1, 10_000):
        name = f"{stem}-step{step}-{view}{'' if at == 1 else f'-{at}'}.txt"
        if not Path(name).exists():
            return name
    return f"{stem}.txt"


def text_of(head: str, panes: Iterable[Pane]) -> str:
    """Everything that panes hold, also what does not fit on the screen, escaped."""
    lines = [escape(head)]
    for pane in panes:
        lines += ["", str(pane.border_title)]
        width = max(NARROWEST, pane.size.width)
        lines += [escape(line.rstrip()) for line in pane.texts(width, MOST_LINES)]
    return "\n".join(lines) + "\n"


def write_new(name: str, text: str) -> Path:
    """Write a file that was not there.

    Raises:
        OSError: it is there already, or cannot be written, or is named like what a view is not.
    """
    if Path(name).suffix.lower() not in SUFFIXES:
        told = "a view is .txt or .svg, and `tensortrace export` makes pages and tables"
        raise OSError(errno.EINVAL, told, name)
    data = text.encode("utf-8", "backslashreplace")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody/
        raise OSError(errno.ENOENT, str(error), name) from error
    with path.open("xb") as file:
        try:
            file.write(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return path.absolute()
