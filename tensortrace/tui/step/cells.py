"""A row as text: what a record is, its tensor's numbers, its health; every string escaped here.

Pure functions; only rows that are drawn are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from tensortrace.magnitudes import LARGEST
from tensortrace.records import (
    Action,
    Call,
    Finding,
    Line,
    Location,
    Module,
    Optimizer,
    Param,
    Record,
    Step,
    Tensor,
)
from tensortrace.text import (
    SEVERITY_SIGN,
    duration_text,
    escape,
    module_text,
    number_text,
    shape_text,
    short_dtype,
)
from tensortrace.tui.step.row import Lookup, Row

# The health of a call that did not return.
RAISED = ("x raised", "error")


@dataclass(frozen=True, slots=True)
class Cells:
    """The text of a row, escaped; `name` may take the room of what is empty."""

    seq: str
    section: str
    name: str
    kind: str
    shape: str
    dtype: str
    mean: str
    std: str
    norm: str
    min: str
    max: str
    zeros: str
    time: str
    device: str
    where: str
    health: str
    style: str


def shown_tensor(record: Record | None, tensor_of: Lookup) -> Tensor | None:
    """The tensor that a row shows: the output; backward, the gradient that arrived.

    Of a call that gave nothing back, or whose output is described out of sight, nothing is shown:
    what it was given would be taken for what it made.
    """
    match record:
        case Call(phase="backward", inputs=[(_, number), *_]) | Call(outputs=[(_, number), *_]):
            return tensor_of(number)
        case Param(value=value):
            return value
        case Action(tensor=int(number)):
            return tensor_of(number)
    return None


def health(tensor: Tensor | None) -> tuple[str, str]:
    """Say how a tensor is in a sign with a word, and a style: ``("x nan", "error")``."""
    if tensor is None:
        return "", ""
    top = max(abs(tensor.max or 0.0), abs(tensor.min or 0.0))
    # Half of what its dtype can hold is worth a word; TT501 decides.
    large = LARGEST.get(tensor.dtype, float("inf")) / 2
    words = (
        (tensor.nan, "x nan", "error"),
        (tensor.posinf or tensor.neginf, "x inf", "error"),
        (tensor.unmeasured is not None, "? none", "faint"),
        (not tensor.numel, "? empty", "faint"),
        (tensor.max is None, "? none", "faint"),
        (top > large, "! big", "warning"),
        (tensor.zeros == tensor.numel, "0 zero", "ok"),
    )
    return next(((word, style) for holds, word, style in words if holds), (". ok", "ok"))


def worst_health(record: Record | None, tensor_of: Lookup) -> tuple[str, str]:
    """The health of what a record made: one bad output among good ones is bad.

    A bad input of good outputs is a note: a mask of -inf that attention consumes is healthy.
    """
    made = [shown_tensor(record, tensor_of)]
    taken: list[Tensor | None] = []
    match record:
        case Call(phase="backward"):
            made += [tensor_of(number) for _, number in (*record.inputs, *record.outputs)]
        case Call():
            made += [tensor_of(number) for _, number in record.outputs]
            taken = [tensor_of(number) for _, number in record.inputs]
        case Param(grad=grad):
            made.append(grad)
    words = [health(tensor) for tensor in made if tensor is not None]
    for sign in ("x", "!"):
        bad = next((word for word in words if word[0].startswith(sign)), None)
        if bad is not None:
            return bad
    for word, _ in map(health, taken):
        if word.startswith("x"):
            return f"i{word[1:]} in", "note"
    return words[0] if words else ("", "")


def cells(row: Row, tensor_of: Lookup, modules: Mapping[str, Module]) -> Cells:
    """Write a row: every string of the log that it shows is escaped here."""
    record = row.record
    tensor = shown_tensor(record, tensor_of)
    word, style = worst_health(record, tensor_of)
    if isinstance(record, Call) and record.exception is not None:
        word, style = RAISED
    if row.findings:
        first = next(f for f in row.findings if f.severity == row.severity)
        style = first.severity
        word = f"{SEVERITY_SIGN[first.severity]} {escape(first.code)}"
    name, kind = name_of(row, modules)
    host_ns = getattr(record, "host_ns", 0)
    device_ns = record.device_ns if isinstance(record, Call) else None
    return Cells(
        seq="" if row.seq is None else str(row.seq),
        section=row.section,
        name=name,
        kind=kind,
        shape=shape_text(tensor.shape) if tensor else "",
        dtype=short_dtype(tensor.dtype) if tensor else "",
        mean=number_text(tensor.mean) if tensor else "",
        std=number_text(tensor.std) if tensor else "",
        norm=number_text(tensor.norm) if tensor else "",
        min=number_text(tensor.min) if tensor else "",
        max=number_text(tensor.max) if tensor else "",
        zeros=f"{tensor.zeros / tensor.numel:.0%}" if tensor and tensor.numel else "",
        time=duration_text(host_ns) if host_ns else "",
        device="" if device_ns is None else duration_text(device_ns),
        where=short_place(getattr(record, "location", None)),
        health=word,
        style=style,
    )


def name_of(row: Row, modules: Mapping[str, Module]) -> tuple[str, str]:
    """Name a row in two texts: what it is, and more about it (class, values)."""
    named = "damaged line", ""
    match row.record:
        case Call() as call:
            named = _call_name(call, row.inside, modules)
        case Param() as param:
            ratio = number_text(param.update_ratio)
            told = "no gradient" if param.grad is None else f"update {ratio}"
            named = escape(param.name), told if param.changed else "not written"
        case Optimizer() as optimizer:
            rates = " ".join(map(number_text, optimizer.lr[:4]))
            told = f"lr {rates or '-'}, grad norm {number_text(optimizer.grad_norm)}"
            named = f"{escape(optimizer.cls)}.step", told + ", skipped" * optimizer.skipped
        case Action() as action:
            named = escape(action.action), _action_text(action)
        case Line() as line:
            told = ", ".join(f"{escape(v.name)} = {escape(v.text)}" for v in line.changed)
            code = escape((line.location.code or "").strip())
            named = code or short_place(line.location), told
        case Step() as step:
            named = "end of step", _step_text(step)
        case Finding() as finding:
            named = escape(finding.check), escape(finding.message)
    return named


def full_name(record: Record | None, modules: Mapping[str, Module]) -> str:
    """Name a record where it stands alone: a module by its whole path, ``module 4``."""
    name = name_of(Row(record, ""), modules)[0]
    if not isinstance(record, Call) or record.op is not None or record.module is None:
        return name
    module = modules.get(record.module)
    told = module_text(record.module, module.cls if module is not None else None)
    return told if name == escape(record.module) else name


def short_place(location: Location | None) -> str:
    """The file without its folder, and the line: the detail has the whole path."""
    return "" if location is None else f"{escape(PurePath(location.file).name)}:{location.line}"


def _call_name(call: Call, inside: str | None, modules: Mapping[str, Module]) -> tuple[str, str]:
    module = modules.get(call.module) if call.module is not None else None
    notes = [f"#{call.nth + 1}"] if call.nth else []
    notes += ["recomputed"] if call.recompute else []
    notes += ["replayed"] if call.replay else []
    notes += [f"raised {escape(call.exception)}"] if call.exception is not None else []
    if call.op is not None:
        notes += [escape(call.node)] if call.node else []
        return escape(call.op), " ".join(notes)
    path = call.module or ""
    cls = escape(module.cls) if module is not None else ""
    if inside and path.startswith(f"{inside}."):
        path = path[len(inside) + 1 :]
    if call.phase == "backward" and not call.inputs and call.outputs:
        # What arrived at parameters of the module, not at its output.
        names = ", ".join(escape(name) for name, _ in call.outputs)
        return f"{escape(path)}.{names}".lstrip("."), " ".join(["gradient", *notes])
    if module is not None and module.alias is not None:
        notes.append(f"= {escape(module.alias)}")
    return (escape(path), " ".join([cls, *notes])) if path else (cls or "(root)", " ".join(notes))


def _action_text(action: Action) -> str:
    detail = action.detail
    match action.action:
        case "loss":
            return _plain(detail.get("value"))
        case "clip":
            return (
                f"norm {_plain(detail.get('total_norm'))}, limit {_plain(detail.get('max_norm'))}"
            )
        case "fetch":
            waited = detail.get("host_ns")
            return duration_text(waited) if isinstance(waited, int) else ""
    told = ", ".join(f"{escape(str(k))} {_plain(v)}" for k, v in detail.items())
    return " ".join(part for part in (escape(action.of or ""), told) if part)


def _plain(value: object) -> str:
    """Write a value of a detail: short if it is a number, else escaped and one line."""
    if isinstance(value, float):
        return number_text(value)
    return escape(str(value)) if value is not None else "-"


def _step_text(step: Step) -> str:
    told = [f"loss {number_text(step.loss)}", f"grad norm {number_text(step.grad_norm)}"]
    told += [f"lr {number_text(step.lr[0])}"] if step.lr else []
    told += ["skipped"] if step.skipped else []
    told += [f"{count} more of {escape(name)}" for name, count in step.repeats.items()]
    return ", ".join(told)
