"""TT407: weights that were meant to be one tensor and are two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Param, Severity
from tensortrace.text import number_text

# The sum of the same squares in another order: of a transposed matrix, or on another device.
_ROUNDING = 1e-5


@dataclass(slots=True)
class Pair:
    """Two weights with the same elements; `since` is the update that first saw them so."""

    names: tuple[str, str]
    severity: Severity
    since: int


@check("TT407", "broken-tie", when="full")
def broken_tie(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """Two weights that began with the same elements drift apart: they were meant to be one.

    Symptom:    a model whose output shares the weight of its embedding trains worse than it
                should, and has more parameters; tokens that are rare in the output stay random
    Threshold:  an embedding and a linear layer whose weights have the same shape and, in one full
                step, the same minimum, maximum, zeros and norm, are two parameters of the
                optimizer, and differ in a later full step. Two embeddings, or two linear layers
                of which one begins as the transpose of the other, are a note
    Source:     Press and Wolf 2017 (the output embedding is the input embedding); two random
                tensors do not agree in their extremes to the last bit. torch shares a weight by
                being one Parameter: a copy, `.data` that a move to a device replaces, or a new
                Parameter on one side is no tie
    Fix:        assign the Parameter itself, and after whatever makes new ones (resizing,
                deepcopy of a part, loading with assign=True): head.weight = embedding.weight
    Misses:     a tie that was broken before the first step by new random elements on one side, as
                a resized embedding has; a frozen side; a weight that was rounded to another dtype.
                An output that is started from the embedding to go its own way is told

    Example:
        model.head.weight.data = model.embed.weight.data.clone()

    Fixed:
        model.head.weight = model.embed.weight
    """
    here = {p.name: p for p in step.params if len(p.value.shape or ()) > 1 and p.value.norm}
    pairs: list[Pair] = memory.setdefault("pairs", [])
    for pair in list(pairs):
        one, other = (here.get(name) for name in pair.names)
        if one is None or other is None or one.update == pair.since or _alike(one, other):
            continue
        pairs.remove(pair)
        yield _draft(one, other, pair)
    met: set[str] = memory.setdefault("met", set())
    if met.issuperset(here):
        return
    twins: dict[tuple[Any, ...], list[Param]] = {}
    for param in here.values():
        value = param.value
        if value.min != value.max:  # all that are constant are alike
            twins.setdefault((value.numel, value.min, value.max, value.zeros), []).append(param)
    for group in twins.values():
        for i, one in enumerate(group):
            for other in group[i + 1 :]:
                severity = _tied(step, one, other)
                if severity is not None and not met.issuperset((one.name, other.name)):
                    pairs.append(Pair((one.name, other.name), severity, one.update))
    met.update(here)


def _alike(one: Param, other: Param) -> bool:
    a, b = one.value, other.value
    same = (a.min, a.max, a.zeros) == (b.min, b.max, b.zeros)
    return same and math.isclose(a.norm or 0.0, b.norm or 0.0, rel_tol=_ROUNDING)


def _tied(step: StepView, one: Param, other: Param) -> Severity | None:
    """How surely two weights with the same elements were meant to be one."""
    if not _alike(one, other):
        return None
    modules = [step.modules.get(p.module) if p.module is not None else None for p in (one, other)]
    # nn.TransformerEncoder copies its layers: equal weights of two linear layers are no tie.
    embeds = sum(module is not None and "Embedding" in module.cls for module in modules)
    a, b = one.value.shape or (), other.value.shape or ()
    if embeds and a == b:
        linear = any(module is not None and module.cls == "Linear" for module in modules)
        return "warning" if linear else "note" if embeds == 2 else None
    return "note" if len(a) == 2 and a[0] != a[1] and a == b[::-1] else None


def _draft(one: Param, other: Param, pair: Pair) -> Draft:
    norms = [param.value.norm or 0.0 for param in (one, other)]
    count = one.update - pair.since
    transposed = "" if one.value.shape == other.value.shape else ", one the transpose of the other"
    return Draft(
        message=f"{one.name} and {other.name} had the same {one.value.numel} elements{transposed}, "
        f"and {count} optimizer step{'s' if count > 1 else ''} later norms of "
        f"{number_text(norms[0])} and {number_text(norms[1])}: they are two tensors",
        cause="|".join(pair.names), severity=pair.severity, phase="optimizer", module=other.module,
        param=other.name, value=abs(norms[1] - norms[0]) / norms[0], limit=0.0,
        evidence={"weights": [one.name, other.name]},
        fix=f"{other.name} = {one.name}, the Parameter itself and not its data, after all that "
        "makes new ones (resizing, copying, loading with assign=True) and before the optimizer",
    )  # fmt: skip
