"""Operands of the wrong device or dtype, and indices out of range."""

from __future__ import annotations

from typing import Any

from tensortrace.causes import range_text
from tensortrace.checks.exception.facts import (
    Facts,
    Match,
    Told,
    code_name,
    first_line,
    operands_text,
    quoted,
    shape_of,
    stated,
)
from tensortrace.text import number_text, shape_text, short_dtype


def over_half(facts: Facts, found: Match) -> Told:
    """A Python number over the range of float16."""
    half = next((one for one in facts.operands if one.get("dtype") == "float16"), None)
    numbers = [one["value"] for one in facts.operands if isinstance(one.get("value"), int | float)]
    value = max(numbers, key=abs, default=None)
    name = code_name(half, "x")
    told = "a number" if value is None else number_text(value)
    told += f" does not fit in {range_text('float16')}"
    told += f", and {stated(half)} of that" if half is not None else ""
    bound = "max" if value is not None and value > 0 else "min"
    return Told(
        told, "autocast and half() turn what a model computes to float16, and a number that it is "
        "filled with goes with it",
        f"torch.finfo({name}.dtype).{bound} for that number; or compute it in float32",
    )  # fmt: skip


def device(facts: Facts, found: Match) -> Told:
    """Operands that lie on different devices."""
    tensors = [t for t in facts.tensors() if t.get("device")]
    # A tensor without dims may be on the CPU: torch moves it.
    if any(t["device"] != "cpu" for t in tensors):
        tensors = [t for t in tensors if shape_of(t) or t["device"] != "cpu"]
    by_device: dict[str, dict[str, Any]] = {}
    for one in tensors:
        by_device.setdefault(one["device"], one)
    if len(by_device) < 2:
        return Told(
            f"tensors are on different devices: {first_line(facts.text)}",
            "one operation needs all its tensors on one device",
            "x = x.to(device) for every batch, model.to(device) before the optimizer is made",
        )
    told = ", ".join(f"{quoted(one['name'])} is on {device}" for device, one in by_device.items())
    one, other = list(by_device.values())[:2]
    home = other["device"]
    return Told(
        f"{told}: one operation needs all its tensors on one device",
        "a tensor made in forward is on the CPU unless it is given a device; so is each batch",
        f"{code_name(one, 'x')}.to({home!r})" + (
            f", or model.to({one['device']!r})" if other in facts.parameters else ""),
    )  # fmt: skip


def dtype(facts: Facts, found: Match) -> Told:
    """Operands whose dtypes do not go together."""
    x, y = facts.argument("input"), facts.argument("target")
    function = facts.function
    if function in ("cross_entropy", "nll_loss") and x and y and _is_index(y, x):
        return Told(
            f"{quoted(y['name'])} is {short_dtype(y['dtype'])}: the class indices of {function} "
            "must be i64",
            "a target of the shape of the classes' indices counts classes, in whole numbers",
            f"{code_name(y, 'target')}.long()",
        )
    if function == "embedding" and x is not None:
        return Told(
            f"{quoted(x['name'])} is {short_dtype(x['dtype'])}: indices of an embedding must be "
            "i64 or i32",
            "an embedding looks rows up by whole numbers", f"{code_name(x, 'ids')}.long()",
        )  # fmt: skip
    if "as indices" in found[0]:
        return Told(
            f"a tensor used as index is no whole number and no mask: {operands_text(facts)}",
            "an index tensor must be i64, or b8 for a mask", "index.long(), or index.bool()",
        )  # fmt: skip
    by_dtype: dict[str, dict[str, Any]] = {}
    for one in facts.tensors():
        by_dtype.setdefault(one["dtype"], one)
    if len(by_dtype) < 2:
        seen = operands_text(facts)
        return Told(
            f"dtypes do not fit: {first_line(facts.text)}" + (f" ({seen})" if seen else ""),
            "the operation has no form for these dtypes",
            f"convert it: {code_name(facts.operands[0] if facts.operands else None, 'x')}.float()",
        )
    told = ", ".join(
        f"{quoted(one['name'])} is {short_dtype(dtype)}" for dtype, one in by_dtype.items()
    )
    one, other = list(by_dtype.values())[:2]
    if function is not None and function.startswith(("binary_cross", "mse", "l1", "smooth", "hub")):
        one, other = (other, one) if "float" in one["dtype"] else (one, other)
    return Told(
        f"{told}: {facts.op if facts.op else 'the operation'} needs one dtype for all",
        "NumPy and lists of Python numbers make f64 and i64, the weights are "
        f"{short_dtype(other['dtype'])}" if other in facts.parameters else
        "only elementwise operations promote dtypes by themselves",
        f"{code_name(one, 'x')}.to(torch.{other['dtype']})",
    )  # fmt: skip


def _is_index(y: dict[str, Any], x: dict[str, Any]) -> bool:
    """Whether a target should hold class indices, and its dtype forbids it."""
    return y["dtype"] not in ("int64", "uint8") and shape_of(y) != shape_of(x)


