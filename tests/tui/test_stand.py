"""Where one stands in a run: going, and the way back, without a screen."""

from __future__ import annotations

from pathlib import Path

from tensortrace.run import Ranks
from tensortrace.tui.stand import Stand
from tests.tui.samples import BAD_STEP, make_finding, make_open_run


class Table:
    """A cursor, and how often the step was drawn."""

    cursor, drawn = 0, 0

    def show(self, cursor: int) -> None:
        self.cursor, self.drawn = cursor, self.drawn + 1


def stand_in(folder: Path) -> tuple[Stand, Table]:
    table, ranks = Table(), Ranks([make_open_run(folder)])
    stand = Stand(ranks, cursor=lambda: table.cursor, show=table.show, forget=lambda: None)
    return stand, table


def test_one_stands_within_the_run_and_each_step_is_drawn_once(tmp_path: Path) -> None:
    stand, table = stand_in(tmp_path)
    stand.go_to(99)
    assert (stand.number, table.drawn) == (9, 1)
    stand.go_to(-1)
    assert (stand.number, table.drawn) == (0, 2)


def test_the_row_that_was_chosen_is_kept_from_step_to_step(tmp_path: Path) -> None:
    stand, _ = stand_in(tmp_path)
    stand.go_to_seq(2, 8)
    assert stand.row is not None and stand.row.record.module == "head"
    stand.go_to(5)
    assert (stand.number, stand.row.seq) == (5, 8)


def test_the_way_back_leads_to_each_place_once(tmp_path: Path) -> None:
    stand, _ = stand_in(tmp_path)
    stand.go_to_seq(2, 8)
    stand.remember()
    stand.remember()
    stand.go_to_finding(make_finding())
    assert (stand.number, stand.here) == (BAD_STEP, (BAD_STEP, 10))
    stop = stand.earlier_stop()
    assert stop is not None
    stand.return_to(stop)
    assert stand.here == (2, 8)
    assert stand.earlier_stop() is None


def test_a_place_is_kept_once_whatever_views_show_it(tmp_path: Path) -> None:
    stand, _ = stand_in(tmp_path)
    stand.remember_once()
    stand.shown = "layers"
    stand.remember_once()
    assert [stop.view for stop in stand.stops] == ["step"]


def test_of_another_run_in_the_log_no_way_leads_back(tmp_path: Path) -> None:
    stand, _ = stand_in(tmp_path)
    stand.go_to_finding(make_finding())
    stand.remember()
    stand.begin_anew()
    assert (stand.at_finding, len(stand.stops)) == (None, 0)
