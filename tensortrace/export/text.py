"""The report for a terminal: how the run went, findings in order of cause, the layer table.

Everything that comes from the log is data: it passes `escape` and becomes a `Text`, so neither a
terminal escape nor rich markup in it is ever obeyed. Plain reports are ASCII but for what the log
holds, so that a pipe, a pager and an old terminal show the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.text import Text

from tensortrace.export.contents import Contents, gather
from tensortrace.export.exporter import Exporter, Wanted, collect
from tensortrace.export.finding import harmless, labelled, show_finding
from tensortrace.export.head import counts_text, head_lines
from tensortrace.export.layers_text import show_layers
from tensortrace.text import escape

if TYPE_CHECKING:
    from tensortrace.run import Run


def render_report(
    run: Run | str | Path,
    *,
    width: int = 100,
    colour: bool = False,
    step: int | None = None,
    modules: Sequence[str] = (),
    notes: bool = False,
) -> str:
    """Write the report of one log.

    Args:
        run: the log or its path.
        width: columns to wrap at.
        colour: with terminal colours; without, the text has no escape byte.
        step: the step of the layer table; chosen by default.
        modules: globs over module paths, to filter findings and table.
        notes: notes in full; by default they are only counted.
    Raises:
        LogError: the path is not a log.
        UsageError: the run has no such step.
    """
    if isinstance(run, (str, Path)):
        from tensortrace.run import open_run

        with closing(open_run(run)) as opened:
            return render_report(
                opened, width=width, colour=colour, step=step, modules=modules, notes=notes
            )
    return render(
        gather([run], step=step, modules=modules), width=width, colour=colour, notes=notes
    )


def render(
    contents: Contents, *, width: int = 100, colour: bool = False, notes: bool = False
) -> str:
    """Write a report of what `gather` collected; the options are those of `render_report`."""
    parts: list[RenderableType] = [_head(contents)]
    for one in contents.shown:
        if notes or one.finding.severity != "note":
            parts += [Text(), show_finding(one, ranks=len(contents.runs) > 1)]
    parts += [Text(), _layers(contents, width), Text(), _verdict(contents, notes)]
    buffer = io.StringIO()
    # An empty environment: width and colour are decided by the caller, not by NO_COLOR or COLUMNS.
    console = Console(
        file=buffer, width=width, force_terminal=colour, force_jupyter=False, legacy_windows=False,
        color_system="standard" if colour else None, no_color=not colour, markup=False,
        emoji=False, highlight=False, _environ={},
    )  # fmt: skip
    for part in parts:
        console.print(part)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().split("\n")[:-1])


def _head(contents: Contents) -> RenderableType:
    groups: list[RenderableType] = []
    for run, found in zip(contents.runs, contents.found, strict=True):
        groups += [
            labelled(((k, harmless(v)) for k, v in head_lines(run, found, first=not groups)), 0)
        ]
    return Group(*groups)


def _layers(contents: Contents, width: int) -> RenderableType:
    run, step = contents.table_run, contents.step
    if step is None:
        return Text("No layer table: no step of the log holds a module call.")
    rank = f" of rank {run.header.rank}" if len(contents.runs) > 1 else ""
    title = f"Layers in step {step}{rank}"
    if contents.lacks:
        title += f" ({contents.lacks})"
    return show_layers(run, title, contents.rows, width)


def _verdict(contents: Contents, notes: bool) -> Text:
    said = counts_text(contents)
    if not said:
        return Text("No findings.", "bold")
    text = Text(f"{said}.", "bold")
    if contents.counts["note"] and not notes:
        text.append(" Notes in full: --notes.")
    codes = list(dict.fromkeys(one.finding.code for one in contents.shown
                               if notes or one.finding.severity != "note"))  # fmt: skip
    if codes:
        text.append(f" More on a check: tensortrace explain {escape(codes[0])}")
    return text


def _write(runs: Sequence[Run], wanted: Wanted, out: TextIO) -> None:
    out.write(render(collect(runs, wanted), notes=True))


EXPORTER = Exporter(
    suffix=".txt",
    summary="the report as plain text, notes in full",
    write=_write,
    beginnings=("log       ",),
)
