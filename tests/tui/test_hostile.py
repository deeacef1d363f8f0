"""Strings of a log are data: on no surface are they markup, an action or a terminal escape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from textual.widgets import Static

from tensortrace.log import encode
from tensortrace.records import (
    Action,
    Call,
    ChainLink,
    End,
    Failure,
    Line,
    Location,
    Module,
    ModuleColumns,
    Optimizer,
    Param,
    Record,
    Source,
    Step,
    Variable,
)
from tensortrace.run import Run, open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.panes import Pane
from tensortrace.tui.tabs import TABS
from tensortrace.tui.views import NAMES
from tests.builders import make_header, make_tensor, write_log
from tests.tui.samples import make_finding
from tests.tui.screen import settle, text_of

# Terminal controls, closed and unterminated; C1; bidirectional; markup that crashes or acts.
PAYLOADS = [
    "\x1b]52;c;cHduZWQ=\x07",
    "\x1b]52;c;cHduZWQ=",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[31m",
    "\x1bPq#0\x1b\\",
    "\x9b31m\x9d0;t\x9c",
    "bell\x07 back\x08 return\r line\n feed\x0b",
    "tab\there",
    "\u202egpj.exe\u2066",
    "zero\u200bwidth\ufeff",
    "nul\x00del\x7f",
    "[/foo]",
    "[@click=app.quit]here[/]",
    "[type=x, v={'a[0]'}]",
    "[bold",
    "漢字" * 30,
    "long" * 500,
]
FORBIDDEN = set(map(chr, [*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x200B, 0xFEFF])) - {"\n"}


def hostile_records(text: str) -> Iterator[Record]:
    """A run in which every string is the payload."""
    place = Location(text, 3, text, text)
    tensor = make_tensor(1, 2, dtype=text, device=text, grad_fn=text, unmeasured=text)
    yield make_header(argv=[text], run_id=text)
    yield Module(step=0, path=text, cls=text, alias=text, forward=place)
    yield Source(step=0, file=text, name=text, first_line=2, text=f"{text}\n{text}\n{text}")
    yield Call(step=0, seq=1, module=text, location=place, autocast=text, exception=text,
               inputs=[(text, 1)], outputs=[(text, 1)], tensors=[tensor])  # fmt: skip
    yield Call(step=0, seq=2, parent=1, module=text, op=text, location=place, inputs=[(text, 1)],
               arguments={text: text}, node=text)  # fmt: skip
    yield Action(step=0, seq=3, action="tracer_error", of=text, detail={text: text}, location=place)
    yield Action(step=0, seq=4, action="loss", detail={"value": text})
    yield Call(step=0, seq=5, phase="backward", forward=1, module=text, inputs=[(text, 1)])
    yield Optimizer(step=0, seq=6, index=0, cls=text, location=place)
    yield Param(step=0, seq=7, optimizer=0, name=text, module=text, value=tensor, grad=tensor)
    yield Line(step=0, seq=8, location=place, changed=[Variable(text, text, text)])
    yield make_finding(
        0, 1, code=text, check=text, module=text, op=text, param=text, message=text,
        explanation=text, fix=text, location=place, evidence={"placed": text},
        chain=[ChainLink(1, 1, text, place), ChainLink(2, 1, text, place)],
    )  # fmt: skip
    columns = ModuleColumns(path=[text], output_rms=[1.0], grad_rms=[0.1], flags=[text])
    yield Step(step=0, seq=9, loss=1.0, repeats={text: 2}, modules=columns)
    yield End(step=0, why="exception", failure=Failure(text, text, text, place))


def hostile_run(folder: Path, text: str) -> Run:
    return open_run(write_log(folder / "log.jsonl", hostile_records(text)))


# Together they are as bad as one by one, and a screen takes long; the last of each is at the end of
# its string, where an unterminated sequence stays open.
GROUPS = ["".join(PAYLOADS[at::6]) for at in range(6)]
ALL = "".join(payload for payload in PAYLOADS if len(payload) < 50)


@pytest.mark.parametrize("payload", GROUPS, ids=range(len(GROUPS)))
async def test_no_surface_obeys_a_string_of_the_log(tmp_path: Path, payload: str) -> None:
    app = Viewer(hostile_run(tmp_path, payload))
    async with app.run_test(size=(160, 45), notifications=True) as pilot:
        app.tell(payload)
        seen = []
        walk = ["c", "j", "escape", "plus", "o", "escape", "b", "i"]
        for key in ["g", *walk, "g", *["j"] * 9, "enter", "tab", "tab", "s", "escape"]:
            await pilot.press(key)
            await settle(app, pilot)
            seen.append(text_of(app))
        await pilot.press("slash", *"zebra", "enter")
        await settle(app, pilot)
        seen.append(text_of(app))
        titles = [str(app.pane(n).border_title) for n in ("calls", "findings", "detail", "source")]
        svg = app.export_screenshot()
        assert not app._exit
    assert not FORBIDDEN & set("".join([*seen, *titles]))
    assert not FORBIDDEN & set(svg)


@pytest.mark.parametrize("view", NAMES[1:])
async def test_no_view_obeys_a_string_of_the_log(tmp_path: Path, view: str) -> None:
    app = Viewer(hostile_run(tmp_path, ALL), step=0)
    seen = []
    async with app.run_test(size=(160, 45), notifications=True) as pilot:
        await settle(app, pilot)
        app.stand.go_to_seq(0, 1)
        for key in (str(TABS.index(view) + 1), "j", "l", "m"):
            await pilot.press(key)
            await settle(app, pilot)
            seen.append(text_of(app))
        await pilot.press("escape", "y")
        await settle(app, pilot)
        panes = app.screen_stack[0].query(Pane)
        seen += [str(pane.border_title) for pane in panes]
        seen += [line for pane in panes for line in pane.texts(160, 100)]
        seen.append(app.export_screenshot())
        assert not app._exit
    assert not FORBIDDEN & set("".join(seen))


@pytest.mark.parametrize("text", ["", "TT"])
async def test_no_palette_obeys_a_string_of_the_log(tmp_path: Path, text: str) -> None:
    app = Viewer(hostile_run(tmp_path, f"TT{ALL}"), step=0)
    async with app.run_test(size=(160, 45), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("ctrl+p", *text)
        await pilot.pause(0.2)
        await settle(app, pilot)
        assert not FORBIDDEN & set(text_of(app))
        assert not FORBIDDEN & set(app.export_screenshot())
        assert not app._exit


async def test_a_click_on_markup_of_the_log_runs_no_action(tmp_path: Path) -> None:
    app = Viewer(hostile_run(tmp_path, "[@click=app.quit]here[/]"))
    async with app.run_test(size=(160, 45), notifications=True) as pilot:
        await settle(app, pilot)
        for y in range(2, 44, 2):
            await pilot.click(offset=(50, y))
        assert not app._exit


def test_only_our_own_text_reaches_a_widget_that_reads_markup() -> None:
    folder = Path(__file__).parents[2] / "tensortrace" / "tui"
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "from_markup" not in text, path
        assert "Static(" not in text, path
        assert text.count("notify(") == text.count("markup=False"), path
    assert Static  # the name that is looked for exists


@pytest.mark.parametrize("cut", range(0, 4000, 331))
async def test_a_log_cut_anywhere_is_shown(tmp_path: Path, cut: int) -> None:
    whole = b"".join(map(encode, hostile_records("[/x]\x1b")))
    first = whole.index(b"\n") + 1
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole[: first + cut])
    app = Viewer(open_run(path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        assert "Step 0" in text_of(app) or "No step yet" in text_of(app)


@pytest.mark.parametrize("seed", range(8))
async def test_flipped_bytes_are_shown(tmp_path: Path, seed: int) -> None:
    import random

    whole = bytearray(b"".join(map(encode, hostile_records("a"))))
    chance = random.Random(seed)
    for _ in range(40):
        whole[chance.randrange(whole.index(b"\n") + 1, len(whole))] = chance.randrange(256)
    path = tmp_path / "log.jsonl"
    path.write_bytes(bytes(whole))
    app = Viewer(open_run(path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        for key in "jjjjjjjjj":
            await pilot.press(key)
        await settle(app, pilot)
        assert not FORBIDDEN & set(text_of(app))
