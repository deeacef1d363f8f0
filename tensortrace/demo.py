"""`tensortrace demo`: train a small network with a planted fault, and let the tracer name it.

The data are real (see data/README.md), the loop is what a person would write, and so is the
mistake: a cross entropy written by hand takes the logarithm of 1 - p. Everything goes well until
the network is so sure of one digit that p rounds to 1: then log(0) is -inf, and the loss is NaN.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tensortrace import UsageError, trace

STEPS, BATCH = 40, 32


def load_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Load the 1797 handwritten digits of 8x8 pixels that ship with the package.

    Returns:
        images: float32 ``(1797, 8, 8)`` in 0..16, row by row from the top left; 16 is ink.
        labels: int64 ``(1797,)`` in 0..9.
    Source:
        UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0.
    """
    with as_file(files("tensortrace") / "data" / "digits.npz") as path, np.load(path) as digits:
        return digits["images"].astype(np.float32), digits["labels"].astype(np.int64)


def cross_entropy(p: Tensor, target: Tensor) -> Tensor:
    """Average binary cross entropy, by hand. The fault: ``0 * log(0)`` is NaN."""
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


def train(out: str) -> list[float]:
    """Train on the digits for `STEPS` steps, traced into `out`; returns the loss of each step."""
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Sigmoid()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    with trace(out):
        for batch in torch.split(torch.randperm(len(images)), BATCH)[:STEPS]:
            target = nn.functional.one_hot(labels[batch], 10)
            loss = cross_entropy(model(images[batch]), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    return losses


def main(out: str = "log.jsonl") -> int:
    """Run the demo and say how to go on.

    Args:
        out: where the log goes.
    Returns:
        The exit code, 0.
    Raises:
        UsageError: tracing is switched off.
    """
    from tensortrace.capture.tracer import switched_off

    if switched_off():
        raise UsageError("tracing is switched off (TENSORTRACE), so the demo would find nothing.")
    digits = f"{STEPS * BATCH} handwritten digits"
    print(f"Training a classifier on {digits}, {STEPS} steps, inside `with trace():`.")
    print("Its hand-written cross entropy has a fault. Watch for the finding:\n", flush=True)
    losses = train(out)
    print(f"\nLoss: {losses[0]:.2f} at step 0, {losses[-1]:.2f} at step {STEPS - 1}. Go on with:")
    print(f"  tensortrace view {out}      walk the run step by step")
    print(f"  tensortrace report {out}    the findings and a table of the layers")
    return 0
