"""Training goes on, with the same results, when the log cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrace import trace
from tensortrace.errors import UsageError
from tensortrace.export.text import render_report
from tensortrace.log import decode
from tensortrace.records import Record, Step
from tensortrace.run import open_run
from tests.capture.lifecycle import of, weights
from tests.durable import make_model, run_program, turn
from tests.durable.reading import draw, read_everything

STEPS = 30
Harm = Callable[[Path], object]


def train(meanwhile: Callable[[int], object] = lambda step: None) -> list[bytes]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        turn(model, optimizer)
        meanwhile(step)
    return weights(model)


def train_harmed(path: Path, harm: Harm, when: int = 10) -> list[bytes]:
    """Train traced; `harm` happens to the log in the middle."""
    with trace(path, every=1):
        return train(lambda step: harm(path) if step == when else None)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def replace_by_text(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("not a log\n")
    other.replace(path)


def remove_folder(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


HARMS: dict[Harm, str] = {
    Path.unlink: "deleted or replaced",
    remove_folder: "deleted or replaced",
    replace_by_text: "deleted or replaced",
    cut_in_half: "was cut from",
    cut_to_nothing: "was cut from",
}


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_log_that_is_taken_away_is_one_warning(
    harm: Harm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs"
    path = folder / "log.jsonl"
    assert train_harmed(path, harm) == train()
    said = capsys.readouterr().err
    assert said.count("the log is lost from here on, training goes on") == 1
    assert HARMS[harm] in said
    assert said.endswith(f"tensortrace: {STEPS} steps, nothing found\n")  # and nothing to open
    if path.exists():
        read_everything(path)


def test_a_log_that_is_moved_away_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, moved = tmp_path / "log.jsonl", tmp_path / "moved.jsonl"
    assert train_harmed(path, lambda path: path.rename(moved)) == train()
    said = capsys.readouterr().err
    assert "lost" not in said
    assert "tensortrace view" in said
    run = open_run(moved)
    assert run.end is not None
    assert run.end.steps == STEPS
    run.close()


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_reader_of_a_log_that_is_taken_away_reads_on(harm: Harm, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log.jsonl"
    shown = []

    def look(step: int) -> None:
        if step == 5:
            opened.append(open_run(path))
        if step == 10:
            draw(opened[0])
            harm(path)
        if step >= 10:
            run = opened[0]
            run.refresh()
            for _ in run.index():
                pass
            shown.append(draw(run) + render_report(run))

    opened: list[Any] = []
    with trace(path, every=1):
        assert train(look) == train()
    assert len(shown) == STEPS - 10
    opened[0].close()


def test_a_disk_that_fills_up_is_one_warning(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: a write fails in the middle of a line."""
    script = """
import resource, signal
from tensortrace import trace
from tests.durable.test_broken_world import train

plain = train()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (40_001, 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with trace(f"{limit}.jsonl", every=1) as t:
        traced = train()
    assert traced == plain
    assert t.ok
"""
    _, err = run_program(script, tmp_path)
    assert err.count("the log is lost from here on, training goes on") == 2
    assert err.count("File too large") == 2
    assert "tensortrace view" not in err
    for limit in (40_001, 0):
        path = tmp_path / f"{limit}.jsonl"
        assert path.stat().st_size == limit
        lines = path.read_bytes().split(b"\n")[:-1]
        assert all(isinstance(decode(line), Record) for line in lines)
        assert len(of(Step, map(decode, lines))) < STEPS
        read_everything(path)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_said_before_training(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(UsageError, match="Permission denied"):
        trace(tmp_path / "log.jsonl").__enter__()


def test_a_place_that_cannot_be_written_is_said_before_training() -> None:
    """/proc refuses new files to root too."""
    with pytest.raises(UsageError, match="cannot write a log to /proc/log"):
        trace("/proc/log.jsonl").__enter__()


WAYS = ["descriptors", "files", "none", "full", "pipe"]
CLOSED = """
import os, sys
from tensortrace import trace
from tests.durable.test_broken_world import WAYS, train

plain = train()

def close(how):
    if how == "descriptors":
        os.close(1)
        os.close(2)
    elif how == "files":
        sys.stdout.close()
        sys.stderr.close()
    elif how == "none":
        sys.stdout = sys.stderr = None
    elif how == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    elif how == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)

def run(how):
    close(how)
    with trace(f"{how}.jsonl", every=1):  # it has something to say, at its end
        traced = train()
    return traced == plain

for how in WAYS:
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if run(how) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, how
"""


def test_nobody_to_tell_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Both streams closed in three ways, standard error full, standard error without a reader."""
    run_program(CLOSED, tmp_path)
    for how in WAYS:
        found = read_everything(tmp_path / f"{how}.jsonl")
        assert found is not None
        assert "exit after" in found[0]


def test_the_descriptor_of_a_closed_standard_error_is_not_the_log(tmp_path: Path) -> None:
    """A log that is opened as descriptor 2 would get what others print there."""
    script = """
import os
os.close(2)
from tensortrace import trace
from tests.durable.test_broken_world import train
with trace("log.jsonl", every=1):
    train()
    try:
        os.write(2, b"a stray line\\n")
    except OSError:
        pass
"""
    run_program(script, tmp_path)
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert all(isinstance(decode(line), Record) for line in lines)
