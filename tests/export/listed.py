"""A run with line records: a forward with a loop, called by a training step of three steps."""

from __future__ import annotations

from typing import Any

from tensortrace.records import Finding, Line, Location, Record, Source, Step, Tensor, Variable
from tests.builders import make_call, make_finding, make_header, make_tensor

FILE = "model.py"
TEXT = """\
import torch


class Net(torch.nn.Module):
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        scale = 1 / x.norm()
        return x * scale


# The loss is a mean.
def train_step(model, ids):
    logits = model(ids)
    loss = logits.mean()
    # Nothing but comments
    # stands between the loss
    # and the lines that
    # go backward, so that
    # these seven lines
    # and two more
    # are folded into one
    # in a listing of them,
    # as they say nothing.
    # That is all of it.
    loss.backward()
    return loss
"""
LINES = TEXT.split("\n")
STEP_AT, FORWARD_AT = 14, 5


def text_between(first: int, last: int) -> str:
    return "\n".join(LINES[first - 1 : last]) + "\n"


def make_sources() -> list[Source]:
    return [
        Source(step=0, file=FILE, name="train_step", first_line=14, text=text_between(14, 28)),
        Source(step=0, file=FILE, name="Net.forward", first_line=5, text=text_between(5, 10)),
    ]


def at(line: int, function: str = "train_step") -> Location:
    return Location(FILE, line, function)


def in_forward(line: int) -> Location:
    return at(line, "Net.forward")


def held(name: str, id: int, text: str = "tensor<...>", **changes: Any) -> Variable:
    return Variable(name, text, tensors=[("", id)], **changes)


def make_line(seq: int, location: Location, *changed: Variable, **fields: Any) -> Line:
    return Line(**{"step": 0, "seq": seq, "location": location, "changed": list(changed), **fields})


def step_records(step: int) -> list[Record]:
    """Tensors: 0 ids, 1 x, 2 x after a layer, 3 x after the other, 4 the logits, 5 the loss."""
    length = 97 if step == 2 else 128
    bad: dict[str, Any] = {"nan": 64} if step == 1 else {}
    t: dict[int, Tensor] = {
        0: make_tensor(0, 8, length, dtype="int64"),
        **{id: make_tensor(id, 8, length, 64) for id in (1, 2)},
        3: make_tensor(3, 8, length, 64, **bad),
        4: make_tensor(4, 8, length, 64, **bad),
        5: make_tensor(
            5, mean=None if step == 1 else 2.5 / (step + 1), **({"nan": 1} if bad else {})
        ),
    }
    inner: dict[str, Any] = {"step": step, "frame": 2, "depth": 1, "parent": 1}
    flags: dict[str, Any] = {"flags": ["nonfinite"]} if step == 1 else {}
    records: list[Record] = [
        make_line(0, at(14), Variable("model", "<Net>"), held("ids", 0), what="call", step=step,
                  tensors=[t[0]]),
        make_line(1, at(15), held("logits", 4), step=step, host_ns=4_000_000),
        make_call(2, "", step=step, location=at(15), inputs=[("ids", 0)], outputs=[("output", 4)],
                  tensors=[t[4]], host_ns=3_900_000),
        make_line(3, in_forward(5), Variable("self", "<Net>"), held("ids", 0), what="call",
                  **inner),
        make_line(4, in_forward(6), held("x", 1), tensors=[t[1]], host_ns=500_000, **inner),
        make_line(5, in_forward(7), Variable("layer", "<Linear 0>"), host_ns=1_000, **inner),
        make_line(6, in_forward(8), held("x", 2, was="tensor<...>"), tensors=[t[2]],
                  host_ns=900_000, **inner),
        make_line(7, in_forward(7), Variable("layer", "<Linear 1>", "<Linear 0>"), nth=1,
                  host_ns=1_000, **inner),
        make_line(8, in_forward(8), held("x", 3, was="tensor<...>"), nth=3, passed_over=2,
                  tensors=[t[3]], host_ns=1_100_000, **flags, **inner),
        make_line(9, in_forward(7), nth=2, host_ns=1_000, **inner),
        make_line(10, in_forward(9), Variable("scale", "0.01" if step else "0.5"), host_ns=9_000,
                  **inner),
        make_line(11, in_forward(10), host_ns=20_000, **inner),
        make_line(12, in_forward(10), value=held("return", 4), what="return", **inner),
        make_line(13, at(16), held("loss", 5), step=step, tensors=[t[5]], host_ns=50_000),
        make_line(14, at(27), step=step, host_ns=12_000_000),
        make_line(15, at(28), step=step, host_ns=1_000),
        make_line(16, at(28), value=held("return", 5), what="return", step=step),
    ]  # fmt: skip
    if step == 1:
        records.append(make_found(step=1))
    return [*records, Step(step=step, seq=20, update=step, host_ns=17_000_000)]


def make_found(**changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "id": "TT101-1", "module": "", "seq": 8, "location": in_forward(8),
        "message": "layers.1 made 64 NaN of 65536 from finite inputs, the first at [0, 3, 1]",
    }  # fmt: skip
    return make_finding(**{**fields, **changes})


def make_listed(steps: int = 3) -> list[Record]:
    return [
        make_header(cwd=""),
        *make_sources(),
        *(record for step in range(steps) for record in step_records(step)),
    ]


def make_plain(steps: int = 3) -> list[Record]:
    """The same without line records."""
    kinds = ("Line",)
    return [r for r in make_listed(steps) if type(r).__name__ not in kinds]
