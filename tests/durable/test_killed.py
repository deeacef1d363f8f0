"""A run that is killed at any moment leaves a log that opens, one step short at most."""

from __future__ import annotations

import random
import subprocess
import threading
from pathlib import Path

import pytest

from tensortrace.log import decode, open_log
from tensortrace.records import End, Header, Record, Step
from tensortrace.run import open_run
from tests.capture.lifecycle import of
from tests.durable import start
from tests.durable.reading import read_everything

# Writes its own account after each step, past every buffer: a number to a raw descriptor.
PROGRAM = """
import os, sys
from torch import nn
from tensortrace import trace

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
every = sys.argv[1] if sys.argv[1] == "auto" else int(sys.argv[1])
with trace(sys.argv[2], every=every) as t:
    for i in range(1_000_000):
        optimizer.zero_grad()
        x = torch.full((4, 8), float("nan") if i % 50 == 3 else 1.0)
        net(x).square().mean().backward()
        if i % 50 != 3:
            optimizer.step()
        t.step()
        os.write(1, b"%d\\n" % i)
"""


def kill_at_random(folder: Path, chance: random.Random, name: str = "log.jsonl") -> list[int]:
    """Let it train, kill it between two and some hundred steps; the steps that it had done."""
    process = start(
        PROGRAM, folder, chance.choice(["1", "auto"]), name,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(chance.choice([1, 3, 30, 200]))]
    # A moment inside a step: some steps take a millisecond, those with narrowing several.
    threading.Event().wait(chance.random() * 0.05)
    process.kill()
    told += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    return [int(line) for line in told]


def assert_all_is_there(path: Path, done: list[int]) -> None:
    file, _ = open_log(path)  # unpacked, if it is packed
    whole, _, rest = file.read(0, 1 << 28).rpartition(b"\n")
    file.close()
    records = [decode(line) for line in whole.split(b"\n")]
    assert all(isinstance(record, Record) for record in records)
    assert b"\n" not in rest
    assert isinstance(records[0], Header)
    steps = [step.step for step in of(Step, records)]
    assert steps == list(range(len(steps)))
    # Each step that the program could tell of is in the log; the one in flight may be.
    assert len(steps) - len(done) in (0, 1)
    assert not of(End, records)
    run = open_run(path)
    assert run.killed
    assert not run.live
    assert run.last_step() in (len(steps) - 1, len(steps))
    assert run.step(done[-1]).summary is not None
    assert run.lost_bytes == len(rest)
    run.close()
    found = read_everything(path)
    assert found is not None
    assert "no end line: killed" in found[0]


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_run_lacks_at_most_the_step_in_flight(seed: int, tmp_path: Path) -> None:
    done = kill_at_random(tmp_path, random.Random(seed))
    assert_all_is_there(tmp_path / "log.jsonl", done)


@pytest.mark.parametrize("seed", range(8, 12))
def test_a_killed_run_lacks_no_more_of_a_packed_log(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    done = kill_at_random(tmp_path, random.Random(seed), "log.jsonl.zst")
    assert_all_is_there(tmp_path / "log.jsonl.zst", done)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_runs_killed_at_random_lack_at_most_the_step_in_flight(tmp_path: Path) -> None:
    for seed in range(100, 200):
        folder = tmp_path / str(seed)
        folder.mkdir()
        done = kill_at_random(folder, random.Random(seed))
        assert_all_is_there(folder / "log.jsonl", done)
