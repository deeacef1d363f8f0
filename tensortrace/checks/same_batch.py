"""TT602: one batch is fed again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Tensor
from tensortrace.text import location_text


@check("TT602", "same-batch-again", of=("full", "loader"))
def same_batch_again(
    step: StepView, memory: dict[str, Any], *, sustain: int = 5
) -> Iterator[Draft]:
    """Every step fetches a batch, and it is the same one.

    Symptom:    the training loss falls to 0 at once, the validation loss rises; or all samples of
                an epoch look alike
    Threshold:  in `sustain` training steps running, each after a fetch from a DataLoader of at
                least two batches, all data that comes in from outside is the same to the last bit
                of its statistics
    Source:     torch.utils.data.DataLoader: each iter() begins anew; `sustain` chosen here
                (measured on tests/healthy: at most 1)
    Fix:        for x, y in loader: instead of next(iter(loader)) in each step; in __getitem__ use
                the index
    Misses:     a batch that is fetched once and kept, or made by hand, since an overfit test and
                full-batch training look the same; loaders whose length is not known; steps that
                are not written in full, or in which one line fetches several batches; a batch that
                comes again in another order; data of two values, such as one-hot rows, and
                permutations, whose statistics may be those of another batch
    Example:    for step in range(1000):
                    x, y = next(iter(loader))
                    train_step(x, y)
    Fixed:      for x, y in loader:
                    train_step(x, y)
    """
    summary = step.summary
    for action in step.actions:
        if action.action == "loader":
            memory["batches"] = action.detail.get("batches") or 0
            memory["dataset"] = action.of
    if summary is None:
        return
    # A step that is not full is none of those running.
    before = step.before.step if step.before is not None else None
    last = memory.pop("last", None)
    if not summary.full or not step.losses or memory.get("batches", 0) < 2:
        return
    data = _data(step)
    fetches = [a for a in step.actions if a.action == "fetch"]
    places = {location_text(a.location) for a in fetches}
    # Only what is new each time: weights of classes, masks and positions stay as they are.
    new = [tensor for tensor in data if tensor.from_step is None]
    signs = sorted({_sign(tensor) for tensor in new if _tells_apart(tensor)})
    # A line that fetched several: the step is an epoch, in the order of the one before.
    if not signs or not fetches or len(places) < len(fetches):
        return
    memory["running"] = memory["running"] + 1 if last == (before, signs) else 1
    memory["last"] = step.number, signs
    if memory["running"] >= sustain:
        yield Draft(
            message=f"{memory['running']} steps running (limit {sustain}) each fetch a batch of "
            f"{memory['dataset']}, and it is the same one; an epoch has {memory['batches']}",
            cause="fetched", value=memory["running"], limit=sustain, tensor=data[0].id,
            location=fetches[0].location,
            evidence={"placed": "direct", "batches": memory["batches"]},
        )  # fmt: skip


def _data(step: StepView) -> list[Tensor]:
    """List the tensors that come into outermost calls, and that nothing in the step has made."""
    made: set[int] = set()
    found: dict[int, Tensor] = {}
    for call in step.forward():
        if call.parent is None:
            for _, id in call.inputs:
                tensor = step.tensors.get(id)
                if id not in made and tensor is not None and _is_data(tensor):
                    found[id] = tensor
        made.update(id for _, id in call.outputs)
    return list(found.values())


def _is_data(tensor: Tensor) -> bool:
    known = tensor.unmeasured is None and tensor.norm is not None
    return known and not tensor.requires_grad and tensor.numel > 1 and tensor.view_of is None


def _tells_apart(tensor: Tensor) -> bool:
    """Tell whether another batch would have other statistics.

    Those of two values say only how many there are of each, and all permutations have the same.
    """
    low, high, mean, std = tensor.min, tensor.max, tensor.mean, tensor.std
    if low is None or high is None or mean is None or std is None:
        return True
    # The largest variance that there can be: nothing lies between (Bhatia and Davis 2000).
    two = math.isclose(std * std, (high - mean) * (mean - low), rel_tol=1e-4, abs_tol=1e-12)
    count = high - low + 1
    even = math.isclose(std * std, (count * count - 1) / 12, rel_tol=1e-4)
    return not two and not (even and math.isclose(2 * mean, low + high, rel_tol=1e-4))


def _sign(tensor: Tensor) -> str:
    values = (tensor.mean, tensor.std, tensor.norm, tensor.min, tensor.max, tensor.zeros)
    return f"{tensor.shape} {tensor.dtype} {values}"
