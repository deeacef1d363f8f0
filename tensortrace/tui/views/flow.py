"""The view of the data flow: what made the inputs of a call above it, what uses its outputs below.

Where the call is on the way of a NaN or infinity the way is drawn over it, from the call that made
the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.worker import get_current_worker

from tensortrace.records import Call, Line, Param, Record, Tensor
from tensortrace.text import escape, module_text, number_text, shape_text, short_dtype
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.panes import Pane
from tensortrace.tui.step import flow
from tensortrace.tui.step.cells import RAISED, full_name, health, short_place
from tensortrace.tui.step.flow import Flow, Link, Way
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import Styled, clip, clip_path, fit
from tensortrace.tui.views.view import View

# How far the way of a non-finite value is followed back.
FARTHEST = 40
# Cells of the column of shapes, at most; of the title beside the name and what is told.
SHAPES, TITLE_BESIDE = 20, 14


@dataclass(frozen=True, slots=True)
class Item:
    """A line: a heading, or a record that one can go to, with the tensor that leads there."""

    text: str = ""
    record: Record | None = None
    label: str = ""
    tensor: Tensor | None = None
    part: str = ""


class FlowView(View):
    """Producers, the call, consumers; walked with the cursor and with `i`, `o`, `b`."""

    NAME = "flow"
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("flow")

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Item] = []
        # Cells of the column of shapes; the names take what it leaves.
        self.shapes = SHAPES
        self.asked: tuple[object, object] | None = None

    def compose(self) -> ComposeResult:
        """One list."""
        yield Pane("flow-list", "Flow")

    def draw(self) -> None:
        """Ask in a thread what belongs to the row, unless it is shown already."""
        rows, row = self.viewer.rows, self.viewer.row
        if row is None or row.record is None:
            self.asked, self.items = None, [Item("this row has no record")]
            self.draw_items("Flow")
            return
        if self.asked is not None and self.asked[0] is rows and self.asked[1] == row.record:
            self.draw_items(None)
            return
        self.asked = (rows, row.record)
        self.main.set_title(self.title_of(row, "looking"))
        self.work(lambda: self.ask(rows, row))

    def ask(self, rows: StepRows, row: Row) -> None:
        """Look through the lines of the step; runs in a thread."""
        worker = get_current_worker()
        asked = Flow(rows.step, lambda: worker.is_cancelled)
        items = items_of(row, asked)
        if not worker.is_cancelled:
            self.viewer.from_thread(self.took, (rows, row.record), items)

    def took(self, asked: tuple[object, object], items: list[Item]) -> None:
        """Show the answer, unless the user has gone on."""
        if self.asked is not None and self.asked[0] is asked[0] and self.asked[1] == asked[1]:
            self.items = items
            at = next((i for i, item in enumerate(items) if item.part == "here"), 0)
            self.main.cursor = at
            row = self.viewer.row
            self.draw_items(self.title_of(row, f"step {self.viewer.number}"))

    def title_of(self, row: Row | None, told: str) -> str:
        """Name the row in the width of the pane."""
        name = full_name(row.record, self.viewer.modules) if row is not None else ""
        room = (self.main.size.width or self.viewer.size.width - 2) - len(told) - TITLE_BESIDE
        return f"Flow of {clip_path(name, max(8, room), self.viewer.glyphs)}, {told}"

    def draw_items(self, title: str | None) -> None:
        """Draw the list."""
        if title is not None:
            self.main.set_title(title)
        tensors = [item.tensor for item in self.items if item.tensor is not None]
        self.shapes = min(
            SHAPES, max((cell_len(shape_and_type(t)) + 2 for t in tensors), default=1)
        )
        self.main.show(len(self.items), self.item_line, self.main.cursor or 0)

    def item_line(self, at: int, part: int, width: int, here: bool) -> Styled:
        """Write a line: what leads there, the call, its tensor, how that is."""
        item, glyphs = self.items[at], self.viewer.glyphs
        sign = glyphs.cursor if here else " "
        if item.record is None:
            return [
                (sign, ""),
                (clip(item.text, width - 1, glyphs), "section" if item.part else "faint"),
            ]
        word, style = health(item.tensor)
        record = item.record
        if isinstance(record, Call) and record.exception is not None:
            word, style = RAISED
        name = full_name(record, self.viewer.modules)
        seq = getattr(record, "seq", None)
        here_too = item.part == "here"
        mark = fit(glyphs.arrow if here_too or item.part == "path" else "", 3, glyphs)
        tensor = item.tensor
        shape = "" if tensor is None else shape_and_type(tensor)
        numbers = ""
        if tensor is not None and width >= 96:
            numbers = f"mean {number_text(tensor.mean)} std {number_text(tensor.std)}"
        place = short_place(getattr(record, "location", None)) if width >= 120 else ""
        rest = 34 + self.shapes + 30 * bool(numbers) + 24 * bool(place)
        room = max(10, width - rest)
        if isinstance(record, Call) and record.op and record.module:
            where = module_text(record.module)
            name += f"  in {clip_path(where, max(8, room - cell_len(name) - 5), glyphs)}"
        line: Styled = [
            (sign, ""),
            (mark, "error" if style == "error" else "ok"),
            (fit(escape(item.label)[:40], 11, glyphs) + " ", "faint"),
            (fit(f"#{seq}", 6, glyphs), "faint"),
            (fit(clip_path(name, room, glyphs), room) + " ", "strong" if here_too else "op"),
            (fit(shape, self.shapes, glyphs), ""),
        ]
        if numbers:
            line.append((fit(numbers, 30, glyphs), ""))
        if place:
            line.append((fit(place, 24, glyphs), "faint"))
        return [*line, (" " + word, style)]

    # ---- keys

    def open(self, pane: Pane, at: int) -> None:
        """Make the call under the cursor the one in the middle; on that one, go to its row."""
        item = self.items[at] if at < len(self.items) else None
        seq = getattr(item.record, "seq", None) if item is not None else None
        if item is None or seq is None:
            return
        if item.part == "here":
            self.viewer.stand.remember()
            self.viewer.show_view("step")
            return
        self.viewer.stand.remember()
        self.viewer.stand.go_to_seq(self.viewer.number, seq)


def shape_and_type(tensor: Tensor) -> str:
    """Write what a tensor is: ``[8, 64] f32``."""
    return f"{shape_text(tensor.shape)} {short_dtype(tensor.dtype)}"


def items_of(row: Row, asked: Flow) -> list[Item]:
    """Everything that the view shows for a row."""
    record = row.record
    items = bad_path(record, asked)
    if items:
        items.insert(0, Item("where the NaN or infinity comes from", part="head"))
    items += way_items("comes from", flow.sources(record, asked), record, True, asked)
    items.append(Item("this row", part="head"))
    items.append(Item(record=record, tensor=made_by(record, described(record, asked)), part="here"))
    items += way_items("goes to", flow.uses(record, asked), record, False, asked)
    title = "is the gradient of" if getattr(record, "phase", "") == "backward" else "its gradient"
    return items + way_items(title, flow.counterparts(record, asked), record, False, asked)


def way_items(
    title: str, way: Way, record: Record | None, incoming: bool, asked: Flow
) -> list[Item]:
    """A heading, and a line for each record that one can go to."""
    items = [Item(title, part="head")]
    for link in way.links:
        tensor = tensor_of(link, record, incoming, asked)
        items.append(Item(record=link.record, label=link.label, tensor=tensor, part="link"))
    if way.why or not way.links:
        items.append(Item("  " + (way.why or "nothing")))
    return items


def described(record: Record | None, asked: Flow) -> dict[int, Tensor]:
    """The tensors that a record names, by id."""
    ids = [
        number for _, number in [*getattr(record, "inputs", []), *getattr(record, "outputs", [])]
    ]
    return descriptions(asked, ids)


def descriptions(asked: Flow, ids: list[int]) -> dict[int, Tensor]:
    """The tensors of some ids, as the step describes them."""
    found: dict[int, Tensor] = {}
    wanted = set(ids)
    for record in asked.about(wanted) if wanted else []:
        held: list[Tensor | None] = []
        if isinstance(record, Call):
            held = [*record.tensors]
        elif isinstance(record, Param):
            held = [record.value, record.grad]
        elif isinstance(record, Line):
            held = [*record.tensors]
        found.update((t.id, t) for t in held if t is not None and t.id in wanted)
    return found


def made_by(record: Record | None, tensors: dict[int, Tensor]) -> Tensor | None:
    """The worst tensor that a record made; of a gradient call what arrived."""
    if isinstance(record, Param):
        return record.value
    if not isinstance(record, Call):
        return None
    names = [*record.outputs]  # what it was given it did not make
    if record.phase == "backward":
        names = [*record.inputs, *record.outputs]
    held = [tensors[number] for _, number in names if number in tensors]
    first = len(record.outputs) if record.phase != "backward" else len(names)
    return next((t for t in held[:first] if t.nonfinite), held[0] if held else None)


def tensor_of(link: Link, record: Record | None, incoming: bool, asked: Flow) -> Tensor | None:
    """The tensor that a link goes along: what it made of our inputs, or ours that it uses."""
    other = link.record
    if incoming:
        return made_by(other, described(other, asked))
    ours = {number for _, number in getattr(record, "outputs", [])}
    theirs = [number for _, number in getattr(other, "inputs", []) if number in ours]
    if theirs:
        return descriptions(asked, theirs).get(theirs[0])
    return made_by(other, described(other, asked))


def is_bad(record: Record | None, asked: Flow) -> bool:
    """Whether a call made something that is not finite."""
    if not isinstance(record, Call):
        return False
    made = record.inputs if record.phase == "backward" else record.outputs
    held = descriptions(asked, [number for _, number in made])
    return any(tensor.nonfinite for tensor in held.values())


def bad_path(record: Record | None, asked: Flow) -> list[Item]:
    """The calls that handed a NaN or infinity on to a row, the one that made it first."""
    if not is_bad(record, asked):
        return []
    path: list[Item] = []
    seen: set[int | None] = set()
    while isinstance(record, Call) and record.seq not in seen and len(path) < FARTHEST:
        seen.add(record.seq)
        tensors = described(record, asked)
        path.append(Item(record=record, tensor=made_by(record, tensors), part="path"))
        inner = flow.inner_maker(record, asked)
        before: list[Record] = [] if inner is None else [inner]
        before += [link.record for link in flow.sources(record, asked).links]
        record = next((other for other in before if is_bad(other, asked)), None)
    return path[::-1] if len(path) > 1 else []
