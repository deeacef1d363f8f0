"""The report for a terminal: how the run went, findings in order of cause, the layer table.

Everything that comes from the log is data: it passes `escape` and becomes a `Text`, so neither a
terminal escape nor rich markup in it is ever obeyed. Plain reports are ASCII but for what the log
holds, so that a pipe, a pager and an old terminal show the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensortrace.export.contents import SEVERITIES, Contents, gather, shown_path
from tensortrace.export.finding import harmless, labelled, show_finding
from tensortrace.export.head import head_lines
from tensortrace.text import escape, number_text, shape_text, short_dtype

if TYPE_CHECKING:
    from tensortrace.export.layers import Row
    from tensortrace.run import Run

# Only a line under the column names; rich's own boxes are not ASCII.
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


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

        run = open_run(run)
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
    parts += [Text(), _layers(contents), Text(), _verdict(contents, notes)]
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


def _layers(contents: Contents) -> RenderableType:
    run, step = contents.table_run, contents.step
    if step is None:
        return Text("No layer table: no step of the log holds a module call.")
    rank = f" of rank {run.header.rank}" if len(contents.runs) > 1 else ""
    title = Text(f"Layers in step {step}{rank}", "bold")
    if not contents.whole:
        title.append(
            " (only the step line was kept; whole steps have shapes, times and gradients)",
            "not bold",
        )
    if not contents.rows:
        return Group(title, Text("  none" + (" that match" if run.modules else "")))
    table = Table(
        box=RULED, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True
    )
    table.add_column("module", overflow="fold")
    table.add_column("class", overflow="fold", max_width=22)
    table.add_column("output", overflow="fold")
    for name in ("params", "out rms", "grad norm", "upd ratio", "host ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst", no_wrap=True)
    for label, row in zip(_tree(run, contents.rows), contents.rows, strict=True):
        table.add_row(*_cells(label, row))
    return Group(title, table)


def _cells(label: str, row: Row) -> list[Text]:
    output = "-" if row.dtype is None else f"{shape_text(row.shape)} {short_dtype(row.dtype)}"
    times = f" x{row.calls}" if row.calls > 1 else ""
    host = "-" if row.host_ns is None else f"{row.host_ns / 1e6:.2f}"
    style = "bold red" if row.flag else ""
    return [
        Text(escape(label) + times, style), Text(escape(row.cls)), Text(output.replace(", ", ",")),
        Text(f"{row.parameters:,}" if row.parameters else "-"), Text(number_text(row.output_rms)),
        Text(number_text(row.grad_norm)), Text(number_text(row.update_ratio)), Text(host),
        Text(escape(row.flag) or "-", style),
    ]  # fmt: skip


def _tree(run: Run, rows: Sequence[Row]) -> list[str]:
    """Name each row under the nearest row above it that holds it, two columns deeper."""
    labels: list[str] = []
    above: list[str] = []
    for row in rows:
        path = row.path
        while above and above[-1] and not path.startswith(above[-1] + "."):
            above.pop()
        parent = above[-1] if above else ""
        alias = run.modules[path].alias if path in run.modules else None
        name = path[len(parent) + 1 :] if parent else shown_path(run, path)
        labels.append("  " * len(above) + (alias or name))
        above.append(path)
    return labels


def _verdict(contents: Contents, notes: bool) -> Text:
    counts = contents.counts
    said = [f"{counts[s]} {s}{'' if counts[s] == 1 else 's'}" for s in SEVERITIES if counts[s]]
    if not said:
        return Text("No findings.", "bold")
    text = Text(", ".join(said) + ".", "bold")
    if counts["note"] and not notes:
        text.append(" Notes in full: --notes.")
    codes = list(dict.fromkeys(one.finding.code for one in contents.shown
                               if notes or one.finding.severity != "note"))  # fmt: skip
    if codes:
        text.append(f" More on a check: tensortrace explain {escape(codes[0])}")
    return text
