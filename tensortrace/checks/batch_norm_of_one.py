"""TT707: BatchNorm that trains on the statistics of one sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import BATCH_NORMS
from tensortrace.records import Severity, Tensor
from tensortrace.text import module_text, shape_text


@check("TT707", "batch-norm-of-one", when="full")
def batch_norm_of_one(
    step: StepView, memory: dict[str, Any], *, values: int = 2, sustain: int = 3
) -> Iterator[Draft]:
    """BatchNorm in train mode normalises single samples, or so few values that their sign is left.

    Symptom:    training goes well and evaluation is bad, as the running statistics are of single
                samples; or "Expected more than 1 value per channel when training"
    Threshold:  a BatchNorm in train mode that gets a gradient, or raises, has an input of one
                sample, or of at most `values` values a channel, in `sustain` full steps running; or
                in one step after larger batches (a note): the last of an epoch
    Source:     Ioffe and Szegedy 2015, algorithm 1; Wu and He 2018, "Group Normalization", section
                1: the error grows as the batch shrinks; two values normalise to -1 and 1 whatever
                they are
    Fix:        DataLoader(..., drop_last=True); a larger batch; GroupNorm or LayerNorm instead;
                model.eval() for single samples; SyncBatchNorm across devices
    Misses:     batches of 3 to 8, whose statistics are poor too; a network for pictures that is
                meant to normalise each by itself (pix2pix) is told too: InstanceNorm says so
    Example:    loader = DataLoader(data, batch_size=1)
                model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    Fixed:      loader = DataLoader(data, batch_size=1)
                model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU())
    """
    reached = {c.forward for c in step.calls if c.phase == "backward"}
    running: dict[str, int] = memory.setdefault("running", {})
    larger: set[str] = memory.setdefault("larger", set())
    met: set[str] = set()
    for call in step.forward():
        module = step.module_of(call)
        if module is None or not call.training or call.module in met:
            continue
        if not module.cls.startswith(BATCH_NORMS) or not call.inputs:
            continue
        given, path = step.tensors.get(call.inputs[0][1]), call.module or ""
        if given is None or not (call.seq in reached or call.exception):
            continue
        met.add(path)
        each = _each(given)
        single = bool(given.shape) and given.shape is not None and given.shape[0] == 1
        if each > values and not single:
            larger.add(path)
            running[path] = 0
            continue
        running[path] = running.get(path, 0) + 1
        if running[path] >= sustain or path in larger:
            severity: Severity = "warning" if running[path] >= sustain else "note"
            few = "one sample" if single else f"{each:g} values a channel (limit {values})"
            yield Draft(
                message=f"{module_text(path)} trains on {few}, of shape {shape_text(given.shape)}, "
                f"in {running[path]} full steps running (limit {sustain})",
                cause="one", severity=severity, phase="forward", module=path, seq=call.seq,
                tensor=given.id, value=each, limit=values, location=call.location,
                evidence={"placed": "direct", "steps": running[path], "raised": call.exception},
            )  # fmt: skip
            return


def _each(tensor: Tensor) -> float:
    """How many values a channel has, in (N, C) or (N, C, ...)."""
    channels = tensor.shape[1] if tensor.shape is not None and len(tensor.shape) > 1 else 1
    return tensor.numel / max(1, channels)
