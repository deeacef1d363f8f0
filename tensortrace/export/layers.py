"""The layer table as data: what each module was in one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensortrace.export.steps import require_steps
from tensortrace.records import Call, Module, Scalar, Step, Tensor

if TYPE_CHECKING:
    from tensortrace.run import Run, StepRecords


@dataclass(frozen=True, slots=True)
class Row:
    """A module in one step; a field is None where the log does not say.

    `shape` and `dtype` are of the first output of the first call, `parameters` counts elements of
    its own parameters, `output_rms` is over finite elements, `grad_norm` is the L2 norm over its
    own parameters, `update_ratio` the largest over them, `host_ns` the sum over `calls` (children
    included), `device_ns` that on the GPU, None unless each was timed there. `flag` is the worst
    that is known: a finding's code, "NaN" or "inf" of an output, "NaN grad" or "inf grad", "".
    """

    path: str
    cls: str
    calls: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    parameters: int = 0
    output_rms: float | None = None
    grad_norm: float | None = None
    update_ratio: Scalar | None = None
    host_ns: int | None = None
    device_ns: int | None = None
    flag: str = ""


def is_whole(records: StepRecords) -> bool:
    """Whether the calls of a step are in the log."""
    return any(call.module is not None for call in records.calls)


def module_rows(run: Run, number: int, worst: Mapping[str, str]) -> tuple[list[Row], str]:
    """Make the rows of one step, in order of first call, and say in words what they lack.

    Args:
        run: the log.
        number: the step.
        worst: the code of the worst finding of this step, by module path.
    Raises:
        UsageError: the run has no such step.
    """
    require_steps([run], range(number, number + 1))
    records = run.step(number)
    calls = _forward_calls(records)
    # A step line has no room for a ratio that is no number; the parameter's own line has.
    broken = {
        param.module: param.update_ratio
        for param in records.params
        if param.module is not None and isinstance(param.update_ratio, str)
    }
    columns, norms = _columns(records.summary), _grad_norms(records)
    here = _Here(run.modules, records, calls, columns, norms, worst, broken)
    rows = [_row(here, path) for path in calls or here.columns]
    if not calls:
        return rows, "only its step line was kept: no shapes, no times"
    left_out = records.truncated
    return rows, f"{left_out} records past its first 32 MB are not counted" if left_out else ""


@dataclass(frozen=True, slots=True)
class _Here:
    """What one step says, by module path."""

    modules: Mapping[str, Module]
    records: StepRecords
    calls: Mapping[str, Sequence[Call]]
    columns: Mapping[str, Mapping[str, Any]]
    grad_norms: Mapping[str, float]
    worst: Mapping[str, str]
    broken_updates: Mapping[str, Scalar]


def _row(here: _Here, path: str) -> Row:
    module, calls = here.modules.get(path), here.calls.get(path, [])
    column = here.columns.get(path, {})
    tensors = here.records.tensors
    outputs = [tensors[id] for call in calls for _, id in call.outputs if id in tensors]
    parameters = sum(max(math.prod(p.shape), 0) for p in module.parameters) if module else 0
    output_rms, grad_norm = column.get("output_rms"), here.grad_norms.get(path)
    if output_rms is None:
        output_rms = max((rms for t in outputs if (rms := _rms(t)) is not None), default=None)
    if grad_norm is None and parameters and column.get("param_grad_rms") is not None:
        # What an unfinished or thinned step has; one that froze some parameters it overestimates.
        grad_norm = column["param_grad_rms"] * parameters**0.5
    return Row(
        path=path,
        cls=module.cls if module else "",
        calls=len(calls),
        shape=outputs[0].shape if outputs else None,
        dtype=outputs[0].dtype if outputs else None,
        parameters=parameters,
        output_rms=output_rms,
        grad_norm=grad_norm,
        update_ratio=here.broken_updates.get(path, column.get("update_ratio")),
        host_ns=sum(call.host_ns for call in calls) if calls else None,
        device_ns=_device_ns(calls),
        flag=here.worst.get(path) or _nonfinite(column.get("flags", ""), outputs),
    )


def _device_ns(calls: Sequence[Call]) -> int | None:
    times = [call.device_ns for call in calls if call.device_ns is not None]
    return sum(times) if times and len(times) == len(calls) else None


def _forward_calls(records: StepRecords) -> dict[str, list[Call]]:
    """Group the forward calls of modules by path, in order of first call.

    A wrapper (DDP, a compiled module) shares the path of what it wraps: both are one call.
    """
    calls: dict[str, list[Call]] = {}
    paths: dict[int, str] = {}
    for call in records.calls:
        again = call.replay or call.recompute
        if call.module is None or call.op is not None or call.phase != "forward" or again:
            continue
        paths[call.seq] = call.module
        if call.parent is None or paths.get(call.parent) != call.module:
            calls.setdefault(call.module, []).append(call)
    return calls


def _nonfinite(flags: str, outputs: Sequence[Tensor]) -> str:
    """Name what is not finite; the flags are of outputs and gradients alike."""
    if any(t.nan for t in outputs):
        return "NaN"
    if any(t.nonfinite for t in outputs):
        return "inf"
    flag = "NaN" if "n" in flags else "inf" if "i" in flags else ""
    return f"{flag} grad" if flag and outputs else flag


def _columns(line: Step | None) -> dict[str, dict[str, Any]]:
    """Turn the parallel arrays of a step line into one dict per module."""
    if line is None:
        return {}
    table = line.modules
    names = [name for name in table.__struct_fields__ if name != "path"]
    # An array may be shorter than `path` in a log that another program wrote.
    return {
        path: {name: values[i] for name in names if i < len(values := getattr(table, name))}
        for i, path in enumerate(table.path)
    }


def _grad_norms(records: StepRecords) -> dict[str, float]:
    norms: dict[str, float] = {}
    for param in records.params:
        if param.module is not None and param.grad is not None and param.grad.norm is not None:
            # hypot, since the square of a large float64 overflows.
            norms[param.module] = math.hypot(norms.get(param.module, 0.0), param.grad.norm)
    return norms


def _rms(tensor: Tensor) -> float | None:
    """Root mean square over the finite elements, from the L2 norm over them."""
    finite = tensor.numel - tensor.nonfinite
    return None if tensor.norm is None or finite <= 0 else tensor.norm / finite**0.5
