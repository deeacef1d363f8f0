"""A network whose log has the ops inside its modules: written at op level, or replayed.

`Net` calls `enc` (linear) and `act` (mul, log); outside them is the loss. Seqs and ids are
those of the comments in `op_step`; a replay repeats the ops at seqs 40 to 42 with ids from 40 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensortrace.records import (
    Action,
    ChainLink,
    Location,
    Module,
    ModuleColumns,
    Param,
    Record,
    Step,
)
from tensortrace.run import Run, open_run
from tests.builders import HERE, make_call, make_end, make_header, make_tensor, write_log
from tests.tui.samples import make_finding

LOG_AT = Location("net.py", 7, "forward", "return (x * x).log()")


def op_step(step: int, *, level: str = "op", bad: bool = False) -> Iterator[Record]:
    """The records of a step; at level "module" without the ops inside modules."""
    t = {i: make_tensor(i, 4, 8) for i in range(1, 50)}
    t[2] = make_tensor(2, 8, 8, from_step=step - 1 if step else None, is_leaf=True)
    t[5] = make_tensor(5, 4, 8, neginf=3 * bad)
    back: dict[str, Any] = {"step": step, "phase": "backward"}
    one: dict[str, Any] = {"step": step}
    inside = level == "op"
    calls: list[tuple[bool, Record]] = [
        (True, make_call(1, inputs=[("x", 1)], outputs=[("output", 5)], tensors=[t[1]], **one)),
        (True, make_call(2, "enc", parent=1, inputs=[("input", 1)], outputs=[("output", 3)],
                         tensors=[] if inside else [t[3]], **one)),
        (inside, make_call(3, "enc", op="linear", parent=2, inputs=[("input", 1), ("weight", 2)],
                           outputs=[("output", 3)], tensors=[t[2], t[3]], **one)),
        (True, make_call(4, "act", parent=1, inputs=[("input", 3)], outputs=[("output", 5)],
                         tensors=[] if inside else [t[5]], **one)),
        (inside, make_call(5, "act", op="mul", parent=4, inputs=[("input", 3), ("other", 3)],
                           outputs=[("output", 4)], tensors=[t[4]], **one)),
        (inside, make_call(6, "act", op="log", parent=4, inputs=[("input", 4)], tensors=[t[5]],
                           outputs=[("output", 5)], location=LOG_AT,
                           arguments={"eps": 1e-5, "1": [8]}, **one)),
        (True, make_call(7, None, op="mse_loss", inputs=[("input", 5), ("target", 3)],
                         outputs=[("output", 6)], tensors=[t[6]], **one)),
        (True, Action(seq=8, action="loss", tensor=6, detail={"value": 1.5}, **one)),
        (True, make_call(9, None, op="mse_loss", node="MseLossBackward0", forward=7, **back,
                         tensors=[t[7], t[8]], inputs=[("output", 7)], outputs=[("input", 8)])),
        (True, make_call(10, forward=1, inputs=[("output", 9)], tensors=[t[9]], **back)),
        (True, make_call(11, "act", forward=4, inputs=[("output", 9)], **back)),
        (inside, make_call(12, "act", op="log", node="LogBackward0", forward=6, **back,
                           inputs=[("output", 10)], outputs=[("input", 11)],
                           tensors=[t[10], t[11]])),
        (inside, make_call(13, "act", op="mul", node="MulBackward0", forward=5, **back,
                           inputs=[("output", 12)], outputs=[("input", 13), ("other", 14)],
                           tensors=[t[12], t[13], t[14]])),
        (True, make_call(14, "enc", forward=2, inputs=[("output", 15)], tensors=[t[15]], **back)),
        (inside, make_call(15, "enc", op="linear", node="AddmmBackward0", forward=3, **back,
                           inputs=[("output", 16)], outputs=[("weight", 17)],
                           tensors=[t[16], t[17]])),
        (True, make_call(16, "enc", outputs=[("weight", 18)], tensors=[t[18]], **back)),
    ]  # fmt: skip
    yield from (call for wanted, call in calls if wanted)
    if bad and not inside:
        again: dict[str, Any] = {"step": step, "replay": True}
        yield make_call(40, "enc", op="linear", parent=2, inputs=[("input", 1), ("weight", 40)],
                        outputs=[("output", 41)], tensors=[t[40], t[41]], **again)  # fmt: skip
        yield make_call(41, "act", op="mul", parent=4, inputs=[("input", 41), ("other", 41)],
                        outputs=[("output", 42)], tensors=[t[42]], **again)  # fmt: skip
        yield make_call(42, "act", op="log", parent=4, inputs=[("input", 42)], location=LOG_AT,
                        outputs=[("output", 43)], tensors=[make_tensor(43, 4, 8, neginf=3)],
                        **again)  # fmt: skip
    mul, log = (5, 6) if inside else (41, 42)
    yield Param(seq=43, optimizer=0, name="enc.weight", module="enc", value=make_tensor(19, 8, 8),
                grad=t[18], update_norm=0.1, update_ratio=0.01, **one)  # fmt: skip
    if bad:
        chain = [ChainLink(mul, 4, "mul", HERE), ChainLink(log, 5, "log", LOG_AT)]
        yield make_finding(step, log, module="act", op="log", location=LOG_AT, chain=chain)
    yield Step(seq=44, update=step + 1, loss=1.5, records=20, modules=ModuleColumns(path=[""]),
               **one)  # fmt: skip


def op_records(steps: int = 4, level: str = "op", bad: int | None = 2) -> Iterator[Record]:
    yield make_header(argv=["net.py"])
    for path, cls in (("", "Net"), ("enc", "Linear"), ("act", "Act")):
        yield Module(step=0, path=path, cls=cls)
    for step in range(steps):
        yield from op_step(step, level=level, bad=step == bad)
    yield make_end(steps - 1, steps=steps)


def make_op_run(folder: Path, **sample: Any) -> Run:
    return open_run(write_log(folder / "log.jsonl", op_records(**sample)))
