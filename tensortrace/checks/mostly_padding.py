"""TT609: batches that are mostly padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Severity
from tensortrace.text import module_text, shape_text


@check("TT609", "mostly-padding", when="full")
def mostly_padding(
    step: StepView,
    memory: dict[str, Any],
    *,
    share: float = 0.7,
    sustain: int = 5,
    rows: int = 32,
    least: int = 64,
) -> Iterator[Draft]:
    """Most of each batch is padding, and is computed for nothing.

    Symptom:    a step takes several times as long as the words in it would; where nothing is
                masked, the network learns to predict padding
    Threshold:  more than `share` of the tokens of a batch (at least `least`) are padding in
                `sustain` full steps running that train: as told by a padding_mask (not 0) or an
                attention_mask (0) of two dims that a module gets by name; or, a note, since 0 may
                be a word like others, they are 0 where an embedding of `rows` rows or more looks
                them up
    Source:     Krell et al. 2021, "Efficient sequence packing": with about half of the tokens being
                padding, as usual, packing doubles the speed; `share` above that (measured on
                tests/healthy: at most 0.3)
    Fix:        pad to the longest of the batch, not to the longest of all (pad_sequence,
                DataCollatorWithPadding); batches of sentences of like length; packing
    Misses:     padding by another number than 0 without a mask; masks given by position; labels
                that are ignored, since a prompt is ignored on purpose
    Example:    tokens = tokenizer(texts, padding="max_length", max_length=512)
    Fixed:      tokens = tokenizer(texts, padding="longest", truncation=True, max_length=512)
    """
    if not any(a.action == "loss" for a in step.actions):
        return
    running: dict[str, int] = memory.setdefault("running", {})
    told = set()
    for call in step.forward():
        if call.op is not None or not call.grad_enabled:
            continue
        for severity, id, padding in _padding(step, call, rows, least):
            key = f"{call.module} {severity}"
            if key in told:
                continue
            told.add(key)
            running[key] = running.get(key, 0) + 1 if padding > share else 0
            if running[key] >= sustain:
                shape = shape_text(step.tensors[id].shape)
                yield Draft(
                    message=f"{padding:.0%} of the {shape} tokens that {module_text(call.module)} "
                    f"gets are padding, in {running[key]} full steps running (limit {share:.0%} in "
                    f"{sustain})",
                    # One mask goes down through all layers, and the embedding has the same tokens.
                    cause="padding", severity=severity, phase="forward", module=call.module,
                    seq=call.seq, tensor=id, value=padding, limit=share, location=call.location,
                    evidence={"placed": "direct", "steps": running[key]},
                )  # fmt: skip
                return


def _padding(
    step: StepView, call: Call, rows: int, least: int
) -> Iterator[tuple[Severity, int, float]]:
    """Tell of each mask, and of the tokens of an embedding, what share is padding."""
    module = step.module_of(call)
    table = module.parameters[0].shape if module is not None and module.parameters else ()
    embeds = module is not None and module.cls == "Embedding" and bool(table) and table[0] >= rows
    for name, id in call.inputs:
        if not (embeds or name == "attention_mask" or name.endswith("padding_mask")):
            continue
        tensor = step.tensors.get(id)
        if tensor is None or tensor.shape is None or tensor.unmeasured or tensor.numel < least:
            continue
        zero = tensor.zeros / tensor.numel
        counted = tensor.dtype == "bool" or tensor.dtype.startswith(("int", "uint"))
        if len(tensor.shape) != 2:
            continue
        if name.endswith("padding_mask"):
            yield "warning", id, 1 - zero
        elif name == "attention_mask" and counted:
            yield "warning", id, zero
        elif embeds and counted:
            yield "note", id, zero
