"""Other tools that look at tensors, each as its manual says to use it, on the same workloads.

What each records differs; the table only says what it costs to have it on. Tools that write
nothing, or only to memory, have 0 bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measure import Turn, Way
from tests.benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool: its name in the table, what must be importable, and how it is put on."""

    name: str
    needs: str
    way: Way

    @property
    def missing(self) -> bool:
        """Whether it is not installed."""
        try:
            return importlib.util.find_spec(self.needs) is None
        except ModuleNotFoundError:
            return True


@contextmanager
def _debug_mode(work: Workload, **options: Any) -> Iterator[Turn]:
    from torch.utils._debug_mode import DebugMode

    def run() -> None:
        with DebugMode(**options):
            work.step()

    yield Turn(run)


@contextmanager
def _debug_mode_hashes(work: Workload) -> Iterator[Turn]:
    from torch.utils._debug_mode import DebugMode

    def run() -> None:
        with DebugMode() as mode, mode.log_tensor_hashes(hash_fn="norm"):
            work.step()

    yield Turn(run)


@contextmanager
def _detect_anomaly(work: Workload) -> Iterator[Turn]:
    with torch.autograd.detect_anomaly(check_nan=True):
        yield Turn(work.step)


@contextmanager
def _hf_underflow_overflow(work: Workload) -> Iterator[Turn]:
    from transformers.debug_utils import DebugUnderflowOverflow

    kept = {m: list(m._forward_hooks) for m in work.model.modules()}
    with contextlib.redirect_stdout(io.StringIO()):
        DebugUnderflowOverflow(work.model)
        yield Turn(work.step)
    for module, keys in kept.items():
        for key in list(module._forward_hooks):
            if key not in keys:
                del module._forward_hooks[key]


@contextmanager
def _torchlens(work: Workload) -> Iterator[Turn]:
    """A forward pass in place of the step's own: torchlens runs the model itself."""
    import torchlens

    def run() -> None:
        torchlens.trace(work.model, work.inputs)
        work.step()

    yield Turn(run)


@contextmanager
def _wandb(work: Workload) -> Iterator[Turn]:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        run = wandb.init(mode="offline", dir=folder, settings=settings)
        run.watch(work.model, log="all", log_freq=1)

        def step() -> None:
            work.step()
            run.log({"step": 1})

        yield Turn(step, lambda: _nbytes(folder))
        run.unwatch(work.model)
        run.finish()


def _msprobe(level: str) -> Callable[[Workload], AbstractContextManager[Turn]]:
    @contextmanager
    def way(work: Workload) -> Iterator[Turn]:
        from msprobe.pytorch import PrecisionDebugger

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            config = Path(folder) / "config.json"
            settings = {
                "task": "statistics", "dump_path": folder, "rank": [], "step": [], "level": level,
                "statistics": {
                    "scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics",
                },
            }  # fmt: skip
            config.write_text(json.dumps(settings))
            # One object for a process: a second one would be the first with its old settings.
            PrecisionDebugger._instance = None
            debugger = PrecisionDebugger(str(config))

            def step() -> None:
                debugger.start(model=work.model)
                work.step()
                debugger.stop()
                debugger.step()

            yield Turn(step, lambda: _nbytes(folder))

    return way


def _nbytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _way(function: Callable[..., Any], **options: Any) -> Way:
    return lambda work: function(work, **options)


PEERS = (
    Peer("`DebugMode()`", "torch.utils._debug_mode", _debug_mode),
    Peer(
        "`DebugMode(record_nn_module=True)`",
        "torch.utils._debug_mode",
        _way(_debug_mode, record_nn_module=True),
    ),
    Peer("`DebugMode`, norm of each output", "torch.utils._debug_mode", _debug_mode_hashes),
    Peer("`detect_anomaly(check_nan=True)`", "torch", _detect_anomaly),
    Peer("transformers `DebugUnderflowOverflow`", "transformers", _hf_underflow_overflow),
    Peer("TorchLens, one more forward pass", "torchlens", _torchlens),
    Peer('`wandb.watch(log="all", log_freq=1)`', "wandb", _wandb),
    Peer("msprobe statistics, modules (L0)", "msprobe", _msprobe("L0")),
    Peer("msprobe statistics, modules and functions (mix)", "msprobe", _msprobe("mix")),
)
