"""Small runs for the tests of the checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensortrace.checks import select
from tensortrace.engine import Engine
from tensortrace.records import (
    Action,
    Finding,
    Module,
    ModuleColumns,
    Optimizer,
    Param,
    ParameterInfo,
    Record,
    Step,
)
from tests.builders import make_call, make_run, make_tensor


def find(records: Iterable[Record], *codes: str, **settings: Any) -> list[Finding]:
    """Run the checks named, or all of them, over records."""
    checks = select(codes or None)
    engine = Engine(checks, {f"{codes[0]}.{k}": v for k, v in settings.items()})
    found = [finding for record in make_run(records) for finding in engine.feed(record)]
    assert engine.problems == []
    return found


def brief(found: Iterable[Finding]) -> list[tuple[str, str, str | None]]:
    return [(f.code, f.severity, f.op or f.module) for f in found]


def op(seq, name, ins, outs, tensors=(), *, step=0, module=None, **changes):
    """One op outside modules, ids in and out."""
    return make_call(
        seq, module, step=step, op=name,
        inputs=[(f"args[{i}]", id) for i, id in enumerate(ins)],
        outputs=[(f"output[{i}]", id) for i, id in enumerate(outs)], tensors=list(tensors),
        **changes,
    )  # fmt: skip


def call(seq, path, ins, outs, tensors=(), *, step=0, **changes):
    """One module call, ids in and out."""
    return op(seq, None, ins, outs, tensors, step=step, module=path, **changes)


def ok(id, *shape, **changes):
    return make_tensor(id, *(shape or (4,)), **changes)


def nan(id, *shape, **changes):
    return make_tensor(id, *(shape or (4,)), **{"nan": 1, **changes})


def loss(seq, value, tensor=None, *, step=0):
    return Action(step=step, seq=seq, action="loss", tensor=tensor, detail={"value": value})


def optimizer(seq=1000, *, step=0, index=0, **changes):
    fields: dict[str, Any] = {"cls": "SGD", "lr": [0.1], "grad_norm": 1.0, **changes}
    return Optimizer(step=step, seq=seq, update=step, index=index, **fields)


def closing(step=0, **changes):
    return Step(step=step, seq=2000, **changes)


def module(path, *names, cls="Linear", shape=(4, 4), grad=True, step=0, training=True):
    parameters = [ParameterInfo(name, shape, requires_grad=grad) for name in names]
    return Module(step=step, path=path, cls=cls, parameters=parameters, training=training)


def param(seq, name, value, *, step=0, **changes):
    path = name.rpartition(".")[0]
    return Param(step=step, seq=seq, optimizer=0, name=name, module=path, value=value, **changes)


def row(**columns: dict[str, float | None]) -> ModuleColumns:
    """The columns of a step line; `param_grad_rms={"a": 1.0}` names the paths."""
    path = list(next(iter(columns.values())))
    names = [name for name in ModuleColumns.__struct_fields__ if name not in ("path", "flags")]
    filled = {name: [columns.get(name, {}).get(p) for p in path] for name in names}
    return ModuleColumns(path=path, flags=[""] * len(path), **filled)
