"""The detail of a row as lines: the finding there, every tensor's statistics, gradient, source.

Pure: it takes records and a width and gives styled lines; every string of the log is escaped here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping

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
    Source,
    Step,
    Tensor,
)
from tensortrace.text import (
    SEVERITY_SIGN,
    duration_text,
    escape,
    location_text,
    module_text,
    nbytes_text,
    number_text,
    shape_text,
    short_dtype,
)
from tensortrace.tui.step.cells import health, name_of, short_place
from tensortrace.tui.step.distribution import distribution_lines
from tensortrace.tui.step.profile import profile_lines
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import (
    UNICODE,
    Glyphs,
    Styled,
    clip,
    cut,
    fit,
    wrapped,
)

# A message or text of the log is shown up to here; the whole of it is in the log.
LONGEST = 4000
TABLE_WIDTH = 100
# Cells before a line of code: the sign and the number.
CODE_FROM = 7


def detail_lines(
    row: Row,
    held: StepRows,
    modules: Mapping[str, Module],
    source: Source | None,
    width: int,
    *,
    glyphs: Glyphs = UNICODE,
) -> list[Styled]:
    """Tell everything about a row, the most important first.

    Args:
        source: the stored function that holds the row's line, for a snippet of three lines.
        width: in terminal cells; long texts wrap to it.
    """
    lines: list[Styled] = []
    for finding in row.findings:
        lines += finding_lines(finding, modules, width, glyphs)
    record = row.record
    lines += wrapped(_headline(row, modules), width, 2)
    lines += stat_lines(_tensors(row, held), width)
    lines += distribution_lines(_tensors(row, held), width, glyphs)
    for text in _facts(record):
        lines += wrapped([("  " + text, "")], width, 4)
    location = location_of(row)
    if location is not None:
        place = [(location_text(location), "strong"), _in_function(location)]
        lines += wrapped(place, width, 2)
        lines += snippet(location, source, 1, glyphs, width)
    return lines


def location_of(row: Row) -> Location | None:
    """The user's source line of a row: its own, or that of a finding at it."""
    location = getattr(row.record, "location", None)
    if isinstance(location, Location):
        return location
    return next((f.location for f in row.findings if f.location is not None), None)


def finding_lines(
    finding: Finding, modules: Mapping[str, Module], width: int, glyphs: Glyphs = UNICODE
) -> list[Styled]:
    """Tell a finding: headline, why, what to do, how sure the place is, the chain of causes."""
    glyph = SEVERITY_SIGN[finding.severity]
    head = f"{glyph} {escape(finding.code)} {escape(finding.check)}: "
    lines: list[Styled] = [
        [(line, finding.severity)] for line in wrap(head, finding.message, width)
    ]
    cls = _cls(finding.module, modules)
    where = ["outside every module" if finding.module is None else module_text(finding.module, cls)]
    where = [escape(part) for part in (finding.op, finding.param) if part] + where
    placed = finding.evidence.get("placed")
    sure = f" (place is {placed})" if isinstance(placed, str) else ""
    lines += _labelled("at", ", ".join(where) + sure, width)
    if finding.location is not None:
        lines += _line("line", finding.location, width, glyphs)
        if finding.location.caller is not None:
            lines += _line("call", finding.location.caller, width, glyphs)
    lines += _labelled("why", finding.explanation, width)
    lines += _labelled("fix", finding.fix, width)
    for link in finding.chain:
        code = escape((link.location.code or "").strip()) if link.location else ""
        seq = "" if link.seq is None else f"#{link.seq} "
        lines += wrapped([
            ("  from ", "faint"), (f"{seq}{escape(link.op or 'call')}  ", ""),
            (short_place(link.location), "faint"), (f"  {code}" if code else "", ""),
        ], width, len("  from "))  # fmt: skip
    lines += profile_lines(finding, width, glyphs)
    if len(finding.chain) > 1:
        lines.append([("       c walks these causes", "faint")])
    return lines


def _line(label: str, location: Location, width: int, glyphs: Glyphs) -> list[Styled]:
    place, head = short_place(location), f"  {label} "
    code, *more = wrap(f"{head}{place}  ", (location.code or "").strip(), width)
    first: Styled = [(head, "faint"), (place, ""), (code[len(head + place) :], "strong")]
    return [cut(first, width, glyphs), *([(line, "strong")] for line in more)]


def _labelled(label: str, text: str, width: int) -> list[Styled]:
    first, *rest = wrap(" " * 7, text, width) or [""]
    return [[(f"  {label:<5}", "faint"), (first[7:], "")], *([(line, "")] for line in rest)]


def wrap(head: str, text: str, width: int) -> list[str]:
    """Escape a text, put a head before it and break it into lines that hang under the head."""
    if len(text) > LONGEST:
        text = text[:LONGEST] + f" … {len(text) - LONGEST} more characters"
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        indent = "       " if lines else head
        lines += textwrap.wrap(
            escape(line),
            max(20, width),
            initial_indent=indent,
            subsequent_indent="       ",
            break_on_hyphens=False,
        ) or [indent]
    return lines


