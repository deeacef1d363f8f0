"""One run that shows everything a report can say; every exporter is tested on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensortrace.log import encode
from tensortrace.records import (
    Call,
    ChainLink,
    End,
    Failure,
    Finding,
    Location,
    Module,
    ModuleColumns,
    Optimizer,
    Param,
    ParameterInfo,
    Record,
    Source,
    Step,
)
from tests.builders import make_call, make_header, make_tensor

MODEL = "model.py"
FORWARD = """\
    def forward(self, x):
        x = self.encoder(x)
        x = torch.log(x)
        return self.head(x)
"""
LOG_LINE = Location(MODEL, 12, "Net.forward", "x = torch.log(x)")
PATHS = ["", "encoder", "encoder.0", "encoder.1", "head"]


def make_finding(**changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "step": 1, "id": "TT101-1", "update": 1, "code": "TT101", "check": "nonfinite-forward",
        "severity": "error", "phase": "forward", "module": "", "op": "log", "param": None,
        "seq": 14, "tensor": 4, "message": "3 of 32 values are -inf", "value": 3.0, "limit": 0.0,
        "location": LOG_LINE, "explanation": "log of 0 is -inf", "evidence": {}, "chain": [],
        "fix": "clamp the input: x.clamp(min=1e-6).log()",
    }  # fmt: skip
    return Finding(**{**fields, **changes})


def make_modules() -> list[Module]:
    weight = ParameterInfo("weight", (8, 4))
    bias = ParameterInfo("bias", (8,))
    return [
        Module(step=0, path="", cls="Net"),
        Module(step=0, path="encoder", cls="Sequential"),
        Module(step=0, path="encoder.0", cls="Linear", parameters=[weight, bias]),
        Module(step=0, path="encoder.1", cls="ReLU"),
        Module(step=0, path="head", cls="Linear", parameters=[ParameterInfo("weight", (2, 8))]),
    ]


def make_calls(step: int) -> list[Call]:
    """A forward pass: rms 0.5 everywhere, the head called twice, -inf and NaN in step 1."""
    bad = {"neginf": 3} if step == 1 else {}
    head = {"nan": 8, "min": None, "max": None, "mean": None, "std": None, "norm": None}
    return [
        make_call(10, "", step=step, inputs=[("input", 0)], outputs=[("output", 6)],
                  host_ns=3_000_000, tensors=[make_tensor(0, 4, 4), make_tensor(6, 4, 2)]),
        make_call(11, "encoder", step=step, parent=10, outputs=[("output", 3)], host_ns=1_000_000,
                  tensors=[make_tensor(3, 4, 8)]),
        make_call(12, "encoder.0", step=step, parent=11, outputs=[("output", 2)], host_ns=600_000,
                  tensors=[make_tensor(2, 4, 8)]),
        make_call(13, "encoder.1", step=step, parent=11, outputs=[("output", 3)], host_ns=40_000),
        make_call(14, "", step=step, parent=10, op="log", outputs=[("output", 4)],
                  tensors=[make_tensor(4, 4, 8, **bad)]),
        make_call(15, "head", step=step, parent=10, nth=0, outputs=[("output", 5)], host_ns=90_000,
                  tensors=[make_tensor(5, 4, 2, **(head if step == 1 else {}))]),
        make_call(16, "head", step=step, parent=10, nth=1, outputs=[("output", 6)], host_ns=90_000),
    ]  # fmt: skip


def make_param(step: int, name: str, shape: tuple[int, ...], norm: float) -> Param:
    return Param(
        step=step, seq=31, optimizer=0, name=name, module=name.rpartition(".")[0],
        value=make_tensor(20, *shape), grad=make_tensor(21, *shape, norm=norm), update_ratio=1e-3,
    )  # fmt: skip


def make_step(step: int, **changes: Any) -> Step:
    columns = ModuleColumns(
        path=PATHS, output_rms=[0.5] * 5, zero_frac=[0.0] * 5, grad_rms=[None] * 5,
        param_grad_rms=[None, None, 0.25, None, 0.5],
        update_ratio=[None, None, 1e-3, None, 2e-3], flags=[""] * 5,
    )  # fmt: skip
    return Step(step=step, seq=40, update=step + 1, host_ns=5_000_000, modules=columns, **changes)


def make_findings() -> list[Finding]:
    """In the log's order, which is not the order of cause."""
    profile = [["encoder.0", 2e-9], ["encoder.1", 3e-5], ["head", 0.25]]
    chain = [
        ChainLink(13, 3, "relu", Location(MODEL, 11, "Net.forward", "x = self.encoder(x)")),
        ChainLink(14, 4, "log", LOG_LINE),
    ]
    return [
        make_finding(
            step=0, id="TT202-1", code="TT202", check="vanishing-gradient", severity="warning",
            phase="backward", module="encoder.0", op=None, seq=22, tensor=None,
            message="gradient 2e-09 is 1.2e+08 times smaller than in head (limit 1e6)",
            location=None, explanation="early layers stop learning",
            evidence={"ratio": 1.25e8, "sustained": True, "profile": profile},
            fix="use ReLU instead of Sigmoid, or add residual connections",
        ),
        make_finding(
            step=0, id="TT105-1", code="TT105", check="nonfinite-input", severity="note", op=None,
            seq=2, message="a mask of -inf", explanation="", fix="", location=None,
        ),
        make_finding(
            chain=chain,
            evidence={
                "placed": "exact", "neginf": 3, "between": ["encoder", None],
                "between_lines": ["model.py:11", None],
                "inputs": [{"name": "x", "shape": [4, 8], "dtype": "float32", "min": 0.0,
                            "zeros": 3}],
            },
        ),
    ]  # fmt: skip


def make_canonical() -> list[Record]:
    """Three steps: a vanishing gradient in 0, the first -inf in 1, its consequences in 2."""
    warning, note, error = make_findings()
    failure = Failure("ValueError", "loss is NaN", "head", Location("train.py", 30, "main"))
    weight, head = "encoder.0.weight", "head.weight"
    return [
        make_header(argv=["train.py", "--lr", "0.1"]), *make_modules(),
        Source(step=0, file=MODEL, name="Net.forward", first_line=10, text=FORWARD),
        *make_calls(0), warning, note, make_param(0, weight, (8, 4), 1.5),
        make_param(0, head, (2, 8), 2.5), make_step(0, loss=0.7, grad_norm=3.0, lr=[0.1]),
        *make_calls(1), error, Optimizer(step=1, seq=30, index=0, cls="SGD"),
        make_param(1, weight, (8, 4), 1.5), make_param(1, head, (2, 8), 2.5),
        make_step(1, loss="NaN", grad_norm="Infinity", lr=[0.1, 0.01]),
        make_step(2, full=False, loss=0.6, repeats={"TT101-1": 5, "TT202-1": 1}),
        End(step=2, why="exception", steps=3, updates=3, elapsed_ns=1_500_000_000,
            thinned=9, failure=failure),
    ]  # fmt: skip


def write_log(path: Path, records: Iterable[Record]) -> Path:
    path.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in map(encode, records)))
    return path
