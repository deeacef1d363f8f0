"""TT613: batches of which cross entropy ignores every label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import CLASS_MODULES, CLASS_OPS
from tensortrace.records import Call


@check("TT613", "all-labels-ignored")
def all_labels_ignored(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3
) -> Iterator[Draft]:
    """Every label of the batch is ignore_index, so that nothing is learnt from it.

    Symptom:    the loss is exactly 0 again and again, or 0 / 0; nothing improves
    Threshold:  the loss of `sustain` steps running is exactly 0, and in the last of them every
                label of a cross entropy or nll loss is ignore_index. A loss module does not say
                its ignore_index: there it is any label that is negative or no class at all
    Source:     torch.nn.CrossEntropyLoss ("ignore_index ... does not contribute to the input
                gradient"); `sustain` chosen here: a small batch without one masked word is normal
    Fix:        count them where they are made, (labels != -100).sum(); a prompt that is cut at the
                maximum length leaves no answer behind it
    Misses:     a loss that is NaN because of it (reduction "mean") is what TT101 explains; other
                terms in the loss keep it from being 0
    Example:    tokens = (prompt + answer)[:512]  # a long prompt leaves no answer
                labels = ([-100] * len(prompt) + answer)[:512]
    Fixed:      prompt = prompt[-(512 - len(answer)) :]
                tokens = prompt + answer
                labels = [-100] * len(prompt) + answer
    """
    if step.summary is None:
        return
    loss = step.summary.loss
    if loss is None:
        return
    memory["running"] = memory.get("running", 0) + 1 if loss == 0 else 0
    if memory["running"] < sustain:
        return
    for call in step.forward():
        count = _ignored(step, call)
        if count:
            yield Draft(
                message=f"all {count} labels of {call.op or call.module} are ignored; the loss is "
                f"exactly 0 in {memory['running']} steps running (limit {sustain})",
                phase="forward", module=call.module, op=call.op, seq=call.seq,
                tensor=call.inputs[1][1], value=memory["running"], limit=sustain,
                location=call.location, evidence={"placed": "direct", "labels": count},
            )  # fmt: skip
            return


def _ignored(step: StepView, call: Call) -> int:
    """Count the labels of a call if it ignores all of them, else 0."""
    if len(call.inputs) < 2:
        return 0
    if step.kind_of(call) not in (CLASS_MODULES if call.op is None else CLASS_OPS):
        return 0
    given, labels = (step.tensors.get(id) for _, id in call.inputs[:2])
    if given is None or labels is None or not given.shape or labels.min != labels.max:
        return 0
    if labels.min is None or not labels.dtype.startswith(("int", "uint")):
        return 0
    if call.op is None:
        classes = given.shape[1] if len(given.shape) > 1 else given.shape[0]
        sure = labels.min < 0 or labels.min >= classes
    else:
        sure = labels.min == call.arguments.get("ignore_index", -100)
    return labels.numel if sure else 0