def _cls(path: str | None, modules: Mapping[str, Module]) -> str | None:
    module = modules.get(path) if path is not None else None
    return None if module is None else escape(module.cls)


def _in_function(location: Location) -> tuple[str, str]:
    return (f"  in {escape(location.function)}", "faint")


def _headline(row: Row, modules: Mapping[str, Module]) -> Styled:
    record = row.record
    name, more = name_of(row, modules)
    if isinstance(record, Call) and record.module is not None and record.op is None:
        name = module_text(record.module, _cls(record.module, modules))
    line: Styled = [(name, "strong"), (f"  {more}" if more else "", "op")]
    if isinstance(record, Call):
        told: list[str] = [record.phase]
        told += [duration_text(record.host_ns)] if record.host_ns else []
        if record.device_ns is not None:
            told.append(f"{duration_text(record.device_ns)} on the GPU")
        if record.allocated is not None:
            told.append(f"GPU memory {nbytes_text(record.allocated)}")
        told += ["training" if record.training else "eval"] if record.training is not None else []
        told += [] if record.grad_enabled else ["no grad"]
        told += [f"autocast {escape(record.autocast)}"] if record.autocast else []
        if record.op and record.module is not None:
            told.append(f"in {module_text(record.module, _cls(record.module, modules))}")
        line.append(("  " + ", ".join(told), "faint"))
    return line


def _tensors(row: Row, held: StepRows) -> Iterator[tuple[str, Tensor]]:
    """Name every tensor of a row: outputs, the gradients that reached them, inputs."""
    match row.record:
        case Call(phase="backward") as call:
            yield from _named(call.inputs, held, "grad of ")
            yield from _named(call.outputs, held, "grad to ")
        case Call() as call:
            yield from _named(call.outputs, held, "")
            for other in held.backward_of(call.seq):
                yield from _named(other.inputs, held, "grad of ")
            yield from _named(call.inputs, held, "")
        case Param(value=value, grad=grad):
            yield "value", value
            if grad is not None:
                yield "gradient", grad
        case Action() as action:
            tensor = held.tensor_near(0, action.tensor)
            if tensor is not None:
                yield escape(action.action), tensor


