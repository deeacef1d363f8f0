"""The pane of variables: what they are at a line, those that it changed first.

Pure: it takes the executed lines and a width and gives styled lines; every string is escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensortrace.records import Finding, Tensor
from tensortrace.text import SEVERITY_SIGN, escape, number_text, shape_text, short_dtype, shorten
from tensortrace.tui.step.cells import health
from tensortrace.tui.step.detail import wrap
from tensortrace.tui.terminal.styled import (
    UNICODE,
    Glyphs,
    Styled,
    clip,
    fit,
    wrapped,
)
from tensortrace.tui.views.executed import Executed, Value

LONGEST = 500
# What is wrong at a line takes no more lines of the pane than this.
MOST_TOLD = 3


@dataclass(frozen=True, slots=True)
class Item:
    """A line of the pane: a variable, or a text with a style."""

    value: Value | None = None
    text: str = ""
    style: str = ""


def items_at(executed: Executed, at: int, findings: Sequence[Finding], width: int) -> list[Item]:
    """List what there is to tell at a line: what is wrong, its value, then the variables.

    Args:
        findings: those of this line and step.
    """
    line = executed.lines[at]
    items: list[Item] = []
    for finding in findings:
        head = f"{SEVERITY_SIGN[finding.severity]} {escape(shorten(finding.code, 40))} "
        told = wrap(head, finding.message[:LONGEST], width)[:MOST_TOLD]
        items += [Item(text=text, style=finding.severity) for text in told]
    if "nonfinite" in line.flags:
        items.append(Item(text="x the first NaN or infinity of this step", style="error"))
    if "broadcast" in line.flags:
        items.append(Item(text="! shapes were broadcast", style="warning"))
    if line.value is not None and line.what == "exception":
        told = wrap("x raised ", line.value.text[:LONGEST], width)[:MOST_TOLD]
        items += [Item(text=text, style="error") for text in told]
    elif line.value is not None:
        ids: list[tuple[str, int | None]] = [*line.value.tensors]
        for place, id in ids or [("", None)]:
            name = f"{line.value.name}{place}"
            items.append(Item(Value(name, line.value.text, None, id, None, True, at)))
    if line.passed_over:
        items.append(Item(text=f"{line.passed_over} executions before it were not recorded"))
    items += [Item(value) for value in executed.variables(at)]
    return items


def item_line(
    item: Item, executed: Executed, names: int, width: int, glyphs: Glyphs = UNICODE
) -> Styled:
    """Write one line of the pane.

    Args:
        names: columns for the names.
    """
    value = item.value
    if value is None:
        return [(clip(item.text, width, glyphs), item.style)]
    mark: tuple[str, str] = ("* ", "warning") if value.changed else ("  ", "")
    if value.stale:  # as it was before executions that were passed over
        mark = ("~ ", "faint")
    name = fit(escape(shorten(value.name, 200)), names, glyphs)
    line: Styled = [mark, (name + " ", "strong" if value.changed else "op")]
    tensor = executed.tensors.get(value.tensor) if value.tensor is not None else None
    room = max(0, width - names - 3)
    if tensor is None:
        return [*line, (clip(value_text(value, glyphs), room, glyphs), "")]
    before = executed.tensors.get(value.before) if value.before is not None else None
    told = tensor_text(tensor, before, glyphs)
    word, style = health(tensor)
    more = numbers_text(tensor)
    line.append((clip(told, room, glyphs), ""))
    left = room - len(told) - 2 - len(word)
    if left >= 0:
        line.append((f"  {word}", style))
    if left - 2 >= len(more):
        line.append((f"  {more}", "faint"))
    return line


def whole_item(
    item: Item, executed: Executed, names: int, width: int, glyphs: Glyphs = UNICODE
) -> list[Styled]:
    """Write one line of the pane as `item_line` does, on as many lines as all of it takes."""
    first, value = item_line(item, executed, names, width, glyphs), item.value
    if value is None or executed.tensors.get(-1 if value.tensor is None else value.tensor):
        return [first]
    room = max(1, width - names - 3)
    texts = wrapped([(value_text(value, glyphs), "")], room)
    before: list[Styled] = [first[:-1], *([(" " * (names + 3), "")] for _ in texts[1:])]
    return [[*head, *text] for head, text in zip(before, texts, strict=True)]


def value_text(value: Value, glyphs: Glyphs = UNICODE) -> str:
    """Write what a variable is that is no tensor, and what it was."""
    text = escape(shorten(value.text, LONGEST))
    if value.changed and value.was is not None and value.was != value.text:
        return f"{escape(shorten(value.was, LONGEST))} {glyphs.arrow} {text}"
    return text


def tensor_text(tensor: Tensor, before: Tensor | None, glyphs: Glyphs = UNICODE) -> str:
    """Write what a tensor is, and what it was if that differs: ``[8, 128] → [8, 64] f32``."""
    kind = f"{shape_text(tensor.shape)} {short_dtype(tensor.dtype)}"
    if before is None:
        return kind
    was = f"{shape_text(before.shape)} {short_dtype(before.dtype)}"
    return kind if was == kind else f"{was} {glyphs.arrow} {kind}"


def numbers_text(tensor: Tensor) -> str:
    """Write the value of a tensor of one element, else where its values lie."""
    if tensor.numel == 1 and tensor.mean is not None:
        return f"= {number_text(tensor.mean)}"
    if tensor.min is None:
        return ""
    return f"{number_text(tensor.min)}..{number_text(tensor.max)} mean {number_text(tensor.mean)}"


def name_width(items: Sequence[Item], width: int) -> int:
    """Columns that the names get."""
    longest = max((len(escape(item.value.name)) for item in items if item.value), default=0)
    return max(4, min(longest, width // 3))
