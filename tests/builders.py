"""Small runs written by hand: what the tests of the reading half read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tensortrace.log import encode
from tensortrace.records import (
    Action,
    Call,
    End,
    Finding,
    Header,
    Location,
    Module,
    ModuleColumns,
    Param,
    Record,
    Step,
    Tensor,
)

HERE = Location("train.py", 12, "main", "loss = model(x)")


def make_header(**changes: Any) -> Header:
    fields: dict[str, Any] = {
        "step": 0,
        "format": "tensortrace",
        "version": 1,
        "run_id": "test",
        "time_ns": 1,
        "argv": ["train.py"],
        "python": "3.11.7",
        "torch": "2.13.0",
        "tensortrace": "0.1.0",
        "options": {"every": 1},
    }
    return Header(**{**fields, **changes})


def make_tensor(id: int, *shape: int, **changes: Any) -> Tensor:
    numel = 1
    for dim in shape:
        numel *= dim
    fields: dict[str, Any] = {
        "id": id, "shape": shape, "numel": numel, "min": -1.0, "max": 1.0, "mean": 0.0, "std": 0.5,
        "norm": 0.5 * numel**0.5,
    }  # fmt: skip
    return Tensor(**{**fields, **changes})


def make_call(seq: int, module: str | None = "", *, step: int = 0, **changes: Any) -> Call:
    fields: dict[str, Any] = {"step": step, "seq": seq, "module": module, "location": HERE}
    return Call(**{**fields, **changes})


def make_finding(id: str = "f1", *, step: int = 0, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "id": id, "step": step, "update": step, "code": "TT101", "check": "nonfinite-forward",
        "severity": "error", "phase": "forward", "module": "fc1", "op": None, "param": None,
        "seq": 2, "tensor": 2, "message": "NaN first appears here", "value": "NaN", "limit": None,
        "location": HERE, "explanation": "log of zero", "evidence": {"placed": "direct"},
        "chain": [], "fix": "clamp the input",
    }  # fmt: skip
    return Finding(**{**fields, **changes})


def make_steps(count: int, *, start: int = 0) -> list[Record]:
    """Let a small network train for some steps: Net(fc1, fc2), forward, backward, one parameter.

    The tensors of each step: 1 is the input, 2 what fc1 makes of it, 3 what fc2 and Net return, 4
    the gradient of 3, 5 that of 2, 6 the weight of fc2 and 7 its gradient.
    """
    records: list[Record] = []
    for step in range(start, start + count):
        if step == start:
            for path, cls in (("", "Net"), ("fc1", "Linear"), ("fc2", "Linear")):
                records.append(Module(step=step, path=path, cls=cls))
        t = {id: make_tensor(id, 4, 8) for id in range(1, 8)}
        back: dict[str, Any] = {"phase": "backward", "step": step}
        records += [
            make_call(1, step=step, inputs=[("x", 1)], outputs=[("output", 3)], tensors=[t[1]]),
            make_call(2, "fc1", step=step, parent=1, inputs=[("input", 1)], outputs=[("output", 2)],
                      tensors=[t[2]]),
            make_call(3, "fc2", step=step, parent=1, inputs=[("input", 2)], outputs=[("output", 3)],
                      tensors=[t[3]]),
            make_call(4, "fc2", **back, forward=3, inputs=[("output[0]", 4)],
                      outputs=[("input", 5), ("weight", 7)], tensors=[t[4], t[5]]),
            make_call(5, "fc1", **back, forward=2, inputs=[("output[0]", 5)]),
            Param(step=step, seq=6, optimizer=0, name="fc2.weight", module="fc2", value=t[6],
                  grad=t[7], update_norm=0.1, update_ratio=0.01),
            Step(step=step, seq=7, update=step + 1, loss=1 / (step + 1), records=6,
                 modules=ModuleColumns(
                     path=["", "fc1", "fc2"], output_rms=[1.0, 0.5, 1.0 + step],
                     zero_frac=[0.0, 0.0, 0.0], grad_rms=[None, 0.1, 0.2],
                     param_grad_rms=[None, 0.1, 0.2], update_ratio=[None, None, 0.01],
                     flags=["", "", ""])),
        ]  # fmt: skip
    return records


def make_late_run(kept: int = 6) -> list[Record]:
    """Two steps, the second with a finding: `kept` records of the first follow its step line."""
    *modules, clear = [*make_steps(1)[:3], Action(step=0, seq=6, action="zero_grad")]
    *late, param, last = make_steps(1)[3:]
    late.append(msgspec.structs.replace(param, seq=7))
    thin = msgspec.structs.replace(last, seq=8, full=False, dropped=len(late))
    return [*modules, clear, thin, *late[:kept], make_finding(step=1), *make_steps(1, start=1)]


def make_end(step: int = 0, **changes: Any) -> End:
    return End(**{"step": step, "why": "exit", **changes})


def make_run(records: Iterable[Record]) -> list[Record]:
    """Put a header in front, unless there is one."""
    rest = list(records)
    head = [] if rest and isinstance(rest[0], Header) else [make_header()]
    return list(itertools.chain(head, rest))


def write_log(path: Path, records: Iterable[Record]) -> Path:
    """Write a run to a file, header in front."""
    path.write_bytes(b"".join(map(encode, make_run(records))))
    return path
