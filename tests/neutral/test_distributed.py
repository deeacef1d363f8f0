"""Two processes over gloo: each rank trains the same traced, and waits for no other's tracing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tensortrace.log import decode
from tensortrace.records import Action, Call, Header, Optimizer
from tests.neutral import STEPS

NAMES = ("ddp", "ddp_with_a_static_graph", "fsdp1", "fsdp2", "tensor_parallel")
WORLD_SIZE = 2
ROOT = Path(__file__).parents[2]


def start(rank: int, folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.neutral.ranks", str(folder)],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run_ranks(folder: Path) -> list[dict[str, Any]]:
    """Run both ranks to their end; what each says of its programs."""
    processes = [start(rank, folder) for rank in range(WORLD_SIZE)]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [
        json.loads((folder / f"result.rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)
    ]


def test_two_ranks_train_the_same_traced_and_each_writes_its_own_log(tmp_path: Path) -> None:
    """One test for all programs: they share the two processes, which take seconds to start."""
    for rank, result in enumerate(run_ranks(tmp_path)):
        same = {
            "both": True,
            "ops": True,
            "alone": True,
            "hooks": [],
            "restored": True,
            "found": [],
        }
        assert result == {name: {**same, "log": f"{name}.rank{rank}.jsonl"} for name in NAMES}
        for name in NAMES:
            for log in (name, f"{name}-ops"):
                check_log(tmp_path / f"{log}.rank{rank}.jsonl", rank)


def check_log(log: Path, rank: int) -> None:
    records = [decode(line) for line in log.read_bytes().splitlines()]
    (header,) = (r for r in records if isinstance(r, Header))
    assert (header.rank, header.world_size) == (rank, WORLD_SIZE)
    assert sum(isinstance(r, Optimizer) for r in records) == STEPS
    assert not [r for r in records if isinstance(r, Action) and r.action == "tracer_error"]
    calls = Counter((r.module, r.phase) for r in records if isinstance(r, Call) and r.op is None)
    # Wrappers are no part of a path.
    for path in ("", "0", "0.0", "0.2", "3"):
        assert calls[path, "forward"] >= STEPS, (log.name, path)
        assert calls[path, "backward"] >= STEPS, (log.name, path)
