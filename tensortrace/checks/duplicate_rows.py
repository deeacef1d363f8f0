"""TT611: rows of a batch that are there twice, as workers with one seed make them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check


@check("TT611", "duplicate-rows", of=("loader", "duplicates"))
def duplicate_rows(
    step: StepView, memory: dict[str, Any], *, share: float = 0.5, sustain: int = 3
) -> Iterator[Draft]:
    """A loader gives the same rows again and again, in one batch or batch after batch.

    Symptom:    more data or more workers do not help; random crops, noise or made-up samples are
                the same in each worker; BatchNorm sees less spread than there is
    Threshold:  at least `share` of the first 64 rows of a fetched batch are equal to one before
                them in the batch, or to one of the 8 batches before it that the same iterator gave,
                in `sustain` full steps of one epoch, of a loader that does not draw with
                replacement
    Source:     torch.utils.data, "Randomness in multi-process data loading": each worker is a copy
                of the dataset with its generators; Tanel Parnamaa 2021, "Using PyTorch + NumPy?
                You're making a mistake"; `share`, `sustain` chosen here
    Fix:        make generators in worker_init_fn from torch.initial_seed() (or
                get_worker_info().seed), not in __init__ of the dataset and not from a fixed number;
                use the index in __getitem__
    Misses:     rows of less than 32 numbers, and those of integers, may be alike by chance and are
                not looked at; of long rows the middle 1024 numbers are compared; equal noise on
                different pictures; batches on a device; loaders and samplers of your own; iterators
                that were made before the trace began
    Example:    class Noise(Dataset):
                    def __init__(self):
                        self.random = np.random.default_rng(0)
                    def __getitem__(self, i):
                        return self.random.normal(size=(3, 32, 32))
    Fixed:      def worker(id):
                    info = torch.utils.data.get_worker_info()
                    info.dataset.random = np.random.default_rng(info.seed)
                loader = DataLoader(Noise(), num_workers=4, worker_init_fn=worker)
    """
    if step.summary is None:
        return
    for action in step.actions:
        if action.action == "loader":
            memory.update(count=0, replacement=action.detail.get("replacement"))
            memory["workers"] = action.detail.get("workers") or 0
        # What is not known of an iterator that was made before the run may be meant.
        if action.action != "duplicates" or memory.get("replacement", True):
            continue
        detail = action.detail
        rows, within, earlier = (detail.get(k, 0) for k in ("rows", "within", "earlier"))
        found = max(within, earlier)
        if not rows or found < share * rows:
            continue
        memory["count"] = memory.get("count", 0) + 1
        if memory["count"] >= sustain:
            where = "before them in it" if within >= earlier else "of the batches before it"
            workers = f", from {memory['workers']} workers" if memory.get("workers") else ""
            yield Draft(
                message=f"{found} of {rows} rows of a batch are equal to rows {where} (limit "
                f"{share:.0%}), in {memory['count']} steps of this epoch{workers}",
                cause="within" if within >= earlier else "earlier", value=found / rows,
                limit=share, location=action.location,
                evidence={"placed": "direct", "workers": memory.get("workers", 0), **detail},
            )  # fmt: skip
