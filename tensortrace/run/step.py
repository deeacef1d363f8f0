"""One step of a log: its lines, decoded one by one as they are asked for."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

from tensortrace.log import KINDS, OTHER, Damaged, LogFile, Unknown, decode, scan_chunk
from tensortrace.records import (
    Action,
    Call,
    Finding,
    Line,
    Optimizer,
    Param,
    Record,
    Step,
    Tensor,
)
from tensortrace.run.graph import BIG, Graph

if TYPE_CHECKING:
    from tensortrace.run.graph import Ints

R = TypeVar("R", bound=Record)

# So much of one step is decoded at once: a run without steps (all in step 0) stays readable.
STEP_NBYTES = 32 << 20
# What a thin step leaves out, and writes after its step line if the next step has a finding.
_LATE = ("call", "param", "line")
# What there may be without bound.
_MANY = (*_LATE, "action")
_SEQ = re.compile(rb'"seq":\s*(\d{1,18})')


class StepRecords:
    """All records of one step; nothing is decoded before it is asked for.

    `number` is the step. ``len(step)`` counts its lines; `record(i)` decodes one of them, `kind(i)`
    tells it without decoding and `indices("call")` lists some, so that a screen pays for the rows
    it shows only. `starts` and `stops` have the byte offsets of the lines, int64 ``(len,)``.
    Lines stand in the order of their seqs: what was written after the step line, once the next step
    had a finding, is put where it belongs.
    The lists (`records`, `calls`, ...) decode everything of their kind, but for `truncated` calls,
    parameters, source lines and actions past the first 32 MB of a step: `record(i)` reaches those.
    """

    def __init__(self, file: LogFile, number: int, start: int, stop: int) -> None:
        import numpy as np

        self.number = number
        self.start, self.stop = start, stop
        self._file = file
        starts, kinds, at = [], [], start
        while (chunk := scan_chunk(file, at, stop)) is not None:
            starts.append(chunk.starts)
            kinds.append(chunk.kinds)
            at = chunk.end
        raw: Ints = np.concatenate([*starts, np.array([at], np.int64)])
        self.starts, self.stops = raw[:-1], raw[1:]
        self._kinds = np.concatenate([*kinds, np.empty(0, np.uint8)])
        self._block = (0, b"")
        self._late = 0
        self._put_in_order()
        many = np.isin(self._kinds, [KINDS.index(kind) for kind in _MANY])
        self._left_out = many & (self.starts - start > STEP_NBYTES)
        self.truncated = int(np.count_nonzero(self._left_out))

    def _put_in_order(self) -> None:
        """Put what a thin step wrote after its step line between what every step writes."""
        import numpy as np

        closing, late = self.indices("step"), self.indices(*_LATE)
        if not len(closing) or not len(late) or late[0] < closing[-1]:
            return
        early, held = range(closing[-1] + 1), late.tolist()
        places = [bisect_left(held, self.seq(i), key=self.seq) for i in early]
        # What has no seq, as a module, stays after what it was written after.
        order = np.insert(late, np.maximum.accumulate(places), early)
        order = np.append(order, np.setdiff1d(np.arange(len(self)), order))
        self.starts, self.stops = self.starts[order], self.stops[order]
        self._kinds, self._late = self._kinds[order], len(late)

    def __len__(self) -> int:
        return len(self._kinds)

    def kind(self, i: int) -> str:
        """Tell the kind of line `i` from its first bytes; "" if it is damaged or unknown."""
        kind = int(self._kinds[i])
        return KINDS[kind] if kind < OTHER else ""

    def indices(self, *kinds: str) -> Ints:
        """List the lines of some kinds, in order."""
        import numpy as np

        wanted = [KINDS.index(kind) for kind in kinds]
        return np.flatnonzero(np.isin(self._kinds, wanted)).astype(np.int64)

    def line(self, i: int) -> bytes:
        """The bytes of line `i` as they are in the log, without newline."""
        low, high = int(self.starts[i]), int(self.stops[i]) - 1
        start, block = self._block
        if not start <= low <= high <= start + len(block):
            start, block = low, self._file.read(low, max(high - low, 1 << 16))
            self._block = (start, block)
        return block[low - start : high - start]

    def seq(self, i: int) -> int:
        """The seq of line `i`, found without decoding; 0 if it has none."""
        found = _SEQ.search(self.line(i))
        return int(found[1]) if found else 0

    def record(self, i: int) -> Record | None:
        """Decode line `i`; None if it is damaged or of an unknown kind."""
        found = decode(self.line(i))
        return None if isinstance(found, Unknown | Damaged) else found

    def _of(self, cls: type[R], *kinds: str) -> list[R]:
        records = (
            self.record(int(i))
            for i in (self.indices(*kinds) if kinds else range(len(self)))
            if not self._left_out[i]
        )
        return [r for r in records if isinstance(r, cls)]

    @cached_property
    def records(self) -> list[Record]:
        """Everything, in order."""
        return self._of(Record)

    @cached_property
    def calls(self) -> list[Call]:
        """Calls of modules and ops, in order."""
        return self._of(Call, "call")

    @cached_property
    def params(self) -> list[Param]:
        """Parameters at the optimizer steps."""
        return self._of(Param, "param")

    @cached_property
    def actions(self) -> list[Action]:
        """What the loop did besides calls."""
        return self._of(Action, "action")

    @cached_property
    def optimizers(self) -> list[Optimizer]:
        """Optimizer steps."""
        return self._of(Optimizer, "optimizer")

    @cached_property
    def lines(self) -> list[Line]:
        """Executed source lines."""
        return self._of(Line, "line")

    @cached_property
    def findings(self) -> list[Finding]:
        """Findings written in this step."""
        return self._of(Finding, "finding")

    @cached_property
    def summary(self) -> Step | None:
        """The line that closes the step; None while it is not closed."""
        found = self._of(Step, "step")
        return found[-1] if found else None

    @property
    def kept(self) -> Literal["all", "some", "none"]:
        """How many of its calls are in the log: a thin step has them if the next has a finding."""
        summary = self.summary
        if summary is None or summary.full or summary.dropped <= self._late:
            return "all"
        return "some" if len(self.indices("call")) else "none"

    @cached_property
    def tensors(self) -> dict[int, Tensor]:
        """Every tensor that the calls, lines and parameters of the step describe, by id."""
        found: dict[int, Tensor] = {}
        described = [*(call.tensors for call in self.calls), *(line.tensors for line in self.lines)]
        for tensors in described:
            found.update((t.id, t) for t in tensors)
        for param in self.params:
            found.update((t.id, t) for t in (param.value, param.grad) if t is not None)
        return found

    # -- data flow, one line decoded per answer

    @cached_property
    def _graph(self) -> Graph:
        kinds = ("call", "param", "line")
        return Graph((int(i), self.line(int(i))) for i in self.indices(*kinds))

    def tensor(self, id: int | None) -> Tensor | None:
        """The tensor of that id, as it was described last."""
        for i in reversed(self._rows(self._graph.described, id)):
            record = self.record(i)
            if isinstance(record, Call | Line):
                tensors: Sequence[Tensor | None] = record.tensors
            elif isinstance(record, Param):
                tensors = (record.value, record.grad)
            else:
                continue
            for tensor in tensors:
                if tensor is not None and tensor.id == id:
                    return tensor
        return None

    def producer(self, id: int | None) -> Call | None:
        """The innermost call that has the tensor among its outputs; None if none of them has."""
        makers = self._calls_at(self._rows(self._graph.outputs, id))
        # Of two nested calls that return the same tensor the inner one is entered last, so it has
        # the larger seq; one that only passes on what it was given did not make it.
        makers = [c for c in makers if all(name_id[1] != id for name_id in c.inputs)] or makers
        return max(makers, key=lambda c: c.seq, default=None)

    def consumers(self, id: int | None) -> list[Call]:
        """The calls that have the tensor among their inputs, in order."""
        return self._calls_at(self._rows(self._graph.inputs, id))

    def call(self, seq: int | None) -> Call | None:
        """The call of that seq."""
        found = self._calls_at(self._rows(self._graph.calls[1::-1], seq))
        return found[0] if found else None

    def parent(self, call: Call) -> Call | None:
        """The call that this one ran inside."""
        return self.call(call.parent)

    def children(self, seq: int | None) -> list[Call]:
        """The calls that ran directly inside a call; of None the outermost ones."""
        return self._calls_at(self._rows(self._graph.calls[2::-2], -1 if seq is None else seq))

    def backward_of(self, seq: int | None) -> list[Call]:
        """The backward and recomputed calls that belong to a forward call."""
        return self._calls_at(self._rows(self._graph.calls[3::-3], seq))

    def _rows(self, pairs: Ints, key: int | None) -> list[int]:
        """Lines that `pairs` (keys above line numbers) has for a key, without repetition."""
        if key is None or not -BIG < key < BIG:
            return []
        return list(dict.fromkeys(pairs[1][pairs[0] == key].tolist()))

    def _calls_at(self, rows: list[int]) -> list[Call]:
        return [r for r in map(self.record, rows) if isinstance(r, Call)]
