"""README's pictures: each is there, and is what the script makes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tensortrace.tui.app import Viewer
from tests import screenshots
from tests.screenshots import FOLDER, HOME, PAGES, PICTURES, ROOT, open_named, record, steady, take
from tests.tui.screen import settle, text_of

CURVE = "docs/cost.svg"  # drawn by the benchmarks, of what they measured
README = (ROOT / "README.md").read_text("utf-8")
SHOWN = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)


def test_every_picture_of_the_readme_is_made_by_the_script_and_no_other_lies_there() -> None:
    assert SHOWN.count(CURVE) == 1 and (ROOT / CURVE).is_file()
    taken = [path for path in SHOWN if path != CURVE]
    names = {Path(path).name for path in taken}
    assert all(path.startswith("docs/pictures/") for path in taken)
    assert names == {file.name for file in FOLDER.iterdir()} == {*PICTURES, *PAGES}


def test_pictures_load_nothing_and_tell_of_no_machine() -> None:
    for name in PICTURES:
        text = (FOLDER / name).read_text("utf-8")
        assert not re.search(r"(?i)@font-face|@import|url\((?!#)|<script|<image|href=", text), name
        assert "/tmp/" not in text
        assert len(text) < 400_000


def test_every_demo_of_a_picture_exists() -> None:
    demos = [picture.demo for picture in PICTURES.values()] + [demo for demo, *_ in PAGES.values()]
    assert all((ROOT / demo).is_file() for demo in demos)


def test_a_picture_that_does_not_exist_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        screenshots.main(["steps.svg"])
    assert ended.value.code == 2
    assert "no picture is named steps.svg" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        screenshots.main(["--help"])
    assert ended.value.code == 0
    assert "step.svg, " in capsys.readouterr().out


def test_what_differs_from_run_to_run_is_taken_from_a_log_line() -> None:
    def line(ns: int, root: str) -> dict[str, Any]:
        return {"kind": "call", "step": 1, "seq": 3, "host_ns": ns, "op": "log", "thread": ns,
                "location": {"file": f"{root}/train.py", "line": 3}}  # fmt: skip

    one, other = (steady(line(ns, str(ROOT)), "demos/x.py") for ns in (5, 7))
    assert one == other
    assert one["location"] == {"file": f"{HOME}/train.py", "line": 3}
    assert (one["op"], one["seq"]) == ("log", 3)


async def test_the_screen_that_readme_shows_as_text_is_that_of_the_demo(tmp_path: Path) -> None:
    (screen,) = re.findall(r"^`{3}text\n( demo\.py  step .*?)^`{3}$", README, re.M | re.S)
    app = Viewer(open_named(record("tensortrace/demo.py", tmp_path / "run")))
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(app, pilot)
        drawn = text_of(app)
    assert [line.rstrip() for line in drawn.splitlines()] == screen.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_script_makes(name: str, tmp_path: Path) -> None:
    picture = screenshots.PICTURES[name]
    log = record(picture.demo, tmp_path / "run")
    made = asyncio.run(take(log, picture))
    assert made == (FOLDER / name).read_text("utf-8"), "run `python -m tests.screenshots`"
