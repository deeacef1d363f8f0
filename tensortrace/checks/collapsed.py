"""TT304: a model that answers the same whatever it is asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import module_text, number_text, shape_text

# What it follows from, where it is known: dead units, units that start alike.
_CAUSES = ("TT301", "TT403")


@check("TT304", "collapsed", when="full", after=_CAUSES)
def collapsed(
    step: StepView,
    memory: dict[str, Any],
    *,
    alike: float = 1e-3,
    rows: int = 4,
    warm: int = 50,
    sustain: int = 4,
    window: int = 6,
) -> Iterator[Draft]:
    """The output of a model is the same for every row of the batch.

    Symptom:    one class for every input, one picture for every noise, one embedding for every
                image (where the loss may look excellent); else the loss stays where guessing is
    Threshold:  the rows of what an outermost module returns in training, `rows` of them at least,
                are apart from their mean by < alike * their norm (of a single column: alike / 100,
                since a regression may be far from 0; and none that ends in a sigmoid, as a
                discriminator may be sure), in `sustain` of its last `window` looks, one in a full
                step of ten that trains, after `warm` optimizer steps. While TT301 or TT403 has said
                why, it is only counted there
    Source:     definition; Chen and He 2021, section 4.1 (the std of the outputs over the batch
                tells the collapse of a Siamese network); `alike` measured on tests/healthy: at
                least 0.012, one step behind an output that starts at zero aside. `warm`: deep
                perceptrons at PyTorch's default start at 1.6e-4 (12 layers) and below 1e-5 (16),
                and are beyond 1e-3 after 8 and 40 steps (Adam, 1e-3)
    Fix:        a lower learning rate; then look for what takes the input away: ReLUs that are dead,
                a mask that hides all, a factor left at 0, a tensor made anew in forward. In
                self-supervision: detach() on one side, negatives, or a variance term. In a GAN: a
                discriminator that is too strong
    Misses:     rows that differ a little: the same class for all, embeddings of a Siamese network
                on their way together; a collapse inside the model that other paths hide. A model
                that gets the same row again and again, or nothing but parameters, is told

    Example:
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)

    Fixed:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    """
    if step.update < warm or all(optimizer.skipped for optimizer in step.optimizers):
        return
    series: dict[str, deque[bool]] = memory.setdefault("series", {})
    for path, (call, made) in _outputs(step, rows).items():
        spread = made.row_spread or 0.0
        single = made.numel == (made.shape or (0,))[0]
        if single and (made.grad_fn or "").startswith("Sigmoid"):
            continue
        limit = alike / 100 if single else alike
        recent = series.setdefault(path, deque(maxlen=window))
        recent.append(spread < limit)
        if spread < limit and sum(recent) >= sustain:
            known = [f.id for f in step.findings if f.code in _CAUSES and f.severity != "note"]
            yield Draft(
                message=f"the {(made.shape or (0,))[0]} rows of the output {shape_text(made.shape)}"
                f" of {module_text(path, step.cls_of(path))} are alike: apart by "
                f"{number_text(spread)} of their norm (limit {limit:g}), {sum(recent)} of "
                f"{len(recent)} looks",
                cause=path, follows=known[0] if known else None, phase="forward", module=path,
                seq=call.seq, tensor=made.id, value=spread, limit=limit, location=call.location,
                evidence={"looks": sum(recent)},
            )  # fmt: skip


def _outputs(step: StepView, rows: int) -> dict[str, tuple[Call, Tensor]]:
    """By outermost module, what it returned and how far the rows differ: the least alike."""
    found: dict[str, tuple[Call, Tensor]] = {}
    for call in step.forward():
        if call.parent is not None or call.op is not None:
            continue
        if call.module is None or not call.training or not _varies(step, call):
            continue
        for _, number in call.outputs:
            made = step.tensors.get(number)
            if made is None or made.row_spread is None or (made.shape or (0,))[0] < rows:
                continue
            best = found.get(call.module)
            if best is None or made.row_spread > (best[1].row_spread or 0.0):
                found[call.module] = (call, made)
    return found


def _varies(step: StepView, call: Call) -> bool:
    """Whether any input is more than one number over and over."""
    given = (step.tensors.get(number) for _, number in call.inputs)
    return any(tensor is not None and tensor.min != tensor.max for tensor in given)
