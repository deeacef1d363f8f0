"""The numbers of a run as CSV (RFC 4180), for a spreadsheet, pandas or R.

Parts, each a table with a first row of names:
    layers: one row per step and module, from the step lines; the columns of `ModuleColumns`, and
        the step's loss, gradient norm and learning rates.
    steps: one row per step.
    tensors: one row per tensor that a call or a parameter describes, from full steps.
    findings: one row per finding, in order of cause.
An empty cell is a number that was not seen; the path of the root module is empty, too. NaN and
infinity are written NaN, Infinity, -Infinity. Every row is one line: control characters are written
as ``\\x0a``. A text that a spreadsheet would take for a formula has an apostrophe in front.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat, zip_longest
from typing import TYPE_CHECKING, Any, TextIO

from tensortrace.export.contents import matches, read_to_the_end, step_lines
from tensortrace.export.exporter import Exporter, Wanted, collect
from tensortrace.log import MAX_STEP
from tensortrace.records import COLUMNS, Call, Param, Tensor
from tensortrace.text import escape

if TYPE_CHECKING:
    from tensortrace.run import Run

Row = Sequence[object]

_OF_STEP = ("loss", "grad_norm", "lr")
_NOTHING = (None,) * len(COLUMNS)
_OF_TENSOR = (
    "id", "shape", "dtype", "device", "requires_grad", "numel", "nan", "posinf", "neginf", "zeros",
    "min", "max", "mean", "std", "norm",
)  # fmt: skip
_OF_FINDING = (
    "id", "update", "code", "check", "severity", "phase", "module", "op", "param", "seq", "tensor",
    "message", "value", "limit",
)  # fmt: skip
NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("rank", "step", "module", "class", *COLUMNS, *_OF_STEP),
    "steps": ("rank", "step", "update", "full", "time_ns", "host_ns", *_OF_STEP, "skipped",
              "records", "dropped", "findings_again"),
    "tensors": ("rank", "step", "seq", "phase", "module", "class", "op", "nth", "role", "name",
                *_OF_TENSOR, "update_ratio"),
    "findings": ("rank", "step", *_OF_FINDING, "file", "line", "function", "source", "explanation",
                 "fix", "later_steps"),
}  # fmt: skip

# What a spreadsheet begins a formula with, at the start of a cell or of what it may cut off as one
# (OWASP, CSV injection; a semicolon separates cells where the comma is decimal).
_FORMULA = re.compile("(^|[;|])([=+\\-@\uff1d\uff0b\uff0d\uff20])")
_NUMBERS = frozenset(("NaN", "Infinity", "-Infinity"))


def write_table(runs: Sequence[Run], wanted: Wanted, out: TextIO) -> None:
    """Write a part of the logs of one run, row by row; `wanted.what` is one of `NAMES`."""
    what = wanted.what or "layers"
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(NAMES[what])
    writer.writerows(_ROWS[what](runs, wanted))


def safe_cell(text: str) -> str:
    """Write a text so that it is one line and no spreadsheet runs it; numbers stay as they are."""
    text = escape(text)
    if not text or text in _NUMBERS or not _FORMULA.search(text):
        return text
    return text if _is_number(text) else _FORMULA.sub(r"\1'\2", text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _layers(runs: Sequence[Run], wanted: Wanted) -> Iterator[Row]:
    for run in runs:
        read_to_the_end(run)
        modules, rank = run.modules, run.header.rank
        # What is written of a module in every step, None where it is not wanted.
        named: dict[str, tuple[str, str] | None] = {}
        for line in step_lines(run, wanted.steps):
            wanted.tick(line.step)
            of_step = _of_step(line)
            table = line.modules
            # An array may be shorter than `path` in a log that another program wrote.
            columns = zip_longest(*(getattr(table, name) for name in COLUMNS))
            for path, values in zip(table.path, chain(columns, repeat(_NOTHING))):  # noqa: B905
                if path not in named:
                    known = modules.get(path)
                    cells = safe_cell(path), safe_cell(known.cls if known else "")
                    named[path] = cells if matches(modules, path, wanted.modules) else None
                cells_of = named[path]
                if cells_of is not None:
                    flags = safe_cell(values[-1] or "")
                    yield (rank, line.step, *cells_of, *values[:-1], flags, *of_step)


def _steps(runs: Sequence[Run], wanted: Wanted) -> Iterator[Row]:
    for run in runs:
        for line in step_lines(run, wanted.steps):
            wanted.tick(line.step)
            yield (
                run.header.rank, line.step, line.update, line.full, line.time_ns or None,
                line.host_ns or None, *_of_step(line), line.skipped, line.records, line.dropped,
                sum(line.repeats.values()),
            )  # fmt: skip


def _of_step(line: Any) -> tuple[object, ...]:
    """The loss, the gradient norm and the learning rates of a step, those apart by spaces."""
    rates = line.lr
    if len(rates) != 1:
        rates = [" ".join("-" if rate is None else str(rate) for rate in rates)]
    return line.loss, line.grad_norm, rates[0]


def _tensors(runs: Sequence[Run], wanted: Wanted) -> Iterator[Row]:
    start, stop = (wanted.steps.start, wanted.steps.stop) if wanted.steps else (0, MAX_STEP)
    for run in runs:
        read_to_the_end(run)
        modules = run.modules
        for record in run.records(start, stop, kinds=("call", "param")):
            wanted.tick(record.step)
            if not isinstance(record, (Call, Param)):
                continue
            if not matches(modules, record.module, wanted.modules):
                continue
            known = modules.get(record.module) if record.module is not None else None
            module = None if record.module is None else safe_cell(record.module)
            place = (run.header.rank, record.step, record.seq)
            of_module = (module, safe_cell(known.cls) if known else None)
            if isinstance(record, Call):
                op = None if record.op is None else safe_cell(record.op)
                call = (*place, record.phase, *of_module, op, record.nth)
                for tensor, role, name in _of_call(record):
                    yield (*call, role, safe_cell(name), *_of_tensor(tensor), None)
            else:
                owner = (*place, "optimizer", *of_module, None, None)
                name = safe_cell(record.name)
                yield (*owner, "param", name, *_of_tensor(record.value), record.update_ratio)
                if record.grad is not None:
                    yield (*owner, "grad", name, *_of_tensor(record.grad), None)


def _of_call(call: Call) -> Iterator[tuple[Tensor, str, str]]:
    """The tensors that a call describes, each with its role and its name in it."""
    inputs, outputs = ({id: name for name, id in reversed(pairs)}
                       for pairs in (call.inputs, call.outputs))  # fmt: skip
    for tensor in call.tensors:
        role = "input" if tensor.id in inputs else "output" if tensor.id in outputs else ""
        name = inputs.get(tensor.id, outputs.get(tensor.id, ""))
        yield tensor, "grad" if call.phase == "backward" else role, name


def _of_tensor(tensor: Tensor) -> Row:
    shape = None if tensor.shape is None else "x".join(map(str, tensor.shape)) or "scalar"
    return (tensor.id, shape, safe_cell(tensor.dtype), safe_cell(tensor.device),
            *(getattr(tensor, name) for name in _OF_TENSOR[4:]))  # fmt: skip


def _findings(runs: Sequence[Run], wanted: Wanted) -> Iterator[Row]:
    for one in collect(runs, wanted).shown:
        finding = one.finding
        at = finding.location
        where = (None,) * 4 if at is None else (at.file, at.line, at.function, at.code)
        ranks = one.ranks[0] if len(one.ranks) == 1 else " ".join(map(str, one.ranks))
        cells = (
            ranks, finding.step, *(getattr(finding, name) for name in _OF_FINDING), *where,
            finding.explanation, finding.fix, one.later,
        )  # fmt: skip
        yield [safe_cell(cell) if isinstance(cell, str) else cell for cell in cells]


_ROWS: dict[str, Callable[[Sequence[Run], Wanted], Iterator[Row]]] = {
    "layers": _layers, "steps": _steps, "tensors": _tensors, "findings": _findings,
}  # fmt: skip
EXPORTER = Exporter(
    suffix=".csv",
    summary="the numbers: a row per step and module; other tables with --what",
    write=write_table,
    beginnings=tuple(",".join(names) for names in NAMES.values()),
    parts=tuple(NAMES),
)
