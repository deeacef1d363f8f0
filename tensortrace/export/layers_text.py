"""The layer table as a terminal shows it: a row per module, indented as the modules are nested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import Box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensortrace.export.contents import tree_labels
from tensortrace.text import escape, number_text, shape_text, short_dtype

if TYPE_CHECKING:
    from tensortrace.export.layers import Row
    from tensortrace.run import Run

# Only a line under the column names; rich's own boxes are not ASCII.
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
COLUMNS = (
    "module", "class", "output", "params", "out rms", "grad norm", "upd ratio", "host ms",
    "device ms", "worst",
)  # fmt: skip
# Where there is no room for all columns, these go, the first first.
EXPENDABLE = (
    "host ms", "device ms", "class", "params", "upd ratio", "grad norm", "output", "out rms",
)  # fmt: skip
# A class or a shape wider than this is folded; a path gets at least so much before a column goes.
WIDEST = 24
GAP = 2


def show_layers(run: Run, title: str, rows: Sequence[Row], width: int) -> RenderableType:
    """Lay out the rows under a title; says in it which columns had no room."""
    tree = tree_labels(run.modules, [row.path for row in rows])
    labels = ["  " * depth + label for depth, label in tree]
    cells = [_cells(label, row) for label, row in zip(labels, rows, strict=True)]
    if not cells:
        return Group(Text(title, "bold"), Text("  none" + (" that match" if run.modules else "")))
    widths = {
        name: max(len(name), *(min(cell_len(cell.plain), WIDEST) for cell in column))
        for name, column in zip(COLUMNS, zip(*cells, strict=True), strict=True)
    }
    if "device ms" not in columns_of(rows):
        del widths["device ms"]
    gone = []
    for name in EXPENDABLE:
        if sum(widths.values()) + GAP * (len(widths) - 1) <= width:
            break
        if name not in widths:
            continue
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


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns that say something of these rows: the time on a GPU only if one was used."""
    used = any(row.device_ns is not None for row in rows)
    return tuple(name for name in COLUMNS if used or name != "device ms")


def cell_texts(label: str, row: Row) -> list[str]:
    """Write the cells of a row, in the order of `COLUMNS`, harmless and not yet styled."""
    output = "-" if row.dtype is None else f"{shape_text(row.shape)} {short_dtype(row.dtype)}"
    times = f" x{row.calls}" if row.calls > 1 else ""
    host, device = ("-" if ns is None else f"{ns / 1e6:.2f}" for ns in (row.host_ns, row.device_ns))
    return [
        escape(label) + times, escape(row.cls), output.replace(", ", ","),
        f"{row.parameters:,}" if row.parameters else "-", number_text(row.output_rms),
        number_text(row.grad_norm), number_text(row.update_ratio), host, device,
        escape(row.flag) or "-",
    ]  # fmt: skip


def _cells(label: str, row: Row) -> list[Text]:
    style = "bold red" if row.flag else ""
    styles = [style if name in ("module", "worst") else "" for name in COLUMNS]
    return [Text(cell, style) for cell, style in zip(cell_texts(label, row), styles, strict=True)]
