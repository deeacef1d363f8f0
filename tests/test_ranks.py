"""Several ranks of one run: found, merged, walked from one to the next."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tensortrace.cli import main
from tensortrace.errors import LogError, UsageError
from tensortrace.export.contents import gather
from tensortrace.records import Step
from tensortrace.run import Ranks, named_logs, open_run, start_ranks
from tensortrace.tui.app import Viewer
from tensortrace.tui.opening import Opening
from tensortrace.tui.seek import around
from tests.builders import make_end, make_finding, make_header, make_steps, write_log
from tests.tui.screen import settle, text_of, told, until


def write_ranks(folder: Path, count: int = 3, **changes: object) -> list[Path]:
    """Each rank finds something in step 2 x rank, of the same id."""
    paths = []
    for rank in range(count):
        header = make_header(rank=rank, world_size=count, run_id=f"run-{rank}", **changes)
        steps = make_steps(6 + rank)
        finding = make_finding("f1", step=2 * rank, module="fc1", message=f"found on {rank}")
        at = next(i for i, r in enumerate(steps) if isinstance(r, Step) and r.step == 2 * rank)
        steps.insert(at, finding)
        path = folder / f"log.rank{rank}.jsonl"
        paths.append(write_log(path, [header, *steps, make_end(5 + rank)]))
    return paths


def test_findings_are_merged_by_step_and_rank_and_say_their_rank(tmp_path):
    write_ranks(tmp_path)
    ranks = start_ranks([tmp_path])
    assert [run.header.rank for run in ranks.runs] == [0, 1, 2]
    found = ranks.findings
    assert [(f.step, f.evidence["rank"], f.message) for f in found] == [
        (0, 0, "found on 0"), (2, 1, "found on 1"), (4, 2, "found on 2"),
    ]  # fmt: skip
    assert [ranks.of(finding) for finding in found] == ranks.runs
    assert ranks.of(make_finding(evidence={"rank": 9})) is None
    assert ranks.findings is found  # nothing new, nothing merged
    ranks.close()


def test_logs_of_runs_of_other_sizes_are_refused(tmp_path):
    write_ranks(tmp_path, 4)
    write_ranks(tmp_path, 2)
    with pytest.raises(LogError, match=r"rank1.jsonl is of a run of 2 ranks, .*rank2.* of 4 ranks"):
        start_ranks([tmp_path])


def test_a_rank_that_left_no_log_keeps_nobody_from_the_others(tmp_path, capsys):
    """It was killed before its first line."""
    paths = write_ranks(tmp_path)
    paths[0].write_bytes(b"")
    told = f"{paths[0]} is empty: nothing was recorded in it yet; the other ranks are shown"
    ranks = start_ranks([tmp_path])
    assert [run.header.rank for run in ranks.runs] == [1, 2]
    assert ranks.unread == [told]
    ranks.close()
    assert main(["report", str(tmp_path)]) == 1  # for what was found on the others
    out, err = capsys.readouterr()
    assert err == f"tensortrace: {told}\n"
    assert "found on 1" in out
    assert "found on 2" in out


def test_a_log_that_cannot_be_read_is_an_error_where_it_was_named(tmp_path, capsys):
    paths = write_ranks(tmp_path)
    paths[0].write_bytes(b"")
    with pytest.raises(LogError, match=r"rank0\.jsonl is empty"):
        start_ranks(paths)
    for path in paths:
        path.write_bytes(b"")
    assert main(["report", str(tmp_path / "log.jsonl")]) == 2
    assert capsys.readouterr().err.count("is empty") == 1


async def test_the_viewer_says_which_rank_cannot_be_read(tmp_path):
    paths = write_ranks(tmp_path)
    paths[2].write_text("no log at all\n")
    app = Viewer(start_ranks([tmp_path]))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        assert "log.rank2.jsonl" in told(app)
        assert "the other ranks are shown" in told(app)
        assert "lies beside" not in told(app)


def test_the_cause_on_one_rank_comes_before_what_it_did_on_another(tmp_path):
    """Each rank counts seqs of its own: that of the cause may be the larger."""
    spread = make_finding("f1", step=1, code="TT102", phase="backward", seq=37, update=2)
    cause = make_finding("f1", step=1, code="TT101", seq=44, update=1)
    for rank, finding in enumerate((spread, cause)):
        steps = [*make_steps(2), finding]
        header = make_header(rank=rank, world_size=2)
        write_log(tmp_path / f"log.rank{rank}.jsonl", [header, *steps, make_end(1)])
    ranks = start_ranks([tmp_path])
    contents = gather(ranks.runs)
    assert [one.finding.code for one in contents.shown] == ["TT101", "TT102"]
    assert contents.table_run is ranks.runs[1]


def test_a_step_that_one_rank_alone_has_come_to_is_its_own(tmp_path):
    ranks = start_ranks(write_ranks(tmp_path))  # of 6, 7 and 8 steps
    assert gather(ranks.runs, step=6).table_run is ranks.runs[1]
    assert gather(ranks.runs, step=3).table_run is ranks.runs[0]
    with pytest.raises(UsageError, match="no step 9"):
        gather(ranks.runs, step=9)


def test_one_rank_alone_is_left_as_it_is(tmp_path):
    run = open_run(write_log(tmp_path / "log.jsonl", [*make_steps(2), make_finding(step=1)]))
    ranks = Ranks([run])
    assert ranks.findings is run.findings
    assert "rank" not in ranks.findings[0].evidence
    assert ranks.of(make_finding()) is run
    assert ranks.beside == []


def test_all_ranks_are_indexed_that_of_the_screen_first(tmp_path):
    ranks = start_ranks(write_ranks(tmp_path))
    for run in ranks.runs:
        run._scanned = 0  # as if nothing had been read yet
    seen = [(run_done, run.indexed) for run in [ranks.runs[1]] for run_done in ranks.index(run)]
    assert seen[0][1] == 1.0
    assert seen[-1][0] == 1.0 == ranks.indexed


def test_growth_of_any_rank_is_seen(tmp_path):
    paths = write_ranks(tmp_path)
    ranks = start_ranks(paths)
    assert not ranks.refresh()
    with paths[2].open("ab") as file:
        file.write(b'{"kind":"step","step":8,"seq":1}\n')
    assert ranks.refresh()
    assert ranks.runs[2].last_step() == 8
    assert not ranks.refresh()


def test_names_stand_for_one_log_or_for_all_ranks(tmp_path, monkeypatch):
    paths = write_ranks(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in paths]
    assert [p.name for p in named_logs([])] == names
    assert [p.name for p in named_logs([tmp_path])] == names
    assert [p.name for p in named_logs([Path("log.jsonl")])] == names
    assert named_logs([paths[1]]) == [paths[1]]
    assert named_logs(paths[::-1]) == paths[::-1]
    assert named_logs([Path("-")]) == [Path("-")]
    assert named_logs([Path("none.jsonl")]) == [Path("none.jsonl")]
    assert [run.path for run in start_ranks(paths[::-1]).runs] == paths
    assert [p.name for p in start_ranks([paths[1]]).beside] == [names[0], names[2]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(LogError, match="no tensortrace log in"):
        named_logs([tmp_path / "empty"])


def test_a_folder_opens_the_newest_run_of_several(tmp_path):
    import os

    write_ranks(tmp_path)
    alone = write_log(tmp_path / "later.jsonl", make_steps(1))
    os.utime(alone, (1 << 33, 1 << 33))
    assert named_logs([tmp_path]) == [alone]


def test_two_logs_of_the_same_rank_are_refused_in_one_sentence(tmp_path, capsys):
    one, other = (write_log(tmp_path / f"{n}.jsonl", make_steps(1)) for n in "ab")
    assert main(["report", str(one), str(other)]) == 2
    told = capsys.readouterr().err
    assert "are both of rank 0, so not of one run" in told
    assert len(told.splitlines()) == 1
    assert main(["report", str(one), str(tmp_path / "none.jsonl")]) == 2
    with pytest.raises(LogError, match="both of rank 0"):
        start_ranks([one, other])


def test_the_report_takes_a_folder_or_several_logs(tmp_path, capsys):
    paths = write_ranks(tmp_path)
    assert main(["report", "--json", str(tmp_path)]) == 1
    folder = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in folder["ranks"]] == [0, 1, 2]
    assert main(["report", "--json", *map(str, paths[1:])]) == 1
    some = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in some["ranks"]] == [1, 2]


# ---- in the viewer


async def test_a_key_goes_to_the_same_place_on_the_next_rank(tmp_path):
    app = Viewer(start_ranks(write_ranks(tmp_path)))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        assert "rank 0/3" in text_of(app)
        await pilot.press("colon", *"3", "enter", "j", "j")
        row = app.row
        await pilot.press("right_parenthesis")
        assert "rank 1/3" in text_of(app)
        assert (app.number, app.row.record.module) == (3, row.record.module)
        await pilot.press("right_parenthesis", "right_parenthesis")
        assert "rank 0/3" in text_of(app)
        await pilot.press("left_parenthesis")
        assert app.log_.header.rank == 2
        assert app.log_.last_step() == 7
    app.stand.ranks.close()


async def test_the_end_is_followed_from_rank_to_rank(tmp_path):
    for path in write_ranks(tmp_path, pid=os.getpid(), hostname=socket.gethostname()):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]))  # it has not ended
    app = Viewer(start_ranks([tmp_path]), opening=Opening(follow=True))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        assert (app.number, app.stand.following) == (5, True)
        await pilot.press("right_parenthesis")
        assert (app.number, app.stand.following) == (6, True)
        await pilot.press("left_square_bracket", "right_parenthesis")
        assert (app.number, app.stand.following) == (5, False)


async def test_a_rank_that_begins_later_is_found_while_the_run_lives(tmp_path):
    paths = write_ranks(tmp_path, 2, pid=os.getpid(), hostname=socket.gethostname())
    late = paths[1].read_bytes()
    paths[1].unlink()
    paths[0].write_bytes(b"".join(paths[0].read_bytes().splitlines(keepends=True)[:-1]))
    app = Viewer(start_ranks([tmp_path]))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("right_parenthesis")
        assert "one rank only" in told(app)
        paths[1].write_bytes(late)
        await pilot.press("right_parenthesis")
        assert app.log_.header.rank == 1


async def test_walking_the_findings_changes_the_rank(tmp_path):
    app = Viewer(start_ranks(write_ranks(tmp_path)))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        assert "rank 1 step 2" in text_of(app)
        assert "found on 2" in text_of(app)
        assert (app.log_.header.rank, app.number) == (0, 0)
        await pilot.press("e")
        assert (app.log_.header.rank, app.number) == (1, 2)
        await pilot.press("e")
        assert (app.log_.header.rank, app.number) == (2, 4)
        await pilot.press("E")
        assert (app.log_.header.rank, app.number) == (1, 2)
    app.stand.ranks.close()


async def test_a_lone_log_offers_the_ranks_beside_it(tmp_path):
    paths = write_ranks(tmp_path)
    app = Viewer(start_ranks([paths[1]]))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await pilot.pause()
        assert "2 more ranks lie beside this log" in text_of(app)
        assert [f.evidence.get("rank") for f in app.found] == [None]
        await pilot.press("right_parenthesis")
        await pilot.pause()
        assert app.log_.header.rank == 2
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert [f.evidence["rank"] for f in app.found] == [0, 1, 2]
    app.stand.ranks.close()


async def test_one_rank_says_that_there_is_no_other(tmp_path):
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", make_steps(2))))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await pilot.press("right_parenthesis")
        await pilot.pause()
        assert "one rank only" in text_of(app)


async def test_a_rank_that_cannot_be_opened_is_told_and_left_out(tmp_path):
    paths = write_ranks(tmp_path)
    paths[2].write_bytes(b"not a log\n")
    app = Viewer(start_ranks([paths[0]]))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await pilot.press("right_parenthesis")
        await pilot.pause()
        assert app.log_.header.rank == 1
        assert len(app.stand.ranks.runs) == 2
        assert "is not a tensortrace log" in told(app)
    app.stand.ranks.close()


async def test_a_search_goes_over_all_ranks_and_says_where_it_found_something(tmp_path):
    app = Viewer(start_ranks(write_ranks(tmp_path)), step=0)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        assert "rank 0 " in timeline_of(app)
        await pilot.press("slash", *"found on 2", "enter")
        await until(pilot, lambda: app.log_.header.rank == 2)
        assert app.number == 4
        assert "found on rank 2" in told(app)
        await settle(app, pilot)
        assert "rank 2 " in timeline_of(app)
        await pilot.press("n")
        await until(pilot, lambda: "went round the end of the log" in told(app))
        assert (app.number, app.log_.header.rank) == (4, 2)
        await pilot.press("slash", *"found on 1", "enter")
        await until(pilot, lambda: app.log_.header.rank == 1)
        await pilot.press("2")
        await settle(app, pilot)
        assert "Timeline: rank 1, a step a column" in text_of(app)
        assert app.marks.keys() == {2}
        await pilot.press("1", "backspace")
        await until(pilot, lambda: (app.number, app.log_.header.rank) == (4, 2))
        await pilot.press("slash", *"zebra", "enter")
        await until(pilot, lambda: "zebra: nowhere in the logs of 3 ranks" in told(app))


async def test_a_search_opens_the_ranks_beside_the_log(tmp_path):
    app = Viewer(open_run(write_ranks(tmp_path)[1]), step=0)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("slash", *"found on 0", "enter")
        await until(pilot, lambda: app.log_.header.rank == 0)
        assert len(app.stand.ranks.runs) == 3


def test_a_search_goes_round_from_a_line_of_one_rank_to_the_same_line(tmp_path):
    runs = start_ranks(write_ranks(tmp_path)).runs
    sizes = [run.file.size() for run in runs]
    line = runs[1].path.read_bytes().index(b"\n") + 1
    after = runs[1].path.read_bytes().index(b"\n", line) + 1
    forth = [(run.header.rank, *ends) for run, *ends in around(runs, runs[1], line, 1)]
    assert forth == [(1, after, sizes[1]), (2, 0, sizes[2]), (0, 0, sizes[0]), (1, 0, after)]
    back = [(run.header.rank, *ends) for run, *ends in around(runs, runs[1], line, -1)]
    assert back == [(1, 0, line), (0, 0, sizes[0]), (2, 0, sizes[2]), (1, line, sizes[1])]


def timeline_of(app: Viewer) -> str:
    return text_of(app).splitlines()[3]
