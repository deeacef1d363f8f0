"""What an exporter is, and how they are found: by listing this folder.

A file here that makes an `Exporter` at its top level is a format of `tensortrace export`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tensortrace import export
from tensortrace.errors import UsageError
from tensortrace.export.contents import Contents, Found, gather, logged
from tensortrace.text import escape

if TYPE_CHECKING:
    from tensortrace.run import Run

__all__ = ["Exporter", "Wanted", "all_exporters", "choose", "collect"]


def _nothing(step: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a run is exported.

    `steps` are those asked for, None for all; `modules` are globs over module paths, none for all;
    `what` names a part that the format offers, None for its usual one; `tick` is called with the
    number of each step that was read, to show progress.
    """

    steps: range | None = None
    modules: Sequence[str] = ()
    what: str | None = None
    tick: Callable[[int], None] = field(default=_nothing)


@dataclass(frozen=True, slots=True)
class Exporter:
    """A format.

    `suffix` is that of its files, `summary` one line for the help, `write` writes the logs of one
    run (one per rank). A file that begins like one of `beginnings` was made by it, and may be
    replaced. `parts` are what `Wanted.what` may be, the usual one first.
    """

    suffix: str
    summary: str
    write: Callable[[Sequence[Run], Wanted, TextIO], None]
    beginnings: tuple[str, ...]
    parts: tuple[str, ...] = ()


def all_exporters() -> list[Exporter]:
    """List every exporter in this folder, by suffix."""
    found: list[Exporter] = []
    for info in pkgutil.iter_modules(export.__path__):
        module = importlib.import_module(f"{export.__name__}.{info.name}")
        found += [value for value in vars(module).values() if isinstance(value, Exporter)]
    return sorted(found, key=lambda one: one.suffix)


def choose(target: str, what: str | None = None) -> Exporter:
    """Choose the exporter for a file by its suffix; standard output (``-``) gets CSV.

    Args:
        target: the file to be written, or ``-``.
        what: the part that is wanted of it; the usual one by default.
    Raises:
        UsageError: no format has that suffix, or it has no such part.
    """
    suffix = ".csv" if target == "-" else Path(target).suffix.lower()
    exporters = all_exporters()
    chosen = next((one for one in exporters if one.suffix == suffix), None)
    if chosen is None:
        formats = ", ".join(one.suffix for one in exporters)
        said = f"no format for {escape(suffix)} files" if suffix else "no suffix says the format"
        raise UsageError(f"{escape(target)}: {said}. There are {formats}.")
    if what is not None and what not in chosen.parts:
        parts = ", ".join(chosen.parts)
        offer = f"it has {parts}" if parts else "it has no parts to choose from"
        raise UsageError(f"--what {escape(what)} is no part of a {suffix} file: {offer}.")
    return chosen


def collect(runs: Sequence[Run], wanted: Wanted) -> Contents:
    """Collect what a report of the steps and modules that are wanted says."""
    found = [_within(logged(run), wanted.steps) for run in runs]
    contents = gather(runs, found, modules=wanted.modules)
    run, steps = contents.table_run, wanted.steps
    if steps is None or contents.step is None or contents.step in steps:
        return contents
    last = min(steps[-1], run.last_step())
    if last not in steps or last not in run.steps:
        return replace(contents, step=None, rows=[])
    return gather(runs, found, step=last, modules=wanted.modules)


def _within(found: Found, steps: range | None) -> Found:
    """Leave out findings of other steps."""
    if steps is None:
        return found
    return replace(found, findings=[f for f in found.findings if f.step in steps])
