"""What two ranks train: run as ``python -m tests.neutral.ranks FOLDER`` with RANK and WORLD_SIZE.

Each rank runs every program plain, then traced on both ranks, at module and at op level, then
traced on rank 0 alone. What differed and what was found goes to ``FOLDER/result.rank<n>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tensortrace import trace
from tests.neutral import descend
from tests.test_edge_programs import attributes, fingerprint, hooks, rng_state, seed

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def net() -> nn.Sequential:
    return nn.Sequential(block(), nn.LayerNorm(8), block(), nn.Linear(8, 2))


def fit(model: nn.Module, *, same_batch: bool = False) -> list[Any]:
    """Each rank learns a batch of its own, or all the same one."""
    generator = torch.Generator().manual_seed(0 if same_batch else RANK)
    x = torch.randn(16, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return descend(model, lambda i: F.cross_entropy(model(x), y), optimizer)


def ddp() -> list[Any]:
    return fit(DistributedDataParallel(net()))


def ddp_with_a_static_graph() -> list[Any]:
    return fit(DistributedDataParallel(net(), static_graph=True, gradient_as_bucket_view=True))


def fsdp1() -> list[Any]:
    return fit(FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu")))


def fsdp2() -> list[Any]:
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fit(fully_shard(model))


def tensor_parallel() -> list[Any]:
    model = net()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for layer in (model[0], model[2]):
        parallelize_module(layer, mesh, plan)
    return fit(model, same_batch=True)


PROGRAMS: tuple[Callable[[], list[Any]], ...] = (
    ddp,
    ddp_with_a_static_graph,
    fsdp1,
    fsdp2,
    tensor_parallel,
)


def outcome(program: Callable[[], list[Any]]) -> Any:
    seed()
    result = program()
    random = rng_state()
    return fingerprint(result), random


def compare(program: Callable[[], list[Any]], folder: Path) -> dict[str, Any]:
    plain = outcome(program)
    before = attributes()
    with trace(folder / f"{program.__name__}.jsonl", every=1) as t:
        both = outcome(program)
    with trace(folder / f"{program.__name__}-ops.jsonl", every=1, level="op") as at_op:
        ops = outcome(program)
    alone = plain
    if RANK == 0:
        with trace(folder / f"{program.__name__}-alone.jsonl", every=1):
            alone = outcome(program)
    else:
        alone = outcome(program)
    return {
        "both": both == plain,
        "ops": ops == plain,
        "alone": alone == plain,
        "hooks": list(hooks()),
        "restored": attributes() == before,
        "log": t.path.name if t.path else None,
        "found": [
            f"{f.code} {f.message}" for f in t.findings + at_op.findings if f.severity != "note"
        ],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=RANK, world_size=WORLD_SIZE
    )
    results: dict[str, Any] = {}
    for program in PROGRAMS:
        try:
            results[program.__name__] = compare(program, folder)
        except Exception as error:
            results[program.__name__] = {"error": repr(error)}
            raise
        finally:
            (folder / f"result.rank{RANK}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
