"""Make the pictures that README shows from the program itself: ``python -m tests.screenshots``.

A demo runs, its log is made the same on every machine (times, paths, the name of the host), the
viewer opens it at a fixed size, keys are pressed, and the screen becomes an SVG in `docs/pictures`.
Names of pictures as arguments make only those. The picture of the page needs Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensortrace.export.html import render_page
from tensortrace.run import Run, open_run
from tensortrace.tui.app import Viewer
from tests.tui.screen import settle

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
# Where the pictures say that the program lies, and when it ran.
HOME = "/home/you/project"
BEGAN_NS = 1_760_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the viewer on the log of a demo, after some keys; `size` in columns and rows."""

    demo: str
    keys: tuple[str, ...] = ()
    size: tuple[int, int] = (110, 34)


PICTURES: Mapping[str, Picture] = {
    "step.svg": Picture("tensortrace/demo.py"),
    "findings.svg": Picture("demos/several_faults.py", ("7",), (110, 30)),
    "timeline.svg": Picture("demos/exploding_rnn.py", ("2",), (110, 28)),
    "layers.svg": Picture("demos/vanishing_sigmoid.py", ("3", *"jjjj"), (110, 36)),
    "tensor.svg": Picture("demos/vanishing_sigmoid.py", ("e", *"kkkk", "4"), (110, 36)),
}
# Of the page that `tensortrace export` writes: demo, width and height in pixels.
PAGES: Mapping[str, tuple[str, int, int]] = {"page.png": ("demos/several_faults.py", 1000, 984)}


def main(arguments: list[str]) -> int:
    """Make the pictures of these names, all by default."""
    every = [*PICTURES, *PAGES]
    parser = argparse.ArgumentParser("python -m tests.screenshots", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which ones: {', '.join(every)}")
    wanted: list[str] = parser.parse_args(arguments).names or every
    if unknown := [name for name in wanted if name not in every]:
        parser.error(f"no picture is named {unknown[0]}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    logs: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            demo = PICTURES[name].demo if name in PICTURES else PAGES[name][0]
            if demo not in logs:
                logs[demo] = record(demo, Path(folder) / str(len(logs)))
            if name in PICTURES:
                text = asyncio.run(take(logs[demo], PICTURES[name]))
                (FOLDER / name).write_text(text, encoding="utf-8")
            elif not photograph(logs[demo], FOLDER / name, *PAGES[name][1:]):
                print(f"{name}: left as it is, there is no Chromium here")
                continue
            print(FOLDER.relative_to(ROOT) / name)
    return 0


def record(demo: str, folder: Path) -> Path:
    """Run a demo in a folder of its own; returns its log, made the same on every machine."""
    folder.mkdir()
    out = folder / "raw.jsonl"
    call = "import sys, runpy, torch; torch.set_num_threads(1); "
    call += (
        "from tensortrace.demo import train; train(sys.argv[1])" if demo.endswith("/demo.py")
        else "del sys.argv[0]; sys.argv.reverse(); runpy.run_path(sys.argv[0], run_name='__main__')"
    )  # fmt: skip
    command = [sys.executable, "-c", call, str(out), str(ROOT / demo)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    log = folder / "log.jsonl"
    lines = out.read_text("utf-8").splitlines()
    same = (steady(json.loads(line), demo) for line in lines)
    written = (json.dumps(line, separators=(",", ":")) + "\n" for line in same)
    log.write_text("".join(written), encoding="utf-8")
    return log


def steady(line: dict[str, Any], demo: str) -> dict[str, Any]:
    """Take from a log line what differs from machine to machine and from run to run."""
    seq = int(line.get("seq") or 0)
    fixed: dict[str, Callable[[Any], Any]] = {
        "host_ns": lambda _: 4_000 + 1_700 * (seq * 7 % 11),
        "time_ns": lambda _: BEGAN_NS,
        "elapsed_ns": lambda _: 1_500_000_000,
        "pid": lambda _: 0,
        "hostname": lambda _: "host",
        "cwd": lambda _: HOME,
        "argv": lambda _: [Path(demo).name],
        "python": lambda _: "3.12.0",
        "thread": lambda _: 0,
    }

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fixed[k](v) if k in fixed else walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value.replace(str(ROOT), HOME) if isinstance(value, str) else value

    done: dict[str, Any] = walk(line)
    return done


async def take(log: Path, picture: Picture) -> str:
    """Open the viewer on a log, press keys, and draw the screen as an SVG."""
    app = Viewer(open_named(log))
    async with app.run_test(size=picture.size) as pilot:
        await settle(app, pilot)
        for key in picture.keys:
            await pilot.press(key)
            await settle(app, pilot)
        drawn = app.export_screenshot(title="tensortrace view log.jsonl")
    # A picture in a page may load nothing; the font that it asks for is a wish.
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.S)


def open_named(log: Path) -> Run:
    """Open a log whose folder nobody needs to know."""
    run = open_run(log)
    run.path = Path(log.name)
    return run


def photograph(log: Path, target: Path, width: int, height: int) -> bool:
    """Let a browser draw the page of a log; False if there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return False
    page = log.with_suffix(".html")
    page.write_text(render_page([open_named(log)]), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    size = [f"--window-size={width},{height}", f"--screenshot={target}"]
    subprocess.run([browser, *options, *size, page.as_uri()], check=True, capture_output=True,
                   timeout=60)  # fmt: skip
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
