"""Trace every tensor of a PyTorch program and name the first cause of what went wrong.

The public names load on first use: importing the package imports neither torch nor textual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensortrace.errors import LogError, TensortraceError, TraceStoppedError, UsageError
from tensortrace.version import __version__

if TYPE_CHECKING:
    from tensortrace.capture.lines.options import Lines
    from tensortrace.capture.tracer import Trace, trace
    from tensortrace.records import Finding
    from tensortrace.run import Run, open_run

_HOMES = {
    "Finding": "tensortrace.records",
    "Lines": "tensortrace.capture.lines.options",
    "Run": "tensortrace.run",
    "Trace": "tensortrace.capture.tracer",
    "open_run": "tensortrace.run",
    "trace": "tensortrace.capture.tracer",
}

__all__ = [
    "Finding",
    "Lines",
    "LogError",
    "Run",
    "TensortraceError",
    "Trace",
    "TraceStoppedError",
    "UsageError",
    "__version__",
    "open_run",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tensortrace' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
