"""Small programs to trace, and what must be the same before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tensortrace.capture.active import here, slot
from tensortrace.log import decode
from tensortrace.records import Record

R = TypeVar("R", bound=Record)
X = torch.ones(2, 4)


class Poison(nn.Module):
    """Returns what it gets, but NaN at the calls numbered in `at`."""

    def __init__(self, at: Container[int]) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * float("nan") if self.calls - 1 in self.at else x


class Raises(nn.Module):
    """Raises what it was given."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def make_net(poison: Container[int] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Poison(poison), nn.Linear(4, 1))


def make_optimizer(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.01)


def train(net: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Train for some steps; the place of every finding is this function."""
    optimizer = optimizer or make_optimizer(net)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(X).square().mean()
        loss.backward()
        optimizer.step()


def weights(net: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in net.parameters()]


def of(kind: type[R], records: Iterable[Any]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


def called(records: Iterable[Any]) -> list[tuple[int, str]]:
    """(step, module path) of every forward call of a module."""
    from tensortrace.records import Call

    return [
        (call.step, call.module)
        for call in of(Call, records)
        if call.phase == "forward" and call.module is not None and call.op is None
    ]


def read(path: Path) -> list[Any]:
    """Every line of a log, each of which must be a record."""
    records = [decode(line) for line in path.read_bytes().splitlines()]
    assert all(isinstance(record, Record) for record in records)
    return records


def process_state() -> dict[str, Any]:
    """Everything of torch that tracing touches: hooks, modes, patched methods, the slot."""
    state: dict[str, Any] = {
        f"{home.__name__}.{name}": list(value.items())
        for home in (modules, optimizers)
        for name, value in vars(home).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    state["modes"] = _get_current_function_mode_stack()
    state["slot"] = slot.recorder
    state["thread"] = (list(here.stack), here.busy)
    state["has_hooks"] = getattr(modules, "_has_any_global_hook", None)  # of newer versions
    for owner in (nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, _BaseDataLoaderIter,
                  torch.nn.utils.clip_grad):  # fmt: skip
        for name, value in vars(owner).items():
            if callable(value):
                state[f"{owner.__name__}.{name}"] = value
    return state


def run_script(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own in `folder`, with warnings as errors."""
    script = folder / "script.py"
    script.write_text("import torch\ntorch.set_num_threads(1)\n" + text)
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=folder, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": root, **environment}, check=False, capture_output=True,
    )  # fmt: skip
