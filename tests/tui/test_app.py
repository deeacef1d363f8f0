"""The viewer by its keys: where each of them leads."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from tensortrace.log import encode
from tensortrace.records import Call, End, Finding, Step
from tensortrace.run import open_run
from tensortrace.tui.ahead import Ahead
from tensortrace.tui.app import Viewer
from tensortrace.tui.bindings import KEYS
from tensortrace.tui.dialogs.screens import Prompt
from tensortrace.tui.views import NAMES
from tests.builders import write_log
from tests.tui.samples import BAD_STEP, make_finding, make_log, make_open_run, records
from tests.tui.screen import settle, text_of, told, until

Opened = AbstractAsyncContextManager[tuple[Viewer, Pilot[Any]]]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Opened]:
    @asynccontextmanager
    async def open_it(
        size: tuple[int, int] = (120, 40), step: int | None = None, **sample: Any
    ) -> AsyncIterator[tuple[Viewer, Pilot[Any]]]:
        app = Viewer(make_open_run(tmp_path, **sample), step)
        async with app.run_test(size=size, notifications=True) as pilot:
            await settle(app, pilot)
            yield app, pilot

    return open_it


async def test_it_opens_at_the_first_error_with_its_row_selected(opened: Any) -> None:
    async with opened() as (app, _):
        assert app.number == BAD_STEP
        assert app.row.seq == 10
        assert "log makes 12 of 640 elements -inf" in text_of(app)
        assert "use log_softmax" in text_of(app)


async def test_a_run_without_errors_opens_at_its_first_warning(opened: Any) -> None:
    async with opened(bad=None) as (app, _):
        assert app.number == 3
        assert app.row.record.name == "blocks.0.mlp.weight"


async def test_a_run_without_findings_opens_at_its_first_step(tmp_path: Path) -> None:
    kept = [r for r in records(4, None) if not isinstance(r, Finding)]
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", kept)))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        assert (app.number, app.pane("calls").cursor) == (0, 0)


async def test_a_step_that_was_asked_for_goes_before_the_first_error(opened: Any) -> None:
    async with opened(step=2) as (app, _):
        assert app.number == 2


async def test_the_rows_walk_forward_loss_backward_optimizer(opened: Any) -> None:
    async with opened(step=0) as (app, _):
        sections = list(dict.fromkeys(row.section for row in app.rows))
        assert sections == ["forward", "loss", "backward", "optimizer", "step"]


async def test_brackets_walk_the_steps_and_stay_at_the_same_place(opened: Any) -> None:
    async with opened(step=2) as (app, pilot):
        await pilot.press("j", "j", "j", "right_square_bracket")
        assert (app.number, app.row.record.module) == (3, "stem.conv")
        await pilot.press("left_square_bracket", "left_square_bracket")
        assert (app.number, app.row.record.module) == (1, "stem.conv")


async def test_steps_end_at_both_ends_of_the_run(opened: Any) -> None:
    async with opened(step=9) as (app, pilot):
        await pilot.press("right_square_bracket")
        assert app.number == 9
        await pilot.press("colon", *"0", "enter", "left_square_bracket")
        assert app.number == 0


async def test_e_walks_the_findings_and_w_only_the_warnings(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        await pilot.press("e")
        assert (app.number, app.row.record.name) == (3, "blocks.0.mlp.weight")
        await pilot.press("e")
        assert (app.number, app.row.seq) == (BAD_STEP, 10)
        await pilot.press("e")
        assert (app.number, app.row.seq) == (BAD_STEP, 10)
        assert "no next finding" in text_of(app)
        await pilot.press("W")
        assert app.number == 3
        await pilot.press("E")
        assert "no previous finding" in text_of(app)


async def test_colon_goes_to_a_step_and_refuses_what_is_no_number(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        await pilot.press("colon", *"step 6", "enter")
        assert app.number == 6
        await pilot.press("colon", *"abc", "enter")
        await pilot.pause()
        assert app.number == 6
        assert "abc is not a step number" in text_of(app)
        await pilot.press("colon", *"99", "enter")
        assert app.number == 9


async def test_escape_in_the_prompt_gives_the_focus_back(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("colon", "5", "escape")
        assert app.number == BAD_STEP
        assert app.focused is app.pane("calls")


@pytest.mark.parametrize("leave", ["escape", "enter"])
async def test_a_question_asked_before_the_last_was_done_with_stays(
    opened: Any, leave: str
) -> None:
    async with opened() as (app, pilot):
        await pilot.press("colon", "5")
        for key in (leave, "colon", "3"):  # as fast as a terminal may send them
            app.simulate_key(key)
        await settle(app, pilot)
        prompt = app.query_one(Prompt)
        assert prompt.display
        assert (prompt.has_focus, prompt.value) == (True, ":3")


@pytest.mark.parametrize("keys", [["ctrl+u"], ["home", "delete", "ctrl+k"], ["backspace"] * 60])
async def test_rubbing_out_what_is_typed_leaves_the_prompt_open(
    opened: Any, keys: list[str]
) -> None:
    async with opened(size=(80, 24)) as (app, pilot):
        for key, sign in (("slash", "/"), ("x", ">")):
            await pilot.press(key, "a", *keys, "q", "/", "j")
            await pilot.pause()
            assert text_of(app).splitlines()[-1].split() == [f"{sign}q/j"]
            await pilot.press("escape")
            await pilot.pause()
            assert app.focused is app.pane("calls")
            assert "Search" in text_of(app).splitlines()[-1]


async def test_the_sign_of_the_prompt_alone_can_not_be_rubbed_out(opened: Any) -> None:
    async with opened(size=(80, 24)) as (app, pilot):
        await pilot.press("slash", *"a/b", "home", "delete")
        await pilot.pause()
        assert text_of(app).splitlines()[-1].split() == ["/a/b"]
        await pilot.press("home", "c")
        await pilot.pause()
        assert text_of(app).splitlines()[-1].split() == ["/ca/b"]


async def test_a_search_runs_through_the_log_and_round_its_end(opened: Any) -> None:
    async with opened(step=8, bad=None) as (app, pilot):
        await pilot.press("slash", *"blocks.0.mlp", "enter")
        await settle(app, pilot)
        assert (app.number, app.row.record.module) == (8, "blocks.0.mlp")
        seen = []
        for _ in range(4):
            await pilot.press("n")
            await settle(app, pilot)
            seen.append((app.number, app.row.seq))
        assert seen == [(8, 14), (8, 21), (9, 7), (9, 14)]
        await pilot.press("N")
        await settle(app, pilot)
        assert (app.number, app.row.seq) == (9, 7)


async def test_a_search_without_a_hit_says_so(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("slash", *"zebra", "enter")
        await settle(app, pilot)
        assert "zebra: nowhere in this log" in text_of(app)


async def test_a_search_for_a_place_goes_to_the_call_that_it_made(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        await pilot.press("slash", *"train.py:13", "enter")
        await settle(app, pilot)
        assert app.row.record.location.line == 13


async def test_a_search_without_a_hit_says_that_the_source_has_the_text(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("slash", *"loader, optimizer", "enter")
        await settle(app, pilot)
        (told,) = (note.message for note in app._notifications)
        assert told == (
            "loader, optimizer: nowhere in this log but in the source, train.py:10, of which no "
            "call was recorded"
        )


async def test_a_search_finds_a_class_and_shows_its_first_call(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        await pilot.press("slash", *"layernorm", "enter")
        await settle(app, pilot)
        assert app.row.record.module == "blocks.0.norm"


@pytest.mark.parametrize("term", ["blocks.0.norm", "log"])
async def test_each_hit_of_a_search_is_another_row(opened: Any, term: str) -> None:
    # A module is shown by its first call, a finding by the row of its call.
    async with opened(step=BAD_STEP) as (app, pilot):
        await pilot.press("slash", *term, "enter")
        await settle(app, pilot)
        seen = [(app.number, app.row.seq)]
        for key in "n" * 12 + "N" * 12:
            await pilot.press(key)
            await settle(app, pilot)
            seen.append((app.number, app.row.seq))
        assert all(one != other for one, other in itertools.pairwise(seen)), seen


async def test_the_only_hit_of_a_search_is_found_again(opened: Any) -> None:
    async with opened(step=3) as (app, pilot):
        for _ in range(2):
            await pilot.press("slash", *"nonfinite-forward", "enter")
            await settle(app, pilot)
            assert (app.number, app.row.seq) == (BAD_STEP, 10)
        assert "went round the end" in told(app)


async def test_enter_gives_the_detail_the_focus_and_escape_takes_it_back(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("enter")
        assert app.focused is app.pane("detail")
        await pilot.press("escape")
        assert app.focused is app.pane("calls")


async def test_tab_goes_round_the_visible_panes(opened: Any) -> None:
    async with opened(size=(160, 40)) as (app, pilot):
        seen = []
        for _ in range(4):
            await pilot.press("tab")
            seen.append(app.focused.id)
        assert seen == ["detail", "source", "findings", "calls"]
        await pilot.press("shift+tab")
        assert app.focused.id == "findings"


async def test_s_shows_and_hides_the_source_with_its_line_marked(opened: Any) -> None:
    async with opened(size=(80, 24)) as (app, pilot):
        assert not app.pane("source").display
        await pilot.press("s")
        await pilot.pause()
        assert "▶   14     " in text_of(app).replace("\n", " ")
        await pilot.press("s")
        assert not app.pane("source").display


async def test_z_shows_one_pane_alone(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("z")
        assert [p for p in ("findings", "calls", "detail") if app.pane(p).display] == ["calls"]
        await pilot.press("escape")
        assert app.pane("detail").display


async def test_y_copies_the_record_as_a_line_of_the_log(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("y")
        assert app.clipboard.encode() == encode(app.row.record).strip()


async def test_help_lists_every_key_and_closes(opened: Any) -> None:
    async with opened(size=(100, 200)) as (app, pilot):
        await pilot.press("question_mark")
        text = text_of(app)
        assert all(key.shown in text and key.help in text for key in KEYS)
        assert "Only in timeline, layers" in text
        await pilot.press("q")
        assert len(app.screen_stack) == 1
        await pilot.press("f1", "escape")
        assert len(app.screen_stack) == 1


async def test_q_quits(opened: Any) -> None:
    async with opened() as (app, pilot):
        await pilot.press("q")
        assert app._exit


async def test_the_palette_offers_the_commands_by_name(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        await pilot.press("ctrl+p", *"last line")
        await pilot.pause()
        await app.workers.wait_for_complete()
        await pilot.press("enter")
        await settle(app, pilot)
        assert app.pane("calls").cursor == len(app.rows) - 1


async def test_a_click_selects_a_row_a_step_and_a_finding(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        await pilot.click("#calls", offset=(10, 4))
        assert app.pane("calls").cursor == 2
        await pilot.click("#findings", offset=(5, 5))
        await pilot.click("#findings", offset=(5, 5))
        await pilot.pause()
        assert app.number == BAD_STEP


async def test_a_click_on_the_timeline_goes_to_its_step(opened: Any) -> None:
    async with opened(step=0) as (app, pilot):
        strip = app.query_one("#timeline")
        await pilot.click(strip, offset=(1 + (4 - strip.shown.start) * strip.wide, 0))
        await pilot.pause()
        assert app.number == 4


async def test_a_growing_log_is_shown_and_followed(tmp_path: Path) -> None:
    whole = list(records(steps=3, bad=None))
    later = [record for record in whole if record.step == 2]
    path = write_log(tmp_path / "log.jsonl", [r for r in whole if r.step < 2])
    app = Viewer(open_run(path))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        assert "LIVE" in text_of(app)
        await pilot.press("equals_sign")
        with path.open("ab") as file:
            file.write(b"".join(map(encode, later)))
        app.reader.poll()
        await settle(app, pilot)
        assert app.number == 2
        assert isinstance(app.row.record, Step)
        with path.open("ab") as file:
            file.write(encode(End(step=2, why="exit")))
        app.reader.poll()
        await pilot.pause()
        assert "ended" in text_of(app)


async def test_the_line_of_steps_has_every_step_of_a_log_that_grew(tmp_path: Path) -> None:
    whole = list(records(steps=12, bad=None))
    parts = [b"".join(encode(r) for r in whole if r.step in steps) for steps in
             (range(2), range(2, 3), range(3, 12))]  # fmt: skip
    begun = parts[1].rindex(b"\n", 0, -1) + 1  # all but the step line
    path = write_log(tmp_path / "log.jsonl", [])
    path.write_bytes(parts[0] + parts[1][:begun])
    app = Viewer(open_run(path))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("equals_sign")
        for more in (parts[1][begun:] + parts[2], encode(End(step=11, why="exit"))):
            with path.open("ab") as file:
                file.write(more)
            app.reader.poll()
            await settle(app, pilot)
        await until(pilot, lambda: set(app.step_lines.held) == set(range(12)))


async def test_a_log_that_is_truncated_is_told(tmp_path: Path) -> None:
    path = make_log(tmp_path)
    app = Viewer(open_run(path))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(b"\n", len(whole) // 3) + 1])
        app.reader.poll()
        await settle(app, pilot)
        assert "truncated" in text_of(app)
        assert app.number <= app.log_.last_step()


async def test_a_finding_without_a_place_has_a_row_of_its_own(tmp_path: Path) -> None:
    loose = make_finding(9, None, message="the loss does not move", op=None, location=None)
    app = Viewer(make_open_run(tmp_path, loose, bad=None))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        assert app.number == 9
        assert app.row.record == loose


async def test_a_header_alone_is_a_screen_without_steps(tmp_path: Path) -> None:
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [])))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await pilot.press("j", "right_square_bracket", "e", "enter", "s", "y", "G", "n", "escape")
        assert "No step yet" in text_of(app)


# Of the keys that all views have, those that do something with the view itself.
SHARED = ("Move", "Panes", "Other")


async def press_every_key(app: Viewer, pilot: Pilot[Any], view: str) -> None:
    for key in KEYS:
        in_it = view in key.views or (not key.views and (view == "step" or key.group in SHARED))
        if in_it and key.action != "quit" and not key.action.startswith("view("):
            app.show_view(view)
            await pilot.press(key.keys.split(",")[0])
            while len(app.screen_stack) > 1 or isinstance(app.focused, Input):
                await pilot.press("escape")
    await settle(app, pilot)
    assert app.return_code in (None, 0)
    assert app.is_running


@pytest.mark.parametrize("size", [(10, 3), (80, 24), (200, 60)])
async def test_every_key_works_at_every_size(opened: Any, size: tuple[int, int]) -> None:
    async with opened(size=size) as (app, pilot):
        await press_every_key(app, pilot, "step")


@pytest.mark.parametrize("view", NAMES[1:])
async def test_every_key_works_in_every_view(opened: Any, view: str) -> None:
    async with opened(size=(40, 10)) as (app, pilot):
        await press_every_key(app, pilot, view)


@pytest.mark.parametrize("view", range(2, len(NAMES) + 1))
async def test_every_view_opens_on_a_header_alone(tmp_path: Path, view: int) -> None:
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [])))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press(str(view))
        await settle(app, pilot)
        await pilot.press("j", "l", "plus", "minus", "enter", "y", "escape")
        await settle(app, pilot)
        assert app.is_running


async def test_the_keys_of_the_readme_lead_from_the_alert_to_the_cause(opened: Any) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    sentence = re.search(r"Three keys lead from an alert to its cause: (.*?\.)\n", readme, re.S)
    assert sentence
    keys = re.findall(r"`(\w+)`", sentence[1])
    assert len(keys) == 3
    async with opened(step=4) as (app, pilot):
        for key in keys:
            await pilot.press(key)
            await settle(app, pilot)
        assert (app.number, app.row.seq, app.row.record.op) == (BAD_STEP, 9, "softmax")
        assert "12" in text_of(app)


async def test_resizing_keeps_the_place(opened: Any) -> None:
    async with opened(size=(200, 60)) as (app, pilot):
        for width, height in [(40, 10), (120, 40), (80, 24), (3, 2), (200, 60)]:
            await pilot.resize_terminal(width, height)
            await pilot.pause()
        assert isinstance(app.row.record, Call)
        assert app.row.seq == 10
        await until(pilot, lambda: "x TT101" in text_of(app))


@pytest.mark.parametrize("first", [(80, 24), (120, 40), (60, 15)])
@pytest.mark.parametrize("then", [(120, 40), (60, 15), (100, 30)])
async def test_an_open_screen_is_laid_out_like_a_fresh_one(
    opened: Any, first: tuple[int, int], then: tuple[int, int]
) -> None:
    async with opened(size=then) as (app, _):
        fresh = text_of(app)
    async with opened(size=first) as (app, pilot):
        await pilot.resize_terminal(*then)
        starts = [line[:12] for line in fresh.splitlines()[:5]]
        await until(pilot, lambda: [x[:12] for x in text_of(app).splitlines()[:5]] == starts)
        shown = [p.id for p in app.query("Pane") if p.display and p.size.height]
        assert ("findings" in shown) == (then[0] >= 110)
        assert app.pane("calls").size.height > 1


async def test_messages_replace_each_other_and_go_away_for_a_prompt(opened: Any) -> None:
    async with opened() as (app, pilot):
        for _ in range(3):
            await pilot.press("equals_sign")
        await pilot.pause()
        assert [told.message for told in app._notifications] == [
            "this run has ended: there is nothing to follow"
        ]
        for text in ("a", "b", "c"):
            app.tell(text)
        await pilot.pause()
        assert [told.message for told in app._notifications] == ["b", "c"]
        await pilot.press("slash")
        assert not len(app._notifications)
        await pilot.press(*"softmax", "enter")
        await settle(app, pilot)
        assert not [n for n in app._notifications if "searching" in n.message]


async def test_a_view_whose_panes_are_still_being_made_is_drawn_when_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a second passes without a key, and the next view would be made ahead.
    monkeypatch.setattr(Ahead, "make", lambda ahead: None)
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        for name in NAMES[1:]:
            app.show_view(name)
            # Nothing has been made yet: what a busy machine may do first must not fail.
            assert not app.view.ready
            app.focus_view()
            app.details.draw()
            app.view.on_resize()
            assert app.main_pane.id == "calls"
            app.action_leave()
            app.show_view(name)
            await until(pilot, lambda: app.view.ready and app.focused is app.view.main)


async def test_what_is_typed_while_a_view_is_left_stays_in_the_prompt(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await pilot.press("4")
        await settle(app, pilot)
        app.show_view("step")
        app.action_ask_step()
        await settle(app, pilot)
        await pilot.press("3", "enter")
        await settle(app, pilot)
        assert app.number == 3
