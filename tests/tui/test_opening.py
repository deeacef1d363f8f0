"""Where the viewer opens, and what it remembers from one look to the next."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tensortrace.run import open_run
from tensortrace.tui import places, save
from tensortrace.tui.app import Viewer
from tensortrace.tui.opening import Opening
from tensortrace.tui.places import Place
from tests.builders import make_header, write_log
from tests.tui.samples import BAD_STEP, make_log, make_open_run, records
from tests.tui.screen import settle, text_of, told, until


async def opened_at(folder: Path, opening: Opening, **sample: Any) -> tuple[Viewer, str]:
    app = Viewer(make_open_run(folder, **sample), opening=opening)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        text = text_of(app)
        row = app.row
    app.seen = row  # type: ignore[attr-defined]
    return app, text


async def test_it_opens_at_a_finding_by_its_code_or_its_id(tmp_path: Path) -> None:
    app, _ = await opened_at(tmp_path, Opening(finding="tt402"))
    assert (app.number, app.stand.at_finding.code) == (3, "TT402")
    app, _ = await opened_at(tmp_path, Opening(finding=f"f{BAD_STEP}-10"))
    assert (app.number, app.stand.at_finding.code) == (BAD_STEP, "TT101")


async def test_a_finding_that_is_not_there_is_told(tmp_path: Path) -> None:
    app, text = await opened_at(tmp_path, Opening(finding="TT999[/x]"))
    assert app.number == 0
    assert "no finding TT999[/x] in this log" in text


async def test_it_opens_at_the_call_of_a_module_in_a_step(tmp_path: Path) -> None:
    app, _ = await opened_at(tmp_path, Opening(step=4, module="blocks.0.mlp"))
    assert (app.number, app.seen.record.module) == (4, "blocks.0.mlp")


async def test_a_module_or_step_that_is_not_there_is_told(tmp_path: Path) -> None:
    app, text = await opened_at(tmp_path, Opening(module="blocks.7"))
    assert app.number == 0
    assert "step 0 has no call of blocks.7" in text
    app, text = await opened_at(tmp_path, Opening(step=40))
    assert app.number == 9
    assert "this log has steps 0 to 9" in text


async def test_follow_stays_at_the_end_of_a_live_run_and_says_where_one_has_ended(
    tmp_path: Path,
) -> None:
    held = [make_header(pid=os.getpid(), hostname=socket.gethostname()), *[*records(6, None)][1:]]
    live = write_log(tmp_path / "live.jsonl", held)
    app = Viewer(open_run(live), opening=Opening(follow=True))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        assert (app.number, app.stand.following) == (5, True)
        for key in ("k", "ctrl+u", "g"):
            app.stand.following = True
            await pilot.press("G", key)
            assert not app.stand.following
        app.stand.following = True
        await pilot.press("slash", *"blocks.0.mlp", "enter")
        await settle(app, pilot)
        at = app.number, app.pane("calls").cursor
        app.grow()
        await settle(app, pilot)
        assert not app.stand.following
        assert (app.number, app.pane("calls").cursor) == at
    app, text = await opened_at(tmp_path, Opening(follow=True))
    assert "this run has ended" in text
    assert (app.number, app.stand.following) == (BAD_STEP, False)


async def test_a_run_that_takes_the_place_of_an_ended_one_is_followed_if_that_was_asked(
    tmp_path: Path,
) -> None:
    log = make_log(tmp_path)
    app = Viewer(open_run(log), opening=Opening(follow=True))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("colon", "5", "enter")
        mine = make_header(run_id="next", pid=os.getpid(), hostname=socket.gethostname())
        write_log(tmp_path / "new.jsonl", [mine, *[*records(3, None)][1:]]).replace(log)
        await until(pilot, lambda: app.number == 2)
        assert app.stand.following


async def test_the_place_is_remembered_until_the_log_is_another(tmp_path: Path) -> None:
    log, memory = make_log(tmp_path), tmp_path / "state"

    async def look(*keys: str) -> tuple[int, int | None, str]:
        app = Viewer(open_run(log), memory=memory)
        async with app.run_test(size=(120, 40), notifications=True) as pilot:
            await settle(app, pilot)
            for key in keys:
                await pilot.press(key)
                await settle(app, pilot)
            place = app.number, app.row.seq, app.shown
            await pilot.press("q")
        return place

    assert (await look())[0] == BAD_STEP
    left = await look("colon", "5", "enter", "g", "j", "j", "3")
    assert left == (5, 2, "layers")
    assert await look() == left
    log.write_bytes(log.read_bytes().replace(b'"run_id":"test"', b'"run_id":"next"'))
    assert (await look())[0] == BAD_STEP


async def test_what_was_asked_for_goes_before_what_is_remembered(tmp_path: Path) -> None:
    run, memory = make_open_run(tmp_path), tmp_path / "state"
    places.keep(Place(run.header.run_id, 5, 2), run, memory)
    app = Viewer(run, opening=Opening(step=1), memory=memory)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(app, pilot)
        assert app.number == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"run_id":"test","step":"x"}', b'{"run_id":"test","step":99}',
     b'{"run_id":"test","step":1,"view":"\x1b"}', b"[" * 3000, b"\xff" * 9000],
)  # fmt: skip
def test_a_damaged_memory_is_no_memory(tmp_path: Path, content: bytes) -> None:
    run = make_open_run(tmp_path)
    path = places.path_of(run, tmp_path)
    path.write_bytes(content)
    assert places.recall(run, tmp_path) is None


def test_a_place_is_written_whole_and_the_oldest_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, memory = make_open_run(tmp_path), tmp_path / "state" / "deep"
    monkeypatch.setattr(places, "MOST", 3)
    memory.mkdir(parents=True)
    for at in range(5):
        (memory / f"{at}.json").write_text("{}")
        os.utime(memory / f"{at}.json", (at, at))
    place = Place(run.header.run_id, 5, 2, "flow")
    places.keep(place, run, memory)
    assert places.recall(run, memory) == place
    assert {path.name for path in memory.iterdir()} == {
        "3.json", "4.json", places.path_of(run, memory).name
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    run = make_open_run(tmp_path)
    (tmp_path / "file").write_text("")
    places.keep(Place("test", 1), run, tmp_path / "file" / "places")


def test_the_folder_is_that_of_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert places.folder() == Path("/somewhere/tensortrace/places")
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", given)
        assert places.folder() == Path.home() / ".local/state/tensortrace/places"


async def saved(app: Viewer, pilot: Pilot[Any], name: str) -> None:
    await pilot.press("x")
    app.query_one("#prompt").value = f">{name}"  # type: ignore[attr-defined]
    await pilot.press("enter")
    await settle(app, pilot)


async def test_x_writes_the_whole_view_as_text_under_the_name_it_offers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("x", "enter")
        await settle(app, pilot)
        written = tmp_path / "log-step7-step.txt"
        assert "written to" in text_of(app)
        text = written.read_text("utf-8")
        assert text.startswith("train.py  step 7/9  step")
        assert "end of step" in text
        assert "use log_softmax" in text
        await pilot.press("x")
        assert app.query_one("#prompt").value == ">log-step7-step-2.txt"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["c.html", "a.png", "t.CSV", "r.json"])
async def test_x_refuses_a_name_that_says_another_format(tmp_path: Path, name: str) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await saved(app, pilot, str(tmp_path / name))
        assert "cannot be written: a view is .txt or .svg" in told(app)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("path", "offered"),
    [
        ("-", "run-step13-step.txt"),
        ("a/b.jsonl", "b-step13-step.txt"),
        (".x", "log-step13-step.txt"),
    ],
)
def test_the_name_that_x_offers_is_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, offered: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_open_run(tmp_path)
    run.path = Path(path)
    assert save.free_name(run, 13, "step") == offered


async def test_x_writes_a_picture_and_never_over_a_file(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        picture = tmp_path / "map.svg"
        await saved(app, pilot, str(picture))
        assert "gradient" in picture.read_text("utf-8").replace("&#160;", " ")
        before = picture.read_bytes()
        await saved(app, pilot, str(picture))
        assert "is there already" in told(app)
        assert picture.read_bytes() == before
        await saved(app, pilot, str(tmp_path / "no" / "such.txt"))
        assert "cannot be written" in told(app)
        await saved(app, pilot, "")
