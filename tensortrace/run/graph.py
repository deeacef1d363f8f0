"""The data flow of one step: who made and who used which tensor."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

BIG = 1 << 62


class _Tensor(msgspec.Struct, gc=False):
    id: int


class _Value(msgspec.Struct, gc=False):
    """The value of a param record; that of a line is a variable, which has no id."""

    id: int | None = None


class _Links(msgspec.Struct, gc=False):
    """What of a call, line or param record says who made and who used which tensor."""

    seq: int
    parent: int | None = None
    forward: int | None = None
    inputs: list[tuple[str, int]] = []
    outputs: list[tuple[str, int]] = []
    tensors: list[_Tensor] = []
    value: _Value | None = None
    grad: _Tensor | None = None


_LINKS_DECODER = msgspec.json.Decoder(_Links)


class Graph:
    """The data flow of one step as columns: a lookup is one pass over int64, 8 bytes a link."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        calls, described, inputs, outputs = (array("q") for _ in range(4))
        for i, line in lines:
            try:
                links = _LINKS_DECODER.decode(line)
                row = [i, links.seq, _or(links.parent), _or(links.forward)]
                tensors = (*links.tensors, links.value, links.grad)
                ids = [t.id for t in tensors if t is not None and t.id is not None]
                columns = (
                    (calls, row),
                    (described, [x for id in ids for x in (id, i)]),
                    (inputs, [x for _, id in links.inputs for x in (id, i)]),
                    (outputs, [x for _, id in links.outputs for x in (id, i)]),
                )
                if max(map(abs, (x for _, c in columns for x in c)), default=0) < BIG:
                    for column, values in columns:
                        column.extend(values)
            except (ValueError, RecursionError, OverflowError, MemoryError):
                continue  # a damaged line has no part in the graph
        self.calls = _columns(calls, 4)
        self.described, self.inputs, self.outputs = (
            _columns(c, 2) for c in (described, inputs, outputs)
        )


def _or(x: int | None) -> int:
    return -1 if x is None else x


def _columns(flat: array[int], width: int) -> Ints:
    import numpy as np

    return np.frombuffer(flat, np.int64).reshape(-1, width).T if flat else np.empty((width, 0), int)
