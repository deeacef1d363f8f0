"""TT607: batches of one class, as sorted labels make them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import BINARY_LOSSES, CLASS_LOSSES
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text

_LOSSES = CLASS_LOSSES | BINARY_LOSSES | {"multi_margin_loss", "MultiMarginLoss"}
# What a label goes through between the loader and its loss.
_THROUGH = frozenset(("to", "long", "int", "float", "type", "cuda", "view", "reshape", "flatten",
                      "squeeze", "unsqueeze", "contiguous", "clone", "getitem",
                      "index_select"))  # fmt: skip
_SINGLE = (
    "a contrastive loss has the same label for each row on purpose; labels of data that are all of "
    "one class teach nothing but that class"
)
_CHOICE = frozenset(("getitem", "index_select"))


@check("TT607", "one-class-batches", of=("calls", "loader"))
def one_class_batches(
    step: StepView, memory: dict[str, Any], *, sustain: int = 6, least: int = 8, only: int = 20
) -> Iterator[Draft]:
    """Each batch holds a single class, as labels that are sorted or filtered make it.

    Symptom:    the loss is 0 within a few steps, leaps when the next class begins, and the accuracy
                of the validation is that of guessing; BatchNorm makes it worse
    Threshold:  the labels of a loss (integers of one dim, or one number for each sample in binary
                cross entropy), which come from outside and are at least `least`, are all equal in
                `sustain` or more of the last `only` full steps that train, of several classes, with
                half as many mixed batches at most (those in which one class ends and the next
                begins); or they are one and the same class in the last `only` full steps (a note:
                the other classes may be rare)
    Source:     stochastic gradients assume that samples are drawn at random (Bengio 2012, section
                3.1.2, "randomly permuting"); among 2 even classes 6 batches of 8 labels are of one
                class each with p = 2 ** -42; `sustain`, `only` chosen here
    Fix:        DataLoader(..., shuffle=True), or a seeded permutation of the files when the data
                set is listed folder by folder
    Misses:     labels that are sorted in part or with fewer than `least` a batch; a curriculum or
                continual learning feeds class after class on purpose; labels of more dims, such as
                masks; targets of regression
    Example:    loader = DataLoader(ImageFolder("train"), batch_size=64)
    Fixed:      loader = DataLoader(ImageFolder("train"), batch_size=64, shuffle=True)
    """
    for action in step.actions:
        if action.action == "loader":
            # Which of several gave the labels is not known: said only if none of them shuffles.
            memory["shuffled"] = memory.get("shuffled") or action.detail.get("shuffled")
    if step.summary is None or not step.summary.full:
        return
    for call in step.forward():
        labels = _labels(step, call)
        if labels is None or labels.numel < least:
            continue
        place = location_text(call.location)
        recent = memory.setdefault(place, deque(maxlen=only))
        recent.append(labels.min if labels.min == labels.max else None)
        pure = [label for label in recent if label is not None]
        mixed = len(recent) - len(pure)
        several = len(pure) >= sustain and len(set(pure)) > 1 and 2 * mixed <= len(pure)
        single = len(pure) == only and len(set(pure)) == 1
        if recent[-1] is not None and (several or single):
            shuffle = "; its loader does not shuffle" if memory.get("shuffled") is False else ""
            what = f"one class each, {sorted(set(pure))[:5]}" if several else f"class {pure[-1]:g}"
            yield Draft(
                message=f"all {labels.numel} labels of {call.op or call.module} are equal in "
                f"{len(pure)} of {len(recent)} full steps (limit {sustain if several else only}): "
                f"{what}{shuffle}",
                cause=place, severity="warning" if several else "note",
                phase="forward", module=call.module, op=call.op, seq=call.seq, tensor=labels.id,
                value=len(pure), limit=sustain if several else only, location=call.location,
                explanation=None if several else _SINGLE,
                fix=None if several else "look at which labels reach the loss",
                evidence={"placed": "direct", "classes": pure[-sustain:],
                          "shuffled": memory.get("shuffled")},
            )  # fmt: skip
        return


def _labels(step: StepView, call: Call) -> Tensor | None:
    """Pick the labels of a loss that is trained on."""
    kind = step.kind_of(call)
    if kind not in _LOSSES or len(call.inputs) < 2:
        return None
    made, labels = (step.tensors.get(id) for _, id in call.inputs[:2])
    if made is None or labels is None or not made.requires_grad:
        return None
    if labels.min is None or not labels.shape or not _is_data(step, labels.id):
        return None
    binary = kind.lower().replace("_", "").startswith(("bce", "binary"))
    if binary:
        return labels if labels.numel == labels.shape[0] else None
    if len(labels.shape) != 1 or not labels.dtype.startswith(("int", "uint")):
        return None
    return labels


def _is_data(step: StepView, id: int) -> bool:
    """Tell whether labels come from outside and are chosen anew in this step."""
    makers = {out: c for c in step.forward() if c.op is not None
              for _, out in c.outputs}  # fmt: skip
    chosen = False
    while (maker := makers.pop(id, None)) is not None:
        if maker.op not in _THROUGH or not maker.inputs:
            return False
        chosen = chosen or maker.op in _CHOICE
        id = maker.inputs[0][1]
    origin = step.tensors.get(id)
    return origin is not None and (chosen or origin.from_step is None)
