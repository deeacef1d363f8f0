"""Whole stocks of programs, run plain and traced: the same bits, and not a word from the checks.

A training program is a function that trains for `STEPS` steps and returns every tensor that must
not depend on being traced (`state` collects them). It must be healthy: the checks are silent on it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.records import Call, Finding, Optimizer
from tests.capture import Recorded
from tests.test_edge_programs import attributes, fingerprint, hooks, rng_state, seed

# With every="auto" the first twenty steps are full; the rest shows the thinned ones.
STEPS = 24
EVERY: tuple[Any, ...] = (1, "auto")


def state(*holders: Any) -> list[Any]:
    """The tensors of modules (values, gradients, buffers), optimizers, lists and scalers."""
    found: list[Any] = []
    for holder in holders:
        if isinstance(holder, nn.Module):
            found += [t for p in holder.parameters() for t in (p.detach(), p.grad)]
            found += list(holder.buffers())
        elif isinstance(holder, torch.optim.Optimizer):
            kept = holder.state_dict()["state"]
            found += [v for s in kept.values() for v in s.values() if isinstance(v, Tensor)]
        elif isinstance(holder, torch.amp.GradScaler):
            found.append(torch.tensor(holder.get_scale()))
        else:
            found += list(holder)
    return [dense(tensor) for tensor in found]


def dense(tensor: Tensor | None) -> Tensor | None:
    """What lies behind a sparse tensor or the wrapper of a distributed one."""
    if isinstance(tensor, Tensor) and tensor.is_sparse:
        return tensor.detach().to_dense()
    return getattr(tensor, "_local_tensor", tensor)


def descend(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Any]:
    """Train in the plainest way; returns all state and the losses."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(i)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return state(model, optimizer, losses)


def outcome(program: Callable[[], Any], warns: Iterable[str]) -> tuple[Any, Any]:
    """Run a program from a fixed seed; returns the bits of what it made and the random state."""
    seed()
    with warnings.catch_warnings():
        for message in warns:
            warnings.filterwarnings("ignore", message)
        result = program()
    # Read the random states before anything else can draw.
    random = rng_state()
    return fingerprint(result), random


def assert_neutral(
    program: Callable[[], Any], warns: Iterable[str] = (), **options: Any
) -> Recorded:
    """Run a program plain and traced: the same to the bit, nothing left behind, no tracer error."""
    plain = outcome(program, warns)
    before = attributes()
    assert hooks() == {}
    records = Recorded()
    with trace(out=records.append, **options):
        traced = outcome(program, warns)
    assert hooks() == {}, "hooks left behind"
    assert attributes() == before, "methods left wrapped"
    assert [a.detail for a in records.actions("tracer_error")] == []
    assert traced == plain
    return records


def assert_silent(records: Recorded) -> None:
    """No error and no warning."""
    said = [f"{f.code} {f.message}" for f in records.of(Finding) if f.severity != "note"]
    assert said == []


def assert_seen(records: Recorded, updates: int = STEPS, *, backward: bool = True) -> None:
    """The trace recorded module calls, gradients where any are made, and each optimizer step."""
    phases = {c.phase for c in records.of(Call) if c.module is not None}
    assert phases == ({"forward", "backward"} if backward else {"forward"})
    taken = [o for o in records.of(Optimizer) if not o.skipped]
    assert len(taken) == updates


@contextlib.contextmanager
def one_thread() -> Any:
    """One thread within torch, as the rest of the suite has cores to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
