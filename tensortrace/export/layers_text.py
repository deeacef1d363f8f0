"""The layer table as a terminal shows it: a row per module, indented as the modules are nested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import Box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensortrace.export.contents import shown_path
from tensortrace.text import escape, number_text, shape_text, short_dtype

if TYPE_CHECKING:
    from tensortrace.export.layers import Row
    from tensortrace.run import Run

# Only a line under the column names; rich's own boxes are not ASCII.
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
COLUMNS = (
    "module", "class", "output", "params", "out rms", "grad norm", "upd ratio", "host ms", "worst",
)  # fmt: skip
# Where there is no room for all columns, these go, the first first.
EXPENDABLE = ("host ms", "class", "params", "upd ratio", "grad norm", "output", "out rms")
# A class or a shape wider than this is folded; a path gets at least so much before a column goes.
WIDEST = 24
GAP = 2


def show_layers(run: Run, title: str, rows: Sequence[Row], width: int) -> RenderableType:
    """Lay out the rows under a title; says in it which columns had no room."""
    cells = [_cells(label, row) for label, row in zip(_tree(run, rows), rows, strict=True)]
    if not cells:
        return Group(Text(title, "bold"), Text("  none" + (" that match" if run.modules else "")))
    widths = {
        name: max(len(name), *(min(cell_len(cell.plain), WIDEST) for cell in column))
        for name, column in zip(COLUMNS, zip(*cells, strict=True), strict=True)
    }
    gone = []
    for name in EXPENDABLE:
        if sum(widths.values()) + GAP * (len(widths) - 1) <= width:
            break
        gone.append(name)
        del widths[name]
    # What is left over is for long paths.
    longest = max(cell_len(row[0].plain) for row in cells)
    spare = width - sum(widths.values()) - GAP * (len(widths) - 1)
    widths["module"] = max(min(longest, widths["module"] + spare), len("module"))
    table = Table(box=RULED, show_edge=False, padding=(0, GAP - 1, 0, 0), pad_edge=False)
    for name, columns in widths.items():
        side = "left" if name in ("module", "class", "output", "worst") else "right"
        table.add_column(name, justify=side, overflow="fold", width=columns)  # type: ignore[arg-type]
    for row in cells:
        table.add_row(*(row[COLUMNS.index(name)] for name in widths))
    if gone:
        title += f" (no room for: {', '.join(gone)})"
    return Group(Text(title, "bold"), table)


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
    modules = run.modules
    for row in rows:
        path = row.path
        while above and above[-1] and not path.startswith(above[-1] + "."):
            above.pop()
        parent = above[-1] if above else ""
        alias = modules[path].alias if path in modules else None
        name = path[len(parent) + 1 :] if parent else shown_path(modules, path)
        labels.append("  " * len(above) + (alias or name))
        above.append(path)
    return labels