def index(facts: Facts, found: Match) -> Told | None:
    """A class, row or element index out of range."""
    x, y, table = (facts.argument(name) for name in ("input", "target", "weight"))
    shape = shape_of(x or {})
    if facts.function in ("cross_entropy", "nll_loss") and x and y and shape:
        classes = shape[1] if len(shape) > 1 else shape[0]
        return _class_index(facts, y, x, classes, found)
    if facts.function == "embedding" and x and table and shape_of(table):
        return _row_index(facts, x, shape_of(table)[0])
    size: int | None = int(found["size"]) if found.groupdict().get("size") else None
    whole = [one for one in facts.operands if "min" in one]
    if size is None and "num_classes" in found[0]:
        size = next((one["value"] for one in facts.operands if type(one.get("value")) is int), None)
    if size is None:
        return None
    bad = next((one for one in whole if _offending(one, size) is not None), None)
    held = (f"{quoted(bad['name'])} holds {_values(bad, _offending(bad, size))}" if bad
            else f"index {found.groupdict().get('index') or 'given'}")  # fmt: skip
    of = next((stated(one) for one in facts.operands if one is not bad and shape_of(one)), None)
    return Told(
        f"{held}: allowed are 0 to {size - 1}" + (f" ({of})" if of else ""),
        f"the dim that is indexed has {size} elements, and the last one is {size - 1}",
        f"look at where the index is made, or {code_name(bad, 'index')}.clamp(0, {size - 1})",
    )


def probabilities(facts: Facts, found: Match) -> Told:
    """What is no probability where binary cross entropy takes one."""
    which = found[1]
    one = facts.argument(which) or {"name": which}
    name, held = code_name(one, which), _held(facts, which)
    if "NaN" in held:
        fix = f"look for what makes {name} NaN, before the loss takes it"
    elif which == "target":
        fix = (f"cross_entropy for numbers of classes; {name} / 255 for a mask of pixels; "
               f"({name} + 1) / 2 for labels of -1 and 1")  # fmt: skip
    else:
        fix = "binary_cross_entropy_with_logits (nn.BCEWithLogitsLoss) of what the last layer gives"
        fix += ", without a sigmoid; or torch.sigmoid before this loss"
    return Told(
        f"{quoted(one['name'])} holds {held}: binary_cross_entropy takes probabilities, 0 to 1",
        "it takes the logarithm of input and of 1 - input, and weighs them by target; NaN is not "
        "between 0 and 1 either",
        fix,
    )


def _held(facts: Facts, which: str) -> str:
    """The range of an argument of the loss that raised, as it was given to it."""
    calls = [c for c in facts.step.forward() if c.exception and len(c.inputs) > 1]
    number = calls[-1].inputs[which == "target"][1] if calls else None
    tensor = facts.step.tensors.get(number) if number is not None else None
    if tensor is None or (tensor.min is None and not tensor.nan):
        return "something else"
    told = [f"{tensor.nan} NaN"] if tensor.nan else []
    if tensor.min is not None and tensor.max is not None:
        told.append(f"values from {number_text(tensor.min)} to {number_text(tensor.max)}")
    return " and ".join(told)


def _row_index(facts: Facts, x: dict[str, Any], rows: int) -> Told:
    value = _offending(x, rows)
    size = max(value + 1 if value is not None else rows, rows)
    held = (f"{quoted(x['name'])} holds {_values(x, value)}, {facts.place} has {rows} rows: "
            f"allowed are 0 to {rows - 1}")  # fmt: skip
    if value is not None and value < 0:
        ids = code_name(x, "ids")
        return Told(
            held, "a row is not counted from the end; a mark for what is unknown or left out is "
            "no row either",
            f"{ids}.masked_fill({ids} < 0, {rows}) and nn.Embedding({rows + 1}, ...): a row of its "
            "own for what is marked",
        )  # fmt: skip
    return Told(
        held,
        "an index beyond the table: a vocabulary larger than num_embeddings, or an id for "
        "padding that has no row",
        f"nn.Embedding({size}, ...), or {code_name(x, 'ids')}.clamp(0, {rows - 1})",
    )  # fmt: skip


def _class_index(
    facts: Facts, y: dict[str, Any], x: dict[str, Any], classes: int, found: Match
) -> Told:
    value = found.groupdict().get("value")
    bad = int(value) if value is not None else _offending(y, classes)
    low, high = y.get("min"), y.get("max")
    fix = f"{max(classes, (high or 0) + 1)} outputs in the last layer, or fix the labels"
    if bad is not None and (bad < 0 or bad == 255):  # what masks of images leave out is 255
        fix = f"{facts.function}(..., ignore_index={bad}) if it marks what to leave out"
    elif low == 1 and high == classes:
        fix = f"{code_name(y, 'target')} - 1  # the labels count from 1"
    return Told(
        f"{quoted(y['name'])} holds {_values(y, bad)}, {quoted(x['name'])} "
        f"{shape_text(shape_of(x))} has {classes} classes: allowed are 0 to {classes - 1}",
        "a class index is a position in the dim of the classes", fix,
    )  # fmt: skip


def _offending(one: dict[str, Any], size: int) -> int | None:
    high, low = one.get("max"), one.get("min")
    if high is not None and high >= size:
        return int(high)
    return int(low) if low is not None and low < 0 else None


def _values(one: dict[str, Any], bad: int | None) -> str:
    several = "min" in one and one["min"] != one["max"]
    spread = f"values {one['min']} to {one['max']}" if several else ""
    if bad is None:
        return spread or "an index out of range"
    return f"{bad} ({spread})" if spread else str(bad)


def device_assert(facts: Facts, found: Match) -> Told:
    """A kernel that stopped the device."""
    return Told(
        "a kernel on the GPU stopped at an assertion, most often an index out of range; the "
        "line shown may be a later one",
        "kernels run behind the program: the error is met where the host next waits, and after it "
        "no value on the device can be read",
        "CUDA_LAUNCH_BLOCKING=1 python ..., or run that batch on the CPU: look at the targets of "
        "the loss and at what enters nn.Embedding",
    )  # fmt: skip
