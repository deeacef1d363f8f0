"""Memory, state dicts, DataParallel, and every exception that nobody has words for."""

from __future__ import annotations

import math
import re

from tensortrace.checks.exception.facts import (
    Facts,
    Match,
    Told,
    first_line,
    line_text,
    operands_text,
    quoted,
    shape_of,
)
from tensortrace.records import Call, ChainLink
from tensortrace.text import shape_text, short_dtype

_NBYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float16": 2,
           "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip


def out_of_memory(facts: Facts, found: Match) -> Told:
    """No memory left: what holds it, and what has grown."""
    step = facts.step
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)|allocate (\d+) bytes", facts.text)
    what = f" for {asked[1] or asked[2] + ' bytes'}" if asked else ""
    weights = sum(math.prod(p.shape) * _NBYTES.get(p.dtype, 4) for m in step.modules.values()
                  for p in m.parameters)  # fmt: skip
    made: dict[int, tuple[int, Call]] = {}
    for call in step.calls:
        for _, id in call.outputs if call.phase == "forward" else ():
            tensor = step.tensors.get(id)
            if tensor is not None and tensor.view_of is None:
                made.setdefault(id, (tensor.numel * _NBYTES.get(tensor.dtype, 4), call))
    largest = sorted(made.items(), key=lambda item: -item[1][0])[:3]
    held = [
        f"`{call.op or call.module or 'the model'}` {shape_text(step.tensors[id].shape)} "
        f"{_bytes(nbytes)}" for id, (nbytes, call) in largest
    ]  # fmt: skip
    jumps = [
        f"{name} went from {shape_text(facts.before[name])} to {shape_text(shape)}"
        for name, shape in facts.inputs.items()
        if name in facts.before and math.prod(shape) > math.prod(facts.before[name])
    ]
    told = f"no memory left{what}"
    if jumps:
        told += f": {jumps[0]} since the step before"
    total = sum(nbytes for nbytes, _ in made.values())
    why = f"parameters {_bytes(weights)}; outputs of this step so far {_bytes(total)}"
    why += f", the largest: {', '.join(held)}" if held else ""
    return Told(
        told, why,
        "cut the long batch: sort or clip by length, or split it" if jumps else
        "a smaller batch, torch.no_grad() for evaluation, activation checkpointing, or look for "
        "losses kept with their graph",
        tuple(ChainLink(call.seq, id, call.op or call.module, call.location)
              for id, (_, call) in largest),
    )  # fmt: skip


def lost_rank(facts: Facts, found: Match) -> Told | None:
    """A collective that the other ranks do not finish."""
    if facts.step.world_size < 2:
        return None
    return Told(
        f"another rank has gone, or waits elsewhere: {first_line(facts.text)}",
        "all ranks take part in each collective, in the same order",
        "read the logs of the other ranks first: tensortrace report FOLDER shows all. The cause is "
        "an exception there, a rank that was killed, or one that calls backward() once less",
    )


def _bytes(n: int) -> str:
    # As torch counts in the message that stands beside it.
    value, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def state_dict(facts: Facts, found: Match) -> Told:
    """A state dict that does not fit."""
    missing, unexpected = (facts.state_dict.get(k, {}) for k in ("missing", "unexpected"))
    sizes = facts.state_dict.get("sizes", {})
    prefix = _prefix(missing.get("names", []), unexpected.get("names", []))
    if prefix:
        where, fix = prefix
        return Told(
            f"all keys of the state dict are there under another prefix: {where}",
            f"{unexpected.get('count')} unexpected and {missing.get('count')} missing keys differ "
            "only in their beginning; DataParallel, DDP and torch.compile put one there", fix,
        )  # fmt: skip
    if sizes.get("first"):
        name, saved, own = sizes["first"][0]
        return Told(
            f"`{name}` is [{saved}] in the state dict and [{own}] in the model"
            + (f", and {sizes['count'] - 1} more differ" if sizes["count"] > 1 else ""),
            "the model was built with other numbers than the one that was saved",
            f"build the model as it was saved, or leave {name} out and pass strict=False",
        )
    names = [*missing.get("names", []), *unexpected.get("names", [])]
    return Told(
        f"the state dict does not fit: {missing.get('count', 0)} keys are missing and "
        f"{unexpected.get('count', 0)} unexpected" + (f", such as `{names[0]}`" if names else ""),
        "the model was built otherwise than the one that was saved",
        "compare model.state_dict().keys() with the keys of the file",
    )


def _prefix(missing: list[str], unexpected: list[str]) -> tuple[str, str] | None:
    if not missing or not unexpected:
        return None
    want, got = missing[0], unexpected[0]
    # As far as they are listed: what fits the first key alone is no prefix of all.
    if got.endswith(f".{want}"):
        extra = got[: -len(want)]
        if not {extra + name for name in missing}.issubset(unexpected):
            return None
        return (f"`{got}` in the file is `{want}` in the model",
                f"{{k.removeprefix({extra!r}): v for k, v in state.items()}}")  # fmt: skip
    if want.endswith(f".{got}"):
        extra = want[: -len(got)]
        if not {extra + name for name in unexpected}.issuperset(missing):
            return None
        return (f"`{got}` in the file is `{want}` in the model",
                f"{{{extra!r} + k: v for k, v in state.items()}}")  # fmt: skip
    return None


def worker(facts: Facts, found: Match) -> Told:
    """An exception in a DataLoader worker: the text of its traceback is all there is."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', facts.text)
    mine = [at for at in places if not re.search("/torch/|/tensortrace/capture/", at[0])]
    where = " at {}:{} in {}".format(*mine[-1]) if mine else ""
    said = facts.text.strip().splitlines()[-1][:300]
    return Told(
        f"a DataLoader worker raised {found[1]}{where}: {said}",
        "the dataset and collate_fn run in another process, and only the text of an error arrives",
        "num_workers=0 raises it here, with its tensors",
    )


def unscaled_twice(facts: Facts, found: Match) -> Told:
    """A GradScaler that was not updated since it divided the gradients."""
    before = [a for a in facts.step.actions if a.action == "unscale" and a.seq < facts.action.seq]
    when = f"at {line_text(before[-1].location)} in this step" if before else "in an earlier step"
    return Told(
        f"scaler.unscale_() ran {when} already, and scaler.update() has not since",
        "gradients must be divided by the scale once, and update() ends the turn in which they are",
        "scaler.update() at the end of each turn, also of one that leaves scaler.step() out; and "
        "scaler.unscale_() once in it for each optimizer, after the last backward()",
    )


def python_number(facts: Facts, found: Match | None = None) -> Told:
    """DataParallel got a Python number to gather."""
    return Told(
        "DataParallel cannot gather what forward returned: a Python number is no tensor",
        "each replica's outputs are joined along dim 0; a float from .item() cannot be",
        "return tensors from forward, e.g. loss.unsqueeze(0), and call .item() outside",
    )


def anything_else(facts: Facts) -> Told:
    """Every other exception: its own words, and the tensors of the line."""
    seen = operands_text(facts)
    line = first_line(facts.text)
    told = f"{facts.type}: {line}" if line else facts.type
    given = [f"{quoted(one['name'])} {shape_text(shape_of(one))} {short_dtype(one['dtype'])}"
             for one in facts.entered[:3]]  # fmt: skip
    why = f"in `{facts.expression}`" if facts.expression else "raised in the traced block"
    why += f": {seen}" if seen else ""
    if facts.module is not None and given and not seen:
        why += f"; {facts.place} got {', '.join(given)}"
    return Told(told, why, "")
