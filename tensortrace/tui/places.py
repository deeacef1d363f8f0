"""Where one was in a log, kept from one look to the next: a small file for each log; and the theme.

It stands in the state folder of the user (XDG), is replaced as a whole and never needed: what is
missing, damaged or of another run is left out without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from tensortrace.run import Run
from tensortrace.tui.tabs import TABS

# So many logs are remembered; the file of one that was looked at longest ago goes first.
MOST = 200
LONGEST = 4096
# The file of the theme, beside those of the logs.
THEME = "theme"


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """The step, the seq of the row, the view, and the columns of the table."""

    run_id: str
    step: int
    seq: int | None = None
    view: str = "step"
    columns: tuple[str, ...] | None = None


def folder() -> Path | None:
    """The folder of the places, as the XDG base directory specification has it.

    None for a user without a home, as containers have.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        # A relative path is invalid by the specification, and is ignored.
        use = given and Path(given).is_absolute()
        base = Path(given) if use else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "tensortrace" / "places"


def path_of(run: Run, inside: Path) -> Path:
    """The file of a log."""
    name = hashlib.sha256(os.fsencode(run.path.absolute())).hexdigest()[:32]
    return inside / f"{name}.json"


def recall_theme(inside: Path) -> str:
    """The name of the theme that was chosen last, "" if none was."""
    try:
        with (inside / THEME).open("rb") as file:
            return file.read(LONGEST).decode("ascii").strip()
    except (OSError, ValueError):
        return ""


def keep_theme(name: str, inside: Path) -> None:
    """Remember a theme; a folder that cannot be written is left alone."""
    with contextlib.suppress(OSError):
        inside.mkdir(parents=True, exist_ok=True, mode=0o700)
        (inside / THEME).write_text(f"{name}\n", "ascii")


def recall(run: Run, inside: Path) -> Place | None:
    """Where one was in a log, None if that is not known or was in an earlier run."""
    try:
        with path_of(run, inside).open("rb") as file:
            place = msgspec.json.decode(file.read(LONGEST), type=Place)
    except (OSError, ValueError, RecursionError):
        return None
    known = place.run_id == run.header.run_id and place.view in TABS
    return place if known and run.first_step() <= place.step <= run.last_step() else None


def keep(place: Place, run: Run, inside: Path) -> None:
    """Remember a place; a folder that cannot be written is left alone."""
    with contextlib.suppress(OSError):
        inside.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whoever reads at the same time sees the old or the new, never a half.
        handle, name = tempfile.mkstemp(dir=inside, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(place))
            Path(name).replace(path_of(run, inside))
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        kept = sorted(inside.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) - MOST)]:
            path.unlink(missing_ok=True)
