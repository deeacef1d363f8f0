"""A large log, made small: what the benchmark of the viewer times, by what it shows."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
from textual.widget import Widget

from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tests.benchmarks.biglog import STEADY, write_big_log
from tests.benchmarks.presses import BYTES, bytes_of, every_key, jump, keys
from tests.benchmarks.remote import Relay
from tests.benchmarks.terminal import Terminal
from tests.benchmarks.viewer import jumps_of, packed_table
from tests.builders import make_end, make_header, make_steps, write_log
from tests.tui.samples import BAD_STEP, records
from tests.tui.screen import settle, text_of, until


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    write_big_log(path, 4_000_000, every=7)
    return path


def test_the_log_of_the_benchmark_is_one_that_the_tracer_could_have_written(big: Path) -> None:
    run = open_run(big)
    for _ in run.index():
        pass
    assert (run.unreadable, run.skipped, run.lost_bytes) == (0, {}, 0)
    assert [s.step for s in run.summaries(0, 999)] == list(range(run.last_step() + 1))
    assert run.last_step() > STEADY
    assert len(run.findings) == (run.last_step() + 1) // 7
    full = run.step(run.last_step())
    assert len(full.calls) > 100
    call = next(call for call in reversed(full.calls) if call.phase == "forward" and call.inputs)
    assert full.consumers(call.inputs[0][1])
    run.close()


def test_thinned_steps_follow_full_ones(tmp_path: Path) -> None:
    write_big_log(tmp_path / "log.jsonl", 1_500_000, thin=9)
    run = open_run(tmp_path / "log.jsonl")
    full = [s.step for s in run.summaries(20, 41) if s.full]
    assert full == [20, 30, 40]
    run.close()


def test_every_key_of_the_viewer_has_its_bytes_for_the_benchmark() -> None:
    assert len(keys()) > 30
    assert bytes_of("ctrl+p") == b"\x10"
    assert bytes_of("f24") is None
    assert all(isinstance(sent, bytes) for sent in BYTES.values())


def test_the_benchmark_presses_the_own_keys_of_every_view() -> None:
    pressed = [(view, name) for view, name, _ in every_key()]
    assert {("layers", "+"), ("layers", "m"), ("timeline", "m"), ("tensor", "t")} <= {*pressed}
    assert len(pressed) == len(set(pressed))


def test_far_jumps_a_search_and_its_end_in_a_real_terminal(big: Path) -> None:
    run = open_run(big)
    steps = run.last_step() + 1
    run.close()
    terminal = Terminal(["view", str(big)])
    with closing(terminal):
        assert terminal.wait("Sequential|zero_grad", 60) is not None
        for _, sent, expect in jumps_of(steps, 0):
            jump(terminal, sent, expect)
        jump(terminal, b"/no such text\r", "nowhere in this log")
        # A question, given up, and the next one, all at once: as over a slow line.
        terminal.press(b":9\x1b:3\r")
        assert terminal.wait(r"Step 3\b") is not None
        assert terminal.rss_mb() < 150
        assert terminal.close() == 0


def test_the_relay_hands_on_what_it_is_given_both_ways() -> None:
    (near, inner), (far, outer) = socket.socketpair(), socket.socketpair()
    relay = Relay(inner.fileno(), outer.fileno(), 0.001)
    relay.start()
    near.sendall(b"keys")
    far.sendall(b"screen")
    assert (far.recv(10), near.recv(10)) == (b"keys", b"screen")
    relay.over = True
    relay.join()
    for end in (near, inner, far, outer):
        end.close()


@pytest.mark.parametrize("ending", ["gz"])
def test_a_packed_log_is_opened_for_the_benchmark(big: Path, ending: str) -> None:
    told = packed_table(big, ending)
    assert "first screen" in told
    assert "all unpacked" in told


# ---- growth, truncation, replacement: the cursor stays where it can


async def test_a_log_that_is_replaced_is_told_and_the_cursor_stays(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", [*make_steps(9), make_end(8)])
    app = Viewer(open_run(path), step=3)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("j", "j")
        row = app.row
        new = write_log(tmp_path / "new.jsonl", [*make_steps(5), make_end(4)])
        os.replace(new, path)  # noqa: PTH105 - as another program does
        app.reader.poll()
        await settle(app, pilot)
        assert "was replaced by a newer log" in text_of(app)
        assert app.number == 3
        assert row is not None
        assert app.row is not None
        assert app.row.seq == row.seq
        assert app.log_.last_step() == 4


async def test_another_run_in_the_log_is_shown_from_its_first_error(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", [make_header(), *make_steps(9), make_end(8)])
    app = Viewer(open_run(path))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("right_square_bracket", "j", "e")
        other = [make_header(run_id="another"), *list(records(bad=BAD_STEP))[1:], make_end(9)]
        new = write_log(tmp_path / "new.jsonl", other)
        os.replace(new, path)  # noqa: PTH105 - as another program does
        app.reader.poll()
        await settle(app, pilot)
        await until(pilot, lambda: app.number == BAD_STEP)
        assert app.row is not None and app.row.seq == 10
        assert "Detail: log" in text_of(app)


async def test_a_log_that_is_cut_below_the_cursor_goes_to_what_is_left(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", make_steps(9))
    lines = path.read_bytes().splitlines(keepends=True)
    app = Viewer(open_run(path), step=8)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:20])))
        app.reader.poll()
        await settle(app, pilot)
        assert "was truncated" in text_of(app)
        assert app.number == app.log_.last_step() == 2
        assert "Step 2" in text_of(app)


async def test_keys_that_left_the_footer_are_not_kept(tmp_path: Path) -> None:
    import gc

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(one), Widget) for one in gc.get_objects())

    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", make_steps(3))))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await pilot.press("colon", "1", "enter")
        await settle(app, pilot)
        before = held()
        for _ in range(6):
            await pilot.press("colon", "2", "enter", "colon", "1", "enter")
        await settle(app, pilot)
        assert held() - before < 30
