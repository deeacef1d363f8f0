"""One tensor over the steps: the same name, at the same call, in every step that was kept whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from tensortrace.records import Call, Param, Record, Tensor
from tensortrace.run import Run, StepRecords
from tensortrace.tui.span import Span
from tensortrace.tui.step.flow import Flow, described_tensor
from tensortrace.tui.step.row import Row, site_of
from tensortrace.tui.step.rows import StepRows

Side = Literal["inputs", "outputs", "value", "grad"]
# Steps of a column that are looked at for one that was kept whole.
MOST_STEPS = 256


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a row: what a person calls it, and where it is in the log."""

    label: str
    record: Record
    side: Side
    name: str
    tensor: Tensor
    gradient: bool = False


def held_of(row: Row, rows: StepRows) -> list[Held]:
    """Every tensor of a row and the gradients that belong to them, outputs first."""
    record = row.record
    if isinstance(record, Param):
        held = [Held("value", record, "value", "value", record.value)]
        if record.grad is not None:
            held.append(Held("gradient", record, "grad", "gradient", record.grad, True))
        return held
    if not isinstance(record, Call):
        return []
    if record.phase == "backward":
        found = [*_named(record, "inputs", rows, "gradient of ", True)]
        found += _named(record, "outputs", rows, "gradient to ", True)
        at = rows.at_seq(record.forward)
        forward = rows.record(at) if at is not None else None
        return found + (_named(forward, "outputs", rows, "") if isinstance(forward, Call) else [])
    found = [*_named(record, "outputs", rows, "")]
    for call in rows.backward_of(record.seq):
        found += _named(call, "inputs", rows, "gradient of ", True)
    return found + _named(record, "inputs", rows, "")


def _named(
    call: Call, side: Literal["inputs", "outputs"], rows: StepRows, prefix: str, grad: bool = False
) -> list[Held]:
    found = []
    for name, number in getattr(call, side):
        tensor = rows.tensor_near(0, number)
        if tensor is not None:
            found.append(Held(prefix + name, call, side, name, tensor, grad))
    return found


def beside(held: Held, others: list[Held]) -> Held | None:
    """The gradient of a value, the value of a gradient: of several the one of the same name."""
    across = [other for other in others if other.gradient != held.gradient]
    if isinstance(held.record, Param):
        return across[0] if across else None
    across = [other for other in across if other.side != "inputs" or other.gradient]
    same = [other for other in across if _bare(other.name) == _bare(held.name)]
    only = (
        across[0]
        if (len(across) == 1 and held.side != "inputs") or (held.gradient and across)
        else None
    )
    return same[0] if same else only


def _bare(name: str) -> str:
    """A name without the index of the first: ``output`` and ``output[0]`` are the same."""
    return name.removesuffix("[0]")


def tensor_in(step: StepRecords, held: Held) -> Tensor | None:
    """The tensor of the same name at the same call of another step."""
    site, near = site_of(held.record), _pattern(held.record)
    for line in step.indices("call", "param").tolist():
        if near is not None and not near.search(step.line(line)):
            continue
        record = step.record(line)
        if record is None or site_of(record) != site:
            continue
        if isinstance(record, Param):
            return record.value if held.side == "value" else record.grad
        number = dict(getattr(record, held.side)).get(held.name)
        if number is None:
            return None
        return described_tensor(number, [record]) or described_tensor(
            number, Flow(step).about([number])
        )
    return None


def _pattern(record: Record) -> re.Pattern[bytes] | None:
    """What a line of the record must hold, to be found without decoding the others."""
    name = record.name if isinstance(record, Param) else getattr(record, "module", None)
    if name is None:
        return None
    return re.compile(rb'"(?:module|name)":\s*' + re.escape(msgspec.json.encode(name)))


def over_steps(
    run: Run, span: Span, held: list[Held], cancelled: Callable[[], bool]
) -> Iterator[tuple[int, list[Tensor | None]]]:
    """The same tensors in a step of every column, as (column, tensors); from the last one back."""
    last = run.last_step()
    for column in range(span.columns - 1, -1, -1):
        steps = span.steps(column)
        low, stop = (
            max(steps.start, run.first_step()),
            min(steps.stop, last + 1, steps.start + MOST_STEPS),
        )
        for start in range(low, stop, 16):
            if cancelled():
                return
            kept = [s.step for s in run.heads(start, min(stop, start + 16)) if s.full]
            if kept:
                records = run.step(kept[0])
                yield column, [tensor_in(records, one) for one in held]
                break
