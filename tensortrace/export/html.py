"""A run as one page that stands for itself: nothing is loaded, nothing runs, all is in the file.

It holds how the run went, the curves of loss and gradient norm, heat maps of the modules over
steps, the findings with their source, and the layer table. Its size does not grow with the run
beyond some 2 MB. All text of the log passes `markup`, and a Content-Security-Policy forbids
whatever a page could do beside showing text and drawings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from tensortrace.export.contents import Contents, tree_labels
from tensortrace.export.exporter import Exporter, Wanted, collect
from tensortrace.export.head import counts_text, head_lines
from tensortrace.export.html_curves import show_timeline
from tensortrace.export.html_findings import show_findings
from tensortrace.export.html_maps import show_maps
from tensortrace.export.html_style import STYLE
from tensortrace.export.layers_text import COLUMNS, cell_texts, columns_of
from tensortrace.export.markup import Html, joined, tag
from tensortrace.export.overview import look_over
from tensortrace.export.steps import overlap
from tensortrace.version import __version__

if TYPE_CHECKING:
    from tensortrace.run import Run

# A layer table of more rows is no reading; the CSV has them all.
MOST_LAYERS = 2000
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
BEGINNING = "<!doctype html>\n<!-- made by tensortrace"
# Names of columns that a phone has no room for.
_ROOMY = ("class", "params", "host ms")


def render_page(runs: Sequence[Run], wanted: Wanted | None = None) -> str:
    """Write the page of the logs of one run, one per rank.

    Args:
        runs: the logs, at least one; curves and maps are of the first.
        wanted: steps and modules; all by default.
    """
    wanted = wanted or Wanted()
    contents = collect(runs, wanted)
    body = [
        _head(contents),
        _overview(contents, wanted),
        tag("h2", "Findings, the cause first", id="findings"),
        show_findings(contents.shown, ranks=len(runs) > 1) or tag("p", "Nothing was found."),
        _layers(contents),
        tag("footer", f"Made by tensortrace {__version__} from {contents.runs[0].path.name}. "
            f"To walk the run step by step: tensortrace view {contents.runs[0].path.name}"),
    ]  # fmt: skip
    title = f"{_program(contents.runs[0])}: {counts_text(contents) or 'no findings'}"
    head = tag(
        "head", tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title), tag("style", Html(STYLE)),
    )  # fmt: skip
    page = tag("html", head, "\n", tag("body", body), "\n", lang="en")
    return f"{BEGINNING} {__version__} -->\n{page}\n"


def write_page(runs: Sequence[Run], wanted: Wanted, out: TextIO) -> None:
    """Write the page to a file."""
    out.write(render_page(runs, wanted))


EXPORTER = Exporter(
    suffix=".html",
    summary="one page: curves, heat maps, findings with source, layer table",
    write=write_page,
    beginnings=(BEGINNING,),
)


def _program(run: Run) -> str:
    """The command without the folder of the program, which the head has."""
    words = run.header.argv
    return " ".join([re.split(r"[\\/]", words[0])[-1], *words[1:]]) if words else "(interactive)"


def _head(contents: Contents) -> Html:
    """Say what ran and how it ended, and name the first finding."""
    facts: list[list[Html]] = []
    for run, found in zip(contents.runs, contents.found, strict=True):
        facts += [[tag("dt", label), tag("dd", text)]
                  for label, text in head_lines(run, found, first=not facts)]  # fmt: skip
    said = counts_text(contents)
    verdict = [tag("p", f"{said}." if said else "No findings.", class_="verdict")]
    if contents.shown and contents.shown[0].finding.severity != "note":
        first = contents.shown[0].finding
        link = tag("a", f"{first.code} {first.check}", href="#finding-1")
        verdict.append(tag("p", "Look here first: ", link, f" {first.message}"))
    links = (("timeline", "Timeline"), ("maps", "Modules over steps"), ("findings", "Findings"),
             ("layers", "Layers"))  # fmt: skip
    nav = tag("nav", [tag("a", name, href=f"#{id}") for id, name in links])
    return tag("header", tag("h1", _program(contents.runs[0])), verdict, tag("dl", facts), nav)


def _overview(contents: Contents, wanted: Wanted) -> Html:
    """Draw curves and maps of the first log."""
    run = contents.runs[0]
    steps = run.steps if wanted.steps is None else overlap(run.steps, wanted.steps)
    heads = [tag("h2", "Timeline", id="timeline"), tag("h2", "Modules over steps", id="maps")]
    if not steps:
        return joined([heads[0], tag("p", "The log holds no such step."), heads[1]])
    overview = look_over(run, steps, wanted.modules, wanted.tick)
    if not overview.closed:
        return joined([heads[0], tag("p", "No step of the log is closed yet."), heads[1]])
    rank = f"Rank {run.header.rank} of {len(contents.runs)}." if len(contents.runs) > 1 else None
    return joined([
        heads[0], tag("p", rank, class_="dim") if rank else None,
        show_timeline(overview, contents.shown), heads[1],
        show_maps(overview.maps, run.modules, contents.shown),
    ])  # fmt: skip


def _layers(contents: Contents) -> Html:
    """Lay out the layer table of one step."""
    if contents.step is None:
        return joined([tag("h2", "Layers", id="layers"),
                       tag("p", "No step of the log holds a module call.")])  # fmt: skip
    run, rows = contents.table_run, contents.rows
    rank = f" of rank {run.header.rank}" if len(contents.runs) > 1 else ""
    lacks = f"{contents.lacks[0].upper()}{contents.lacks[1:]}." if contents.lacks else ""
    left_out = len(rows) - MOST_LAYERS
    more = f"{left_out} more modules: the CSV has them all." if left_out > 0 else ""
    shown = columns_of(rows)
    left = [("left" if c in ("class", "output", "worst") else "")
            + (" roomy" if c in _ROOMY else "") for c in shown]  # fmt: skip
    head = tag("tr", [tag("th", c, class_=k.strip() or None)
                      for c, k in zip(shown, left, strict=True)])  # fmt: skip
    body = []
    tree = tree_labels(run.modules, [row.path for row in rows])
    for (depth, label), row in zip(tree[:MOST_LAYERS], rows[:MOST_LAYERS], strict=True):
        written = zip(COLUMNS, cell_texts("  " * depth + label, row), strict=True)
        cells = [text for name, text in written if name in shown]
        body.append(tag("tr", [tag("td", cell, class_=k.strip() or None)
                               for cell, k in zip(cells, left, strict=True)],
                        class_="flagged" if row.flag else None))  # fmt: skip
    return joined([
        tag("h2", f"Layers in step {contents.step}{rank}", id="layers"),
        [tag("p", text, class_="dim") for text in (lacks, more) if text],
        tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll"),
    ])  # fmt: skip
