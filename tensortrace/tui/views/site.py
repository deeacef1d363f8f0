"""One tensor over the steps: the same name, at the same call, in the steps that were kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from tensortrace.records import Call, Param, Record, Step, Tensor, from_scalar
from tensortrace.run import Run, StepRecords
from tensortrace.tui.span import Span
from tensortrace.tui.step.flow import Flow, described_tensor
from tensortrace.tui.step.row import Row, site_of
from tensortrace.tui.step.rows import StepRows

Side = Literal["inputs", "outputs", "value", "grad"]
# Steps of a column that are looked at for some that were kept, and those of them that are read.
MOST_STEPS, MOST_LOOKED = 256, 8


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
    run: Run, span: Span, held: list[Held], here: int, cancelled: Callable[[], bool]
) -> Iterator[tuple[int, list[Tensor | None]]]:
    """The same tensors in a step of every column, as (column, tensors); from the last one back.

    Of a column that is one in which the tensor is not finite, else the step `here`, which the
    tensors are of, else the first one that was kept.
    """
    last = run.last_step()
    for column in range(span.columns - 1, -1, -1):
        steps = span.steps(column)
        low, stop = (
            max(steps.start, run.first_step()),
            min(steps.stop, last + 1, steps.start + MOST_STEPS),
        )
        kept: list[Step] = []
        for start in range(low, stop, 16):
            if cancelled():
                return
            lines = run.summaries(start, min(stop, start + 16))
            kept += [line for line in lines if run.has_calls(line)]
        looked: list[list[Tensor | None]] = []
        if here in steps:
            looked.append([one.tensor for one in held])
        for number in _worth_reading(kept, held[0].record, here):
            if cancelled():
                return
            if looked and all(t is not None and t.nonfinite for t in _worst_of(looked)):
                break
            looked.append([tensor_in(run.step(number), one) for one in held])
        if looked:
            yield column, _worst_of(looked)


def _worth_reading(kept: list[Step], record: Record, here: int) -> list[int]:
    """The steps of a column to read beside `here`: the first, and what may be not finite."""
    suspects = sorted(kept, key=lambda line: -_suspicion(line, record))[:MOST_LOOKED]
    suspects = [line for line in suspects if _suspicion(line, record)]
    return [n for n in dict.fromkeys(line.step for line in (*kept[:1], *suspects)) if n != here]


def _suspicion(line: Step, record: Record) -> int:
    """Tell from a step line whether a tensor of a record may be not finite: 2 if its module is."""
    path = getattr(record, "module", None)
    bad = {name for name, flags in zip(line.modules.path, line.modules.flags, strict=False)
           if "n" in flags or "i" in flags}  # fmt: skip
    loss = from_scalar(line.loss)
    return 2 if path in bad else int(bool(bad) or not (loss is None or math.isfinite(loss)))


def _worst_of(looked: list[list[Tensor | None]]) -> list[Tensor | None]:
    """Of each tensor in some steps the first that is not finite, else the first."""
    known = [[t for t in tensors if t is not None] for tensors in zip(*looked, strict=True)]
    return [next((t for t in held if t.nonfinite), held[0] if held else None) for held in known]
