"""Small runs written by hand: what the tests of the reading half read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from tensortrace.records import Call, Header, Location, Record, Tensor

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


def make_run(records: Iterable[Record]) -> list[Record]:
    """Put a header in front, unless there is one."""
    rest = list(records)
    head = [] if rest and isinstance(rest[0], Header) else [make_header()]
    return list(itertools.chain(head, rest))
