"""The keys that walk from a row to those that belong to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.dialogs.pick import Pick
from tensortrace.tui.dialogs.screens import Help
from tensortrace.tui.header import headline
from tests.builders import make_call, make_header, make_late_run, make_tensor, write_log
from tests.tui.nets import make_op_run
from tests.tui.screen import settle, text_of, told, until

Opened = AbstractAsyncContextManager[tuple[Viewer, Callable[..., Any]]]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Opened]:
    @asynccontextmanager
    async def open_it(
        step: int | None = None, size: tuple[int, int] = (120, 40), **sample: Any
    ) -> AsyncIterator[tuple[Viewer, Callable[..., Any]]]:
        app = Viewer(make_op_run(tmp_path, **sample), step)
        async with app.run_test(size=size, notifications=True) as pilot:

            async def press(*keys: str) -> tuple[int, int | None]:
                return await press_all(app, pilot, *keys)

            await settle(app, pilot)
            yield app, press

    return open_it


async def press_all(app: Viewer, pilot: Pilot[Any], *keys: str) -> tuple[int, int | None]:
    """Press keys one after the other; the step and the seq where that led."""
    for key in keys:
        await pilot.press(key)
        await settle(app, pilot)
    return app.number, app.row.seq if app.row is not None else None


async def test_a_finding_on_an_op_opens_the_call_around_it(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press() == (2, 6)
        assert "▾ act" in text_of(app)
        assert "▸ enc" in text_of(app)


async def test_enter_shows_the_ops_inside_and_then_the_detail(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        before = len(app.rows)
        assert await press("j", "enter") == (0, 2)
        assert len(app.rows) == before + 1
        await press("enter")
        assert app.focused is app.pane("detail")


async def test_l_goes_in_and_h_goes_out_and_closes(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        assert await press("j", "j", "l") == (0, 4)
        assert await press("l") == (0, 5)
        assert await press("right") == (0, 5)
        assert "no ops were recorded inside" in text_of(app)
        assert await press("j", "h") == (0, 4)
        assert await press("left") == (0, 4)
        assert not app.rows.opens(2)
        assert await press("escape") == (0, 1)
        assert await press("h") == (0, 1)


async def test_plus_shows_all_ops_and_minus_hides_them(opened: Any) -> None:
    async with opened() as (app, press):
        closed = len(app.rows) - 2
        assert await press("plus") == (2, 6)
        assert len(app.rows) == closed + 6
        assert await press("minus") == (2, 4)
        assert len(app.rows) == closed


async def test_what_is_open_stays_open_in_the_next_step(opened: Any) -> None:
    async with opened(step=0) as (_, press):
        assert await press("j", "j", "l", "l", "j", "right_square_bracket") == (1, 6)


async def test_i_goes_to_the_producer_and_backspace_comes_back(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press("i") == (2, 5)
        assert await press("i") == (2, 3)
        assert "▾ enc" in text_of(app)
        assert await press("backspace") == (2, 5)
        assert "▸ enc" in text_of(app)
        assert await press("ctrl+o") == (2, 6)
        assert await press("backspace") == (2, 6)
        assert "no earlier place" in text_of(app)


async def test_i_says_which_step_an_input_is_from(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press("i", "i", "i") == (2, 3)
        assert "it came from step 1" in " ".join(text_of(app).split())


async def test_o_goes_to_the_consumer_and_on_to_the_loss(opened: Any) -> None:
    async with opened() as (_, press):
        assert await press("o") == (2, 7)
        assert await press("o") == (2, 8)


async def test_b_goes_to_the_gradient_and_back(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press("b") == (2, 12)
        assert "LogBackward0" in text_of(app)
        assert "no gradient" not in text_of(app)
        assert await press("b") == (2, 6)


async def test_several_ways_are_a_list_to_choose_from(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press("o", "i") == (2, 3)
        assert "mse_loss comes from" in text_of(app)
        assert await press("j") == (2, 6)
        assert await press("enter") == (2, 6)
        assert await press("backspace") == (2, 7)
        assert await press("i", "G", "escape") == (2, 7)
        assert len(app.screen_stack) == 1


async def test_c_without_a_finding_says_so(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        await press("c")
        assert "no finding here has a chain" in text_of(app)


async def test_p_goes_to_the_same_place_in_the_step_before(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press("p") == (1, 6)
        assert await press("p") == (0, 6)
        assert await press("p") == (0, 6)
        assert "no earlier step" in text_of(app)
        assert await press("backspace", "backspace") == (2, 6)


async def test_c_walks_the_causes_and_the_table_goes_along(opened: Any) -> None:
    async with opened() as (app, press):
        await press("c")
        assert isinstance(app.screen, Pick)
        assert "Causes of TT101" in text_of(app)
        assert "return (x * x).log()" in text_of(app)
        assert await press("k") == (2, 5)
        assert await press("escape") == (2, 6)
        assert await press("c", "k", "enter") == (2, 5)
        assert len(app.screen_stack) == 1
        assert await press("c", "j", "enter") == (2, 6)
        assert await press("backspace", "backspace") == (2, 6)


async def test_c_goes_on_to_the_next_cause_and_says_which_was_the_last(opened: Any) -> None:
    async with opened() as (app, press):
        assert await press("c") == (2, 5)
        assert await press("c") == (2, 6)
        assert isinstance(app.screen, Pick)
        await press("c")
        assert len(app.screen_stack) == 1
        assert "that was the last of its causes" in text_of(app)


async def test_a_line_that_is_cut_says_so(opened: Any) -> None:
    async with opened(size=(80, 24)) as (app, press):
        await press()
        pane = app.pane("detail")
        pane.show(1, lambda *_: [("ab", "faint"), ("c" * 99, "")])
        beside = pane.size.width - pane.show_vertical_scrollbar
        cut = f"ab{'c' * (beside - 3)}\u2026"
        assert pane.render_line(0).text == cut.ljust(pane.size.width)
        pane.show(1, lambda *_: [("ab", "faint"), (" " * 99, "")])
        assert pane.render_line(0).text.strip() == "ab"


async def test_the_palette_finds_the_export_of_the_view(opened: Any) -> None:
    async with opened(step=0) as (app, _):
        titles = [command.title.lower() for command in app.get_system_commands(app.screen)]
        assert any("export" in title for title in titles)


def test_the_first_line_tells_findings_of_other_ranks_apart() -> None:
    line = headline(program="a", rank=(0, 2), step=(0, 1), loss="1", findings={"error": 1},
                    state=("ended", ""), width=100, elsewhere=3)  # fmt: skip
    assert "1 error, 3 on other ranks" in "".join(text for text, _ in line)


async def test_a_search_opens_the_call_around_an_op(opened: Any) -> None:
    async with opened(step=0, bad=None) as (app, press):
        assert await press("slash", *"linear", "enter") == (0, 2)  # of the class Linear
        assert await press("n") == (0, 3)
        assert "▾ enc" in text_of(app)


async def test_replayed_ops_are_walked_like_others(opened: Any) -> None:
    async with opened(level="module") as (app, press):
        assert await press() == (2, 42)
        assert "replayed" in text_of(app)
        assert await press("i") == (2, 41)
        assert await press("h") == (2, 4)


async def test_the_detail_of_an_op_has_arguments_module_and_node(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        await press("j", "j", "l", "l", "j")
        assert "with eps=1e-05, [1]=[8]" in text_of(app)
        assert "in act" in text_of(app)
        await press("b")
        assert "autograd node LogBackward0" in text_of(app)
        assert "gradient of call #6" in text_of(app)


async def test_the_keys_work_on_rows_that_lead_nowhere(opened: Any) -> None:
    async with opened(step=0, size=(80, 24)) as (app, press):
        await press("G", "i", "o", "b", "p", "c", "l", "h", "plus", "minus")
        assert app.number == 0
        assert not app._exit


async def test_backspace_leads_back_from_the_views_of_a_place_then_from_the_jump(
    opened: Any,
) -> None:
    async with opened(step=2) as (app, press):
        start = await press("g")
        await press("2", "3", "4")
        assert app.shown == "tensor"
        assert await press("backspace") == start
        assert app.shown == "step"
        await press("backspace")
        assert "no earlier place" in told(app)
        await press("right_square_bracket", "left_square_bracket")
        jumped = await press("e")
        assert jumped != start
        assert await press("5", "1") == jumped
        assert await press("backspace") == start
        assert app.shown == "step"


async def test_a_module_of_digits_is_named_as_one_where_it_stands_alone(tmp_path: Path) -> None:
    calls = [
        make_call(1, "2", outputs=[("output", 1)], tensors=[make_tensor(1, 8)]),
        make_call(2, "3", inputs=[("x", 1)], outputs=[("output", 2)], tensors=[make_tensor(2, 8)]),
        make_call(3, "4", inputs=[("x", 1)]),
    ]
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", [make_header(), *calls])), 0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        assert "Detail: module 2" in text_of(app)
        await pilot.press("o")
        await until(pilot, lambda: isinstance(app.screen, Pick))
        await settle(app, pilot)
        assert "module 2 goes to" in text_of(app)
        assert "#2 module 3" in text_of(app)


async def test_minus_and_plus_say_where_there_is_nothing_to_hide_or_show(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        for key, why in (("minus", "anything to hide"), ("plus", "of this step are shown")):
            await press(*[key] * 3)
            count = len(app.rows)
            await press(key)
            assert len(app.rows) == count
            assert why in told(app)
        await press("minus")
        assert len(app.rows) < count
        assert told(app) == ""


async def test_minus_and_plus_say_so_of_a_step_without_ops(opened: Any) -> None:
    async with opened(step=0, level="module") as (app, press):
        await press("minus")
        assert "no call inside another has anything to hide" in told(app)
        await press("plus")
        assert told(app) == "all calls and ops of this step are shown"


async def test_what_was_told_goes_with_the_next_key(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        await press("backspace")
        assert "no earlier place" in told(app)
        await press("j")
        assert told(app) == ""
        await press("backspace", "backspace")
        assert told(app) == "no earlier place to go back to"
        app.tell("searching for a needle (esc cancels)")
        await press("j")
        assert told(app).startswith("searching for")


async def test_ctrl_c_names_the_key_that_quits_and_q_closes_the_help_first(opened: Any) -> None:
    async with opened(step=0) as (app, press):
        await press("ctrl+c")
        assert "q quits" in told(app)
        assert "ctrl+q" not in told(app)
        await press("question_mark", "j")
        assert isinstance(app.screen, Help)
        await press("q")
        assert not isinstance(app.screen, Help)
        assert app.is_running and app.return_code is None


async def test_the_same_place_is_found_in_the_step_before_a_finding(tmp_path: Path) -> None:
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", make_late_run())), step=1)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        app.stand.go_to_seq(1, 4)
        await pilot.press("p")
        await settle(app, pilot)
        assert (app.number, app.row.seq) == (0, 4)
