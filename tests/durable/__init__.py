"""A tracer that is left on for days: bounded memory, no harm when the world around it breaks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
X = torch.linspace(-1, 1, 32).view(4, 8)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def turn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One turn of a training loop; the target moves away, so that training never ends."""
    optimizer.zero_grad()
    loss = (model(X) - 1).square().mean()
    loss.backward()
    optimizer.step()


def start(script: str, folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a program of its own in a folder; its output is text."""
    path = folder / "program.py"
    path.write_text("import torch\ntorch.set_num_threads(1)\n" + script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, str(path), *arguments], cwd=folder, text=True, env=environment, **options
    )


def run_program(script: str, folder: Path, *arguments: str, **options: Any) -> tuple[str, str]:
    """Run a program to its end, which must be a good one; returns what it printed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = start(script, folder, *arguments, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out or "", err or ""


def measure(act: Callable[[], Any]) -> int:
    """Bytes that Python holds more after an act than before; collected before each look."""
    import tracemalloc

    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    act()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before
