"""What made a call's inputs and what uses its outputs, as a list that is walked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from tensortrace.records import Action, Step
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tests.builders import make_call, make_header, make_tensor, write_log
from tests.tui.nets import make_op_run
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, text_of, told


async def at_seq(app: Viewer, pilot: Pilot[Any], seq: int) -> None:
    app.stand.go_to_seq(app.number, seq)
    await settle(app, pilot)
    await pilot.press("5")
    await settle(app, pilot)


def seqs(app: Viewer, part: str) -> list[int | None]:
    return [item.record.seq for item in app.view.items if item.part == part]


async def test_producers_stand_above_and_consumers_below(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path), step=0)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 5)
        assert seqs(app, "here") == [5]
        assert seqs(app, "link") == [3, 6, 13]
        titles = [item.text for item in app.view.items if item.part == "head"]
        assert titles == ["comes from", "this row", "goes to", "its gradient"]
        assert app.view.items[app.view.main.cursor].record.seq == 5


async def test_enter_i_and_o_walk_and_backspace_comes_back(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path), step=0)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 5)
        await pilot.press("o")
        await settle(app, pilot)
        assert (app.shown, seqs(app, "here")) == ("flow", [6])
        await pilot.press("i")
        await settle(app, pilot)
        assert seqs(app, "here") == [5]
        await pilot.press("k", "k", "enter")
        await settle(app, pilot)
        assert seqs(app, "here") == [3]
        await pilot.press("backspace")
        await settle(app, pilot)
        assert (app.shown, seqs(app, "here")) == ("flow", [5])
        await pilot.press("enter")
        await settle(app, pilot)
        assert (app.shown, app.row.seq) == ("step", 5)


async def test_the_way_of_a_nan_is_drawn_from_the_op_that_made_it(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 12)
        assert seqs(app, "path") == []
        await at_seq(app, pilot, 11)
        assert seqs(app, "path") == [10, 11]
        assert "where the NaN or infinity comes from" in text_of(app)


async def test_at_its_origin_there_is_no_way_to_draw(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path, bad=2), step=2)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 6)
        assert seqs(app, "path") == []
        assert "x inf" in text_of(app)


async def test_a_row_without_tensors_says_why_there_is_nothing(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("G", "5")
        await settle(app, pilot)
        assert "nothing goes into this row" in text_of(app)


async def test_a_call_that_raised_made_nothing(tmp_path: Path) -> None:
    given = make_tensor(1, 4, 7688)
    calls = [
        make_call(1, "flat", outputs=[("output", 1)], tensors=[given]),
        make_call(2, "linear", inputs=[("input[0]", 1)], exception="RuntimeError"),
    ]
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [make_header(), *calls])), step=0)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 2)
        lines = text_of(app).splitlines()
        here = lines[next(i for i, line in enumerate(lines) if "this row" in line) + 1]
        assert "7688" not in here
        assert here.rstrip("│ ").endswith("x raised")
        assert any("flat" in line and "[4, 7688]" in line for line in lines)


async def test_names_stand_whole_or_can_be_told_apart(tmp_path: Path) -> None:
    path = "hierarchical_backbone.stage_number_{}.residual_blocks.{}.normalisation_before"
    calls = [
        make_call(1, path.format(0, 1), outputs=[("output", 1)], tensors=[make_tensor(1, 8)]),
        make_call(2, path.format(1, 1), inputs=[("x", 1)], outputs=[("output", 2)],
                  tensors=[make_tensor(2, 8)]),
        make_call(3, "4", inputs=[("x", 2)], outputs=[("output", 3)], tensors=[make_tensor(3, 8)]),
        make_call(4, path.format(1, 12), inputs=[("x", 2)]),
    ]  # fmt: skip
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [make_header(), *calls])), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 2)
        lines = [line for line in text_of(app).splitlines() if "hie" in line]
        assert "Flow of hie" in lines[0]
        assert "…_1." in lines[0] or "1." in lines[0]
        assert [[part in line for part in ("0.", ".12.")] for line in lines[1:]] == [
            [True, False], [False, False], [False, True],
        ]  # fmt: skip
        assert "module 4" in text_of(app)
        await at_seq(app, pilot, 3)
        assert "Flow of module 4, step 0" in text_of(app)
        await pilot.press("1")
        await settle(app, pilot)
        assert "Detail: module 4" in text_of(app)


async def test_the_view_follows_to_another_step(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 7)
        await pilot.press("right_square_bracket")
        await settle(app, pilot)
        assert "Flow of mse_loss, step 1" in text_of(app)


async def test_the_way_of_a_nan_goes_on_into_a_replay(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path, level="module", bad=2), step=2)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 4)
        assert seqs(app, "path") == [42, 4]
        await at_seq(app, pilot, 1)
        assert seqs(app, "path") == [42, 4, 1]


async def test_o_leads_from_a_replayed_op_to_what_used_its_module(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path, level="module", bad=2), step=2)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        app.stand.go_to_seq(2, 42)
        await settle(app, pilot)
        await pilot.press("o")
        await settle(app, pilot)
        assert app.row.seq == 7


async def test_a_step_without_calls_says_that_they_were_not_kept(tmp_path: Path) -> None:
    loss = Action(step=0, seq=3, action="loss", tensor=9)
    thin = Step(step=0, seq=4, update=1, full=False, dropped=7)
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [loss, thin])), step=0)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await at_seq(app, pilot, 3)
        assert text_of(app).count("the calls of this step were not kept: ") == 2
        assert "outside" not in text_of(app) and "nothing in this step" not in text_of(app)
        await pilot.press("i")
        await settle(app, pilot)
        assert "the calls of this step were not kept: what made loss is not known" in told(app)
