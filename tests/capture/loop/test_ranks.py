"""What a process group brings: whose log it is, what it writes to tensors, a schedule's turns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tensortrace import trace
from tensortrace.capture import header
from tensortrace.records import Call, Header
from tensortrace.run import open_run
from tests.capture import record

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from tensortrace import trace
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model, ours = torch.nn.Linear(4, 2), torch.full((2, 4), 3.0 * (1 - rank))

def receive(held):
    dist.recv(held, 0) if rank else dist.send(held, 1)

def receive_later(held):
    (dist.irecv(held, 0) if rank else dist.isend(held, 1)).wait()

def gather(held):
    dist.all_gather([held, torch.empty(2, 4)], ours)

ways = [lambda x: dist.broadcast(x, 0), dist.all_reduce, gather, receive, receive_later]
with trace(f"{folder}/log.jsonl", every=1) as t:
    for way in ways:
        held = ours.clone()
        model(held)
        way(held)
        model(held)
        t.step()
    held = torch.full((2, 4), 0.0 if rank else float("nan"))
    model(held)
    dist.broadcast(held, 0)
    model(held).sum().backward()
"""


def test_what_another_rank_sends_is_seen(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path)],
            env={**environment, "GLOO_SOCKET_IFNAME": "lo"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    run = open_run(tmp_path / "log.rank1.jsonl")
    assert (run.header.rank, run.header.world_size) == (1, 2)
    for number in range(5):
        step = run.step(number)
        given = [step.tensor(call.inputs[0][1]) for call in step.calls if call.module == ""]
        assert [tensor and tensor.mean for tensor in given] == [0.0, 3.0]
    (finding,) = run.findings
    assert (finding.code, finding.step, finding.module) == ("TT105", 5, "")
    assert "another rank" in finding.explanation


@pytest.mark.usefixtures("group")
def test_collectives_are_torchs_own_again_after_the_block() -> None:
    before = dict(dist.ProcessGroup.__dict__)
    record(lambda t: dist.all_reduce(torch.zeros(2)))
    assert dict(dist.ProcessGroup.__dict__) == before


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_a_turn_of_a_schedule_of_micro_batches_is_one_step(schedule: str) -> None:
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    stage = pipelining.PipelineStage(model, 0, 1, torch.device("cpu"))
    turns = getattr(pipelining, schedule)(stage, 4, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            turns.step(torch.rand(8, 4), target=torch.rand(8, 2))
            optimizer.step()

    records = record(program)
    assert [step.update for step in records.steps()] == [1, 2, 3, 4, 5]
    assert sum(call.step == 2 for call in records.of(Call, module="", phase="forward")) == 4


@pytest.mark.usefixtures("group")
def test_a_schedule_that_only_evaluates_has_a_step_for_each_turn() -> None:
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    stage = pipelining.PipelineStage(nn.Linear(4, 2), 0, 1, torch.device("cpu"))
    turns = pipelining.ScheduleGPipe(stage, 4)

    @torch.no_grad()
    def program(t: Any) -> None:
        for _ in range(5):
            turns.step(torch.rand(8, 4))

    assert len(record(program).steps()) == 5


def test_the_process_group_says_the_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program may tell it to nobody else."""
    assert header.ranks() == (0, 1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with trace(tmp_path / "log.jsonl") as t:
        nn.Identity()(torch.full((2, 3), float("nan"), requires_grad=True)).sum().backward()
    assert capsys.readouterr().err.startswith("rank 2: error TT1")
    assert t.path == tmp_path / "log.rank2.jsonl"
    head = record(lambda t: None).of(Header)[0]
    assert (head.rank, head.world_size) == (2, 4)