def _named(
    names: Iterable[tuple[str, int]], held: StepRows, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    for name, number in names:
        tensor = held.tensor_near(0, number)
        if tensor is not None:
            yield prefix + escape(name), tensor


def stat_lines(tensors: Iterable[tuple[str, Tensor]], width: int) -> list[Styled]:
    """Tell what tensors were: one line each where there is room for a table, else two."""
    held = list(tensors)
    if not held:
        return []
    if width < TABLE_WIDTH:
        return [line for name, tensor in held for line in _stat_block(name, tensor, width)]
    wide = min(24, max(len(name) for name, _ in held))
    shapes = max(5, *(min(24, len(shape_text(tensor.shape))) for _, tensor in held))
    titles = ["nan", "inf", "zeros", "min", "max", "mean", "std", "norm"]
    room = min(9, (width - wide - shapes - 20) // len(titles))
    table = [(name, tensor, _stat_texts(tensor)) for name, tensor in held]
    if any(len(text) >= room for _, _, texts in table for text in texts):  # they would touch
        return [line for name, tensor in held for line in _stat_block(name, tensor, width)]
    head = f"  {'':<{wide}}  {'shape':<{shapes}} dtype " + "".join(f"{t:>{room}}" for t in titles)
    lines: list[Styled] = [[(head, "faint")]]
    for name, tensor, texts in table:
        word, style = health(tensor)
        shape = fit(shape_text(tensor.shape), shapes)
        line: Styled = [(f"  {fit(name, wide)}  {shape} {short_dtype(tensor.dtype):<5} ", "")]
        for at, text in enumerate(texts):
            bad = at < 2 and text not in ("0", "-")
            line.append((text.rjust(room), "error" if bad else ""))
        line.append((f"  {word}{_lineage(tensor)}", style))
        lines += wrapped(line, width, 4)
    return lines


def _stat_texts(tensor: Tensor) -> list[str]:
    counts = [str(n) for n in (tensor.nan, tensor.posinf + tensor.neginf, tensor.zeros)]
    if tensor.unmeasured is not None:  # nobody has counted
        counts = ["-"] * len(counts)
    numbers = (tensor.min, tensor.max, tensor.mean, tensor.std, tensor.norm)
    return [*counts, *map(number_text, numbers)]


def _stat_block(name: str, tensor: Tensor, width: int) -> list[Styled]:
    """One tensor as a line of what it is and lines of its numbers, broken where they must be."""
    word, style = health(tensor)
    kind = f" {shape_text(tensor.shape)} {short_dtype(tensor.dtype)} {escape(tensor.device)}"
    first: Styled = [("  " + name, "strong"), (kind, ""), (f"  {word}", style)]
    lines = wrapped([*first, (_lineage(tensor), "faint")], width, 4)
    if tensor.unmeasured is not None:
        return lines
    infinite = tensor.posinf + tensor.neginf
    numbers: Styled = [
        (f"nan {tensor.nan}", "error" if tensor.nan else ""),
        (f"inf {infinite}", "error" if infinite else ""),
        (f"zero {tensor.zeros}", ""),
        (f"min/max {number_text(tensor.min)}/{number_text(tensor.max)}", ""),
    ]
    for label in ("mean", "std", "norm"):
        numbers.append((f"{label} {number_text(getattr(tensor, label))}", ""))
    used = width
    for text, style in numbers:
        if used + 2 + len(text) > width:
            lines.append([("  ", "")])
            used = 2
        lines[-1].append((f"  {text}", style))
        used += 2 + len(text)
    return lines


def _lineage(tensor: Tensor) -> str:
    told = [f"unmeasured: {escape(tensor.unmeasured)}"] if tensor.unmeasured else []
    told += [escape(tensor.grad_fn)] if tensor.grad_fn else []
    told += [f"view of {tensor.view_of}"] if tensor.view_of is not None else []
    told += [f"changed in place, was {tensor.previous}"] if tensor.previous is not None else []
    told += [f"from step {tensor.from_step}"] if tensor.from_step is not None else []
    return "  " + ", ".join(told) if told else ""


def _facts(record: Record | None) -> list[str]:
    """What a record says beside its tensors, as plain lines."""
    match record:
        case Call() as call:
            told = [f"{_argument(name)}={_whole(v)}" for name, v in call.arguments.items()]
            facts = ["with " + ", ".join(told)] if told else []
            facts += [f"autograd node {escape(call.node)}"] if call.node else []
            if call.forward is not None:
                what = "recomputes" if call.recompute else "gradient of"
                facts.append(f"{what} call #{call.forward}")
            if call.replay:
                facts.append("replayed after the step to find the op; it repeats what ran here")
            return facts
        case Param() as param:
            ratio = number_text(param.update_ratio)
            return [
                f"update norm {number_text(param.update_norm)}, update/value {ratio}, "
                f"measured on {param.sampled} elements"
                if param.changed
                else "the optimizer did not write it"
            ]
        case Optimizer() as optimizer:
            rates = ", ".join(map(number_text, optimizer.lr))
            return [
                f"optimizer {optimizer.index}, update {optimizer.update}, lr {rates or '-'}",
                f"gradient norm over all parameters {number_text(optimizer.grad_norm)}, "
                f"{optimizer.no_grad} without a gradient",
            ]
        case Action() as action:
            return [f"{escape(str(k))}: {_whole(v)}" for k, v in action.detail.items()]
        case Line() as line:
            return [f"{escape(v.name)} = {escape(v.text)}" for v in line.changed]
        case Step() as step:
            return [
                f"loss {number_text(step.loss)}, gradient norm {number_text(step.grad_norm)}, "
                f"update {step.update}",
                f"{duration_text(step.host_ns)} on the host, {step.records} records, "
                f"{step.dropped} dropped",
            ]
    return []


def _whole(value: object) -> str:
    """Write a value of a record: all of it, but for what nobody reads."""
    text = str(value)
    more = f" … {len(text) - LONGEST} more characters" if len(text) > LONGEST else ""
    return escape(text[:LONGEST]) + more


def _argument(name: str) -> str:
    """Name an argument; one given by position is known by its number only."""
    return f"[{name}]" if name.isdigit() else escape(name)


def snippet(
    location: Location,
    source: Source | None,
    around: int,
    glyphs: Glyphs = UNICODE,
    width: int | None = None,
) -> list[Styled]:
    """Source lines around a location with a sign at it, from the text that the log keeps.

    Without a stored function only the line of the location itself is shown, if it was stored.

    Args:
        width: to which the line of the location is broken, so that all of it can be read.
    """
    here, rows = location.line, {location.line: location.code} if location.code else {}
    if source is not None:
        text = source.lines
        first = max(source.first_line, here - around)
        last = min(source.first_line + len(text) - 1, here + around)
        rows = {n: text[n - source.first_line] for n in range(first, last + 1)}
    lines: list[Styled] = []
    for number, code in rows.items():
        line = _code(number, code, number == here, glyphs)
        if number == here and width is not None:
            lines += wrapped(line, width, CODE_FROM + len(code) - len(code.lstrip()) + 4)
        else:
            lines.append(line)
    return lines


def _code(number: int, text: str, here: bool, glyphs: Glyphs) -> Styled:
    sign = glyphs.cursor if here else " "
    style = "mark" if here else ""
    return [(f"{sign} {number:>4} ", "error" if here else "faint"), (escape(text[:1000]), style)]


def source_title(location: Location | None) -> str:
    """Name the file and line that the source pane shows."""
    return "Source" if location is None else f"Source {clip(location_text(location), 60)}"
