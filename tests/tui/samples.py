"""A small run for the screen: a convolutional classifier whose log gets a zero at step 7."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensortrace.records import (
    Action,
    Call,
    ChainLink,
    End,
    Finding,
    Location,
    Module,
    Optimizer,
    Param,
    ParameterInfo,
    Record,
    Source,
    Step,
    Tensor,
)
from tensortrace.run import Run, open_run
from tests.builders import make_header, make_tensor, write_log

TEXT = """\
def train(model, loader, optimizer):
    for x, y in loader:
        scores = model(x)
        chance = scores.softmax(-1)
        loss = -(chance.log() * y).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
"""
FILE = "train.py"
BAD_STEP = 7
MODULES = (
    ("", "Digits"),
    ("stem", "Sequential"),
    ("stem.conv", "Conv2d"),
    ("stem.act", "ReLU"),
    ("blocks.0", "Block"),
    ("blocks.0.norm", "LayerNorm"),
    ("blocks.0.mlp", "Linear"),
    ("head", "Linear"),
)


def at(line: int) -> Location:
    return Location(FILE, line, "train", TEXT.splitlines()[line - 10])


def make_finding(step: int = BAD_STEP, seq: int | None = 10, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "step": step, "id": f"f{step}-{seq}", "update": step, "code": "TT101",
        "check": "nonfinite-forward", "severity": "error", "phase": "forward", "module": None,
        "op": "log", "param": None, "seq": seq, "tensor": 10,
        "message": "log makes 12 of 640 elements -inf: its input has 12 zeros",
        "value": 12, "limit": 0, "location": at(14),
        "explanation": "The logarithm of zero is minus infinity. softmax underflows to exact zeros"
        " when two scores are more than 104 apart in float32.",
        "evidence": {"placed": "exact"},
        "chain": [ChainLink(9, 9, "softmax", at(13)), ChainLink(10, 10, "log", at(14))],
        "fix": "use log_softmax on the scores, which never forms the zero.",
    }  # fmt: skip
    return Finding(**{**fields, **changes})


def step_records(step: int, *, bad: bool = False) -> Iterator[Record]:
    where: dict[str, Any] = {"step": step, "update": step}
    scale = 1.0 + 0.2 * step
    shapes = [(64, 1, 8, 8), (64, 16, 8, 8), (64, 16, 8, 8), (64, 32), (64, 32), (64, 10), (64, 10)]
    tensors = [
        make_tensor(i + 1, *shape, mean=0.01 * i * scale, std=0.5 * scale, norm=12.5 * scale,
                    min=-2.1 * scale, max=3.2 * scale, zeros=7 * i, device="cpu")
        for i, shape in enumerate(shapes)
    ]  # fmt: skip
    yield Action(seq=0, action="fetch", detail={"host_ns": 1_200_000}, **where)
    parents = [None, 1, 2, 2, 1, 5, 5, 1]
    flow = [(1, 7), (1, 3), (1, 2), (2, 3), (3, 5), (3, 4), (4, 5), (5, 7)]
    for i, ((path, _), parent, (x, y)) in enumerate(zip(MODULES, parents, flow, strict=True)):
        first = 1 if i == 0 else y
        described = [tensors[0], tensors[6]] if i == 0 else [tensors[first - 1]]
        yield Call(
            seq=i + 1, parent=parent, module=path, training=True, location=at(12),
            inputs=[("input", x)], outputs=[("output", y)], tensors=described,
            host_ns=2_000_000 // (i + 1), **where,
        )  # fmt: skip
    chance = make_tensor(9, 64, 10, min=0.0, max=1.0, mean=0.1, std=0.2, norm=9.0, zeros=12 * bad)
    logs = make_tensor(10, 64, 10, min=-90.0, max=0.0, mean=-4.0, std=3.0, norm=88.0,
                       neginf=12 * bad)  # fmt: skip
    value: Any = "NaN" if bad else round(2.3 / scale, 4)
    loss = Tensor(id=11, shape=(), numel=1, nan=int(bad), requires_grad=True,
                  grad_fn="NegBackward0", **({} if bad else {"min": 2.3, "max": 2.3, "mean": 2.3,
                                                            "std": 0.0, "norm": 2.3}))  # fmt: skip
    yield Call(seq=9, module=None, op="softmax", location=at(13), inputs=[("input", 7)],
               outputs=[("output", 9)], tensors=[chance], host_ns=31_000, **where)  # fmt: skip
    yield Call(seq=10, module=None, op="log", location=at(14), inputs=[("input", 9)],
               outputs=[("output", 10)], tensors=[logs], host_ns=22_000, **where)  # fmt: skip
    yield Call(seq=11, module=None, op="mean", location=at(14), inputs=[("input", 10)],
               outputs=[("output", 11)], tensors=[loss], host_ns=9_000, **where)  # fmt: skip
    yield Action(
        seq=12, action="loss", tensor=11, location=at(15), detail={"value": value}, **where
    )
    for i, (forward, of) in enumerate([(8, 7), (7, 5), (6, 4), (4, 3), (3, 2)]):
        arrived = make_tensor(20 + i, *shapes[of - 1], grad_of=of, mean=1e-5, std=2e-3 * scale,
                              norm=0.4 * scale, min=-0.02, max=0.03, nan=640 * bad)  # fmt: skip
        yield Call(seq=13 + i, phase="backward", forward=forward, module=MODULES[forward - 1][0],
                   location=at(12), inputs=[("output[0]", 20 + i)], tensors=[arrived],
                   host_ns=400_000, **where)  # fmt: skip
    yield Action(seq=18, action="clip", location=at(16), **where,
                 detail={"total_norm": "NaN" if bad else 0.8 * scale, "max_norm": 1.0})  # fmt: skip
    yield Optimizer(seq=19, index=0, cls="SGD", lr=[0.1], grad_norm="NaN" if bad else 0.8 * scale,
                    location=at(17), **where)  # fmt: skip
    for i, name in enumerate(["stem.conv.weight", "blocks.0.mlp.weight", "head.weight"]):
        shape = [(16, 1, 3, 3), (32, 32), (10, 32)][i]
        yield Param(seq=20 + i, optimizer=0, name=name, module=name.rpartition(".")[0],
                    value=make_tensor(30 + 2 * i, *shape), grad=make_tensor(31 + 2 * i, *shape),
                    update_norm=0.01, update_ratio=0.002, sampled=144, **where)  # fmt: skip
    yield Action(seq=23, action="zero_grad", of="SGD", location=at(18),
                 detail={"set_to_none": True, "parameters": 3}, **where)  # fmt: skip
    if bad:
        yield make_finding(step)
    yield Step(seq=24, update=step + 1, time_ns=1, host_ns=9_000_000, loss=value, records=24,
               grad_norm="NaN" if bad else 0.8 * scale, lr=[0.1], step=step)  # fmt: skip


def records(steps: int = 10, bad: int | None = BAD_STEP) -> Iterator[Record]:
    yield make_header(argv=["train.py"])
    for path, cls in MODULES:
        weight = [ParameterInfo("weight", (16, 16))] if cls in ("Conv2d", "Linear") else []
        yield Module(step=0, path=path, cls=cls, parameters=weight)
    yield Source(step=0, file=FILE, name="train", first_line=10, text=TEXT)
    for step in range(steps):
        if step == 3:
            yield make_finding(
                3, 21, code="TT402", check="update-ratio", severity="warning", phase="optimizer",
                module="blocks.0.mlp", op=None, param="blocks.0.mlp.weight", tensor=None,
                message="update is 0.31 of the weight, limit 0.1", chain=[], location=at(17),
                explanation="The learning rate is large for this weight.", fix="lower lr.",
                evidence={},
            )  # fmt: skip
        yield from step_records(step, bad=step == bad)


def make_log(folder: Path, *more: Record, steps: int = 10, bad: int | None = BAD_STEP) -> Path:
    end = [End(step=steps - 1, why="exit", steps=steps, records=250)]
    return write_log(folder / "log.jsonl", [*records(steps, bad), *more, *end])


def make_open_run(folder: Path, *more: Record, steps: int = 10, bad: int | None = BAD_STEP) -> Run:
    return open_run(make_log(folder, *more, steps=steps, bad=bad))
