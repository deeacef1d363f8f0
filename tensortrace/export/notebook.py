"""What a notebook shows of a trace: the page of its run, in a frame of its own."""

from __future__ import annotations

import html
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tensortrace.export.html import render_page
from tensortrace.export.markup import Html, joined, tag
from tensortrace.records import Finding
from tensortrace.run import open_run
from tensortrace.text import finding_text

# In pixels; the frame scrolls, and a corner of it can be dragged.
HEIGHT = 680


def show_run(log: Path) -> str:
    """Write the page of a log as a frame.

    The frame has its own document, so neither its style nor the notebook's reaches the other, and
    `sandbox` leaves it no script, form or window.

    Raises:
        LogError: the path is not a log.
    """
    with closing(open_run(log)) as run:
        page = render_page([run])
    # In a frame a link to a place on the page would load the notebook there instead.
    page = page.replace("<head>", '<head><base href="about:srcdoc">', 1)
    style = f"width:100%;height:{HEIGHT}px;border:1px solid #8888;resize:vertical"
    return tag("iframe", sandbox="", style=style, title=f"tensortrace: {log.name}",
               srcdoc=Html(html.escape(page)))  # fmt: skip


def show_reason(sentence: str, findings: Sequence[Finding] = ()) -> str:
    """Say why there is no page, and what was found all the same."""
    told = [finding_text(finding) for finding in findings if finding.severity != "note"]
    return joined([tag("p", sentence), [tag("pre", text) for text in told]])
