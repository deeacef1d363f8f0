"""Write an export to its place: whole or not at all, and never over something else."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tensortrace.errors import UsageError
from tensortrace.export.exporter import Exporter, Wanted
from tensortrace.log import starts_like_a_log
from tensortrace.text import escape

if TYPE_CHECKING:
    from tensortrace.run import Run


def default_target(runs: Sequence[Run]) -> str:
    """Name the page of some logs: as the log, without the rank if there are several."""
    stem = runs[0].path.name.partition(".jsonl")[0]
    if len(runs) > 1:
        stem = stem.removesuffix(f".rank{runs[0].header.rank}")
    return f"{'run' if stem in ('', '-') else stem}.html"


def save(
    runs: Sequence[Run], exporter: Exporter, target: str, wanted: Wanted, *, force: bool
) -> int:
    """Write the logs of one run to a file, or to standard output if `target` is ``-``.

    The file comes to be when it is complete: until then another of a hidden name grows beside it.

    Args:
        runs: one per rank.
        exporter: the format.
        target: a path, or ``-``.
        wanted: what of the run.
        force: replace a file that no export of this format made; a log never is.
    Returns:
        How many bytes the file has; 0 for what is no regular file.
    Raises:
        UsageError: the file may not be replaced, or cannot be written.
    """
    if target == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", newline="", errors="backslashreplace")
        exporter.write(runs, wanted, sys.stdout)
        return 0
    # A link stays one: what it points to is replaced.
    path = Path(os.path.realpath(target))
    if not _may_replace(path, target, exporter, force):
        try:
            with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as out:
                exporter.write(runs, wanted, out)
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error
        return 0
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        with part.open("x", encoding="utf-8", newline="", errors="backslashreplace") as out:
            exporter.write(runs, wanted, out)
        if path.exists():
            part.chmod(stat.S_IMODE(path.stat().st_mode))
        part.replace(path)
    except OSError as err:
        raise UsageError(f"cannot write {escape(target)}: {err.strerror or err}.") from err
    finally:
        with suppress(OSError):
            part.unlink()
    return path.stat().st_size


def _may_replace(path: Path, target: str, exporter: Exporter, force: bool) -> bool:
    """Whether there is nothing or a file that may go; False for a device or a pipe.

    Raises:
        UsageError: something else is there.
    """
    name = escape(target)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return True
    except OSError as err:
        raise UsageError(f"cannot write {name}: {err.strerror}.") from err
    if stat.S_ISDIR(mode):
        raise UsageError(f"{name} is a folder: give the name of a file in it.")
    if not stat.S_ISREG(mode):
        return False
    if starts_like_a_log(path):
        raise UsageError(f"{name} is a tensortrace log and is never replaced: give another name.")
    if not force and not _is_ours(path, exporter):
        raise UsageError(
            f"{name} exists and is no {exporter.suffix} export of tensortrace. "
            "Give another name, or --force to replace it."
        )
    return True


def _is_ours(path: Path, exporter: Exporter) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return not head or any(head.startswith(b.encode()) for b in exporter.beginnings)
