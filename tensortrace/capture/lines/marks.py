"""Which lines are to be flagged: the first NaN or infinity of a step, shapes hardly meant to meet.

Both show in the calls that a line made, so they are found when these become records: in the order
in which calls and lines ended, the innermost line that a call ran in is the next one to end around
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from tensortrace.capture.lines.drafts import LineDraft
from tensortrace.checks import FILLS, plain_op
from tensortrace.kinds import DISTANCE_OPS
from tensortrace.records import Call, Line, Record, Tensor

if TYPE_CHECKING:
    from tensortrace.capture.drafts import Draft

_ELEMENTWISE = DISTANCE_OPS | {
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge",
}  # fmt: skip
_MOST = 100_000


class Marks:
    """Flags lines, one step after the other."""

    def __init__(self) -> None:
        self._begin(-1)

    def _begin(self, step: int) -> None:
        self._step = step
        self._shapes: dict[int, tuple[int, ...] | None] = {}
        self._bad: set[int] = set()
        # What ops outside modules made in this step has its shape on purpose.
        self._shaped: set[int] = set()
        # Calls whose line is still running.
        self._spoilt: Call | None = None
        self._found = False
        self._spread: list[Call] = []

    def mark(self, ended: Sequence[Draft], records: dict[int, Record]) -> dict[int, Line]:
        """Flag lines of one step.

        Args:
            ended: drafts, in the order in which they ended.
            records: what they became, by the `id` of the draft.
        Returns:
            The lines that have a flag now, by the `id` of their draft.
        """
        flagged: dict[int, Line] = {}
        for draft in ended:
            record = records[id(draft)]
            if record.step != self._step:
                self._begin(record.step)
            if isinstance(record, Call):
                self._learn(record.tensors)
                if not record.replay:
                    self._look(record)
            elif isinstance(record, Line):
                self._learn(record.tensors)
                flags = self._flags(record, draft) if isinstance(draft, LineDraft) else []
                if flags:
                    flagged[id(draft)] = structs.replace(record, flags=flags)
        return flagged

    def _learn(self, tensors: list[Tensor]) -> None:
        if max(len(self._shapes), len(self._shaped)) > _MOST:
            self._shapes.clear()
            self._shaped.clear()  # with the other, or a shape on purpose would be flagged
        if len(self._bad) > _MOST:
            self._bad.clear()
            self._found = True  # where so much is bad, nothing is the first any more
        for tensor in tensors:
            self._shapes[tensor.id] = tensor.shape

    def _look(self, call: Call) -> None:
        """What a call made that was bad, and out of what."""
        fresh = {tensor.id for tensor in call.tensors if tensor.nonfinite}
        if fresh:
            self._look_at_bad(call, fresh)
        if call.op is None or call.module is not None or call.phase != "forward":
            return
        if self._spreads(call):
            self._spread.append(call)
        self._shaped.update([number for _, number in call.outputs])

    def _look_at_bad(self, call: Call, fresh: set[int]) -> None:
        given = {number for _, number in call.inputs}
        made = {number for _, number in call.outputs} & fresh
        # Memory from `empty` holds whatever was there, and a mask of -inf is meant.
        filled = call.op is not None and plain_op(call.op) in FILLS
        # What is bad since the forward, weights that were so before, is bad in the backward, too.
        late = call.phase == "backward" and self._bad
        if made and not given & (self._bad | fresh) and not (self._found or filled or late):
            self._found = True
            self._spoilt = call
        self._bad |= fresh

    def _spreads(self, call: Call) -> bool:
        """Whether [N] meets [N, 1], so that every element meets every other one."""
        if call.op not in _ELEMENTWISE or len(call.inputs) < 2:
            return False
        ids = [number for _, number in call.inputs[:2]]
        low, high = sorted(ids, key=lambda number: len(self._shapes.get(number) or ()))
        narrow, wide = self._shapes.get(low), self._shapes.get(high)
        if narrow is None or wide != (*narrow, 1) or math.prod(narrow) < 2 or narrow[-1] < 2:
            return False
        return call.op in DISTANCE_OPS or high not in self._shaped

    def _flags(self, line: Line, draft: LineDraft) -> list[Any]:
        fresh = {tensor.id for tensor in line.tensors if tensor.nonfinite}
        if not fresh and self._spoilt is None and not self._spread:
            return []

        def inside(call: Call) -> bool:
            if line.what != "line" or line.thread != call.thread:
                return False
            if draft.first <= call.seq < draft.end:
                return True
            # In an execution that was passed over, as were the lines around it.
            return draft.since <= call.seq < line.seq and call.location == line.location

        flags: list[Any] = []
        if self._spoilt is not None and inside(self._spoilt):
            self._spoilt = None
            flags.append("nonfinite")
        elif fresh and line.what == "line" and not self._bad and not self._found:
            # Made where no call was seen: data that came in, code inside a module.
            self._found = True
            flags.append("nonfinite")
        self._bad |= fresh
        if any(inside(call) for call in self._spread):
            self._spread = [call for call in self._spread if not inside(call)]
            flags.append("broadcast")
        return flags
