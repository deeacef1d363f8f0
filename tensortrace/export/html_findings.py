"""The findings of the page, by cause: place, source, reason, evidence, chain, repair."""

from __future__ import annotations

from collections.abc import Sequence

from tensortrace.export import finding_words as words
from tensortrace.export.contents import Shown
from tensortrace.export.markup import Child, Html, joined, tag
from tensortrace.records import Location

# A run with more findings than this has a cause that the first ones tell.
MOST_FINDINGS = 200
# Nor is the page longer for what they say; of one finding so many links and lines are told.
MOST_NBYTES = 1_000_000
MOST_LINKS, MOST_LINES = 40, 40


def show_findings(shown: Sequence[Shown], *, ranks: bool) -> Html:
    """Lay out findings in the order given; `ranks` says that the run has several.

    Errors and warnings are open, notes are one line that opens.
    """
    parts: list[Html] = []
    nbytes = 0
    for number, one in enumerate(shown[:MOST_FINDINGS], 1):
        part = _show(number, one, ranks)
        nbytes += len(part.encode("utf-8", "backslashreplace"))
        if parts and nbytes > MOST_NBYTES:
            break
        parts.append(part)
    left_out = len(shown) - len(parts)
    if left_out > 0:
        parts.append(tag("p", f"{left_out} more are in the log: `tensortrace report` lists them."))
    return joined(parts)


def _show(number: int, one: Shown, ranks: bool) -> Html:
    finding, location = one.finding, one.finding.location
    title = joined([
        tag("span", str(number), class_="number"),
        tag("span", f"{finding.severity} {finding.code}", class_="severity"),
        f" {finding.check}: {finding.message}",
    ])  # fmt: skip
    rows: list[tuple[str, Child]] = [
        ("at", words.place(one, ranks=ranks)),
        ("source", _source(one, location)),
        ("called at", _source(one, location and location.caller)),
    ]
    rows += [("why", words.explanation(one)), ("evidence", _evidence(one)), ("chain", _chain(one))]
    rows += [("fix", finding.fix), ("again", words.again(one))]
    facts = tag(
        "dl", [[tag("dt", label), tag("dd", content)] for label, content in rows if content]
    )
    name = {"id": f"finding-{number}", "class_": f"finding {finding.severity}"}
    if finding.severity == "note":
        return tag("details", tag("summary", title), facts, **name)
    return tag("article", tag("h3", title), facts, **name)


def _source(one: Shown, location: Location | None) -> Child:
    if location is None:
        return None
    place = f"{words.place_text(one.run, location)} in {location.function}"
    lines = words.source_lines(one.run, location)
    digits = len(str(max((number for number, _ in lines), default=0)))
    shown = [
        tag("b" if number == location.line else "span",
            f"{'>' if number == location.line else ' '} {number:>{digits}} | {code}")
        for number, code in lines
    ]  # fmt: skip
    return [tag("code", place), tag("pre", shown) if shown else None]


def _evidence(one: Shown) -> Child:
    lines, profiles = words.evidence(one)
    pieces: list[Child] = [tag("p", line) for line in lines[:MOST_LINES]]
    for profile in profiles[:MOST_LINES]:
        cells: list[Html] = [tag("span", f"{profile.title} (bars: log scale)", class_="wide dim")]
        for i, (name, number, share) in enumerate(profile.rows):
            if profile.left_out and i == words.ENDS:
                cells.append(tag("span", f"({profile.left_out} more)", class_="wide dim"))
            bar = None if share is None else f"width:{2 + 98 * share:.1f}%"
            cells += [tag("code", name), tag("span", number, class_="right"),
                      tag("span", class_="bar" if bar else None, style=bar)]  # fmt: skip
        pieces.append(tag("div", cells, class_="profile"))
    return pieces or None


def _chain(one: Shown) -> Child:
    links = words.chain_links(one.run, one.finding.chain)
    items = [tag("li", tag("code", what), tag("pre", code) if code else None)
             for what, code in links[:MOST_LINKS]]  # fmt: skip
    if len(links) > MOST_LINKS:
        items.append(tag("li", f"and {len(links) - MOST_LINKS} more"))
    return tag("ol", items) if items else None
