"""TT610: a batch that is far larger than those before."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Tensor
from tensortrace.text import module_text, nbytes_text, shape_text


@check("TT610", "batch-shape-outlier", when="full", severity="note")
def batch_shape_outlier(
    step: StepView,
    memory: dict[str, Any],
    *,
    times: float = 4.0,
    beyond: float = 2.0,
    least: int = 10,
) -> Iterator[Draft]:
    """A batch is far larger than those before, of longer sequences or more samples.

    Symptom:    one step takes several times as long; memory runs out in the middle of an epoch,
                at another step in each run
    Threshold:  the data that an outermost module gets in a step that trains has more than
                `times` * the median number of elements, and more than `beyond` * the most, of the
                last 100 full steps (at least `least`) with as many dims
    Source:     attention keeps length ** 2 numbers for each head, so 4 times the length takes up to
                16 times the memory; `times`, `beyond` chosen here (in tests/healthy no batch
                is larger than all before it by a fifth)
    Fix:        cut or drop outliers in the collate function (tokens[:, :longest]); batches by the
                number of tokens; sort by length into buckets; torch.utils.checkpoint
    Misses:     steps that are not written in full; evaluation, whose batches may be larger; a run
                whose first batches are the large ones; a length that is raised on purpose
    Example:    batch = pad_sequence(sentences, batch_first=True)
    Fixed:      batch = pad_sequence([s[:512] for s in sentences], batch_first=True)
    """
    if not any(a.action == "loss" for a in step.actions):
        return
    nbytes = _nbytes(step.tensors.get(id) for c in step.forward() for _, id in c.outputs)
    met: set[str] = set()
    for call in step.forward():
        if call.parent is not None or call.op or not call.grad_enabled:
            continue
        given = [step.tensors[id] for _, id in call.inputs if id in step.tensors]
        data = max((t for t in given if not t.requires_grad), key=lambda t: t.numel, default=None)
        key = f"{call.module} {len(data.shape or ()) if data is not None else 0}"
        if data is None or data.shape is None or key in met:
            continue
        met.add(key)
        seen = memory.setdefault(key, deque(maxlen=100))
        if len(seen) >= least:
            usual, usual_nbytes = median(n for n, _ in seen), median(b for _, b in seen)
            if data.numel > times * usual and data.numel > beyond * max(n for n, _ in seen):
                now, then = nbytes_text(nbytes), nbytes_text(usual_nbytes)
                took = f"; what its calls return takes {now}, not {then}"
                yield Draft(
                    message=f"{module_text(call.module)} gets {shape_text(data.shape)}: "
                    f"{data.numel / usual:.3g} times the usual number of elements (limit "
                    f"{times:g}){took}",
                    cause=key, phase="forward", module=call.module, seq=call.seq, tensor=data.id,
                    value=data.numel / usual, limit=times, location=call.location,
                    evidence={"placed": "direct", "nbytes": nbytes, "usual_nbytes": usual_nbytes},
                )  # fmt: skip
        seen.append((data.numel, nbytes))


def _nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of tensors, from the digits that most names of dtypes end with."""
    count: Counter[str] = Counter()
    for tensor in tensors:
        if tensor is not None and tensor.view_of is None:
            count[tensor.dtype] += tensor.numel
    nbytes = 0
    for dtype, numel in count.items():
        bits = re.search(r"^[a-z]+(\d+)", dtype)
        nbytes += numel * (int(bits[1]) // 8 if bits else 1)
    return nbytes
