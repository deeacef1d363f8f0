"""The terms that a loss is the sum of, and the calls that each comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tensortrace.causes import MOVES, plain_op
from tensortrace.records import Call, Tensor

# What a sum of losses is made with, weighted or not.
_SUMS = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub", "neg", "sum", "mean", "stack"))
_WEIGHTS = frozenset(("mul", "imul", "rmul", "div", "truediv", "idiv", "itruediv"))


def is_linear(call: Call) -> bool:
    """Whether a call adds, averages, or weighs by a number."""
    word = plain_op(call.op)
    return word in _SUMS or (word in _WEIGHTS and len({given for _, given in call.inputs}) == 1)


def hands_on(call: Call) -> bool:
    """Whether a call hands the values of its input on: it views, copies or casts them."""
    return plain_op(call.op) in MOVES


class Sum(NamedTuple):
    """What a loss is the sum of: terms that calls have made, and the ids of what none has."""

    terms: list[tuple[int, Call]]
    given: set[int]


def sum_of(loss: int, calls: Sequence[Call], tensors: Mapping[int, Tensor]) -> Sum:
    """The terms of a loss. Hot.

    Args:
        loss: its id.
        calls: the forward calls of the step, in order of seq.
        tensors: of the step, by id.
    """
    wanted, terms = {loss}, []
    for call in reversed(calls):
        # The loss is made of few, near the end.
        if not wanted:
            break
        if call.parent is not None or call.recompute:
            continue
        for id in _made(call):
            if id not in wanted:
                continue
            wanted.discard(id)
            if id not in tensors:
                continue
            if tensors[id].requires_grad and is_linear(call):
                wanted.update(given for _, given in call.inputs)
            elif id != loss:
                terms.append((id, call))
    return Sum(terms, wanted)


def makers(calls: Iterable[Call]) -> dict[int, Call]:
    """The outermost call that made each tensor, by id."""
    return {id: call for call in calls if call.parent is None and not call.recompute
            for id in _made(call)}  # fmt: skip


def behind(id: int, made: Mapping[int, Call], tensors: Mapping[int, Tensor]) -> set[int]:
    """The ids of the tensors that a tensor comes from, itself too, also past where it is cut off.

    Args:
        id: of the tensor.
        made: from `makers`.
        tensors: of the step, by id.
    """
    todo, seen = [id], {id}
    while todo:
        id = todo.pop()
        call, tensor = made.get(id), tensors.get(id)
        new = {given for _, given in call.inputs} if call is not None else set[int]()
        if call is None and tensor is not None and tensor.view_of is not None:
            new.add(tensor.view_of)
        new -= seen
        seen |= new
        todo += new
    return seen


def _made(call: Call) -> Iterator[int]:
    """The ids of what a call has made, and not handed on."""
    return (id for _, id in call.outputs if all(id != given for _, given in call.inputs))
