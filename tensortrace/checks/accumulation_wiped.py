"""TT210: gradients that are meant to add up over several batches, and are cleared in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from tensortrace.checks import Draft, StepView, check, clears
from tensortrace.records import Action, ChainLink, Location

# What a turn does and on which lines, in order.
_Turn: TypeAlias = tuple[tuple[str, Location | None], ...]
_TURN = frozenset({"fetch", "zero_grad", "loss"})
_MOST_LOOPS = 64
# A gradient is the same but for its scale if the norms of its parts are, as bfloat16 rounds.
_ROUNDING = 0.01


@dataclass(slots=True)
class _Loop:
    """Turns that do the same on the same lines, of which only some step.

    `bare` are those since the last step; `apart` those between the steps before, `running` how many
    times so, -1 once their number has changed for no reason. A cycle may differ that begins with an
    epoch, or after another loop (`early`); one in which an epoch begins says nothing (`split`).
    `settled` once there was one without any of it.
    """

    bare: int = 0
    apart: int | None = None
    running: int = 0
    early: bool = True
    split: bool = False
    settled: bool = False


@check("TT210", "accumulation-wiped", since=("fetch",), until=("threads",))
def accumulation_wiped(
    step: StepView, memory: dict[str, Any], *, sustain: int = 3, batches: int = 2
) -> Iterator[Draft]:
    """Gradients are cleared in each batch, and the optimizer steps only in every few.

    Symptom:    training is slow and noisy, as with the small batches that the accumulation was to
                make large; the memory and the time of most batches are spent for nothing
    Threshold:  of turns that do the same on the same lines, and each fetch a batch from a
                DataLoader, run backward and clear the gradients of the only optimizer, every n-th
                alone steps, or is skipped by a GradScaler: `sustain` times running, n > `batches`
                and the same from the first whole cycle on. The step takes the gradient of its own
                batch, no other: its parts are in the proportions that the last backward gave them
    Source:     definition: zero_grad clears what backward has added up. `sustain` and `batches`
                chosen here: turns whose step is left out for what their loss or gradient is, are
                not as regular
    Fix:        call optimizer.zero_grad() where optimizer.step() is, under the same `if`; divide
                the loss by the number of batches
    Misses:     batches that are no DataLoader's, as many gradients of one batch look like them;
                two batches to a step; several optimizers; several calls of backward() for a batch;
                gradients that are averaged over ranks, or clipped by value; gradients of the
                batches between that are taken for something else (a noise scale, a score) are
                reported
    Example:    for i, (x, y) in enumerate(loader):
                    optimizer.zero_grad()
                    (criterion(model(x), y) / 4).backward()
                    if (i + 1) % 4 == 0:
                        optimizer.step()
    Fixed:      for i, (x, y) in enumerate(loader):
                    (criterion(model(x), y) / 4).backward()
                    if (i + 1) % 4 == 0:
                        optimizer.step()
                        optimizer.zero_grad()
    """
    met: set[int] = memory.setdefault("optimizers", set())
    met.update(optimizer.index for optimizer in step.optimizers)
    did = [action for action in step.actions if action.action in _TURN]
    met.update(action.optimizer for action in did if action.optimizer is not None)
    if len(met) > 1:
        return
    begins = [action.seq for action in step.actions if action.action == "loader"]
    if not (step.losses or step.optimizers):  # a batch of a validation
        memory["began"] = memory.get("began") or bool(begins)
        return
    start = step.losses[0].seq if step.losses else step.optimizers[0].seq
    loop = _loop(memory, tuple((action.action, action.location) for action in did))
    if memory.get("began") or any(seq < start for seq in begins):
        loop.split, loop.early = loop.split or loop.bare > 0, loop.early or not loop.bare
    memory["began"] = any(seq > start for seq in begins)
    if not step.optimizers:
        loop.bare += 1
        return
    bare = _end_cycle(loop)
    if bare < batches or bare != loop.apart or loop.running < 0:
        return
    wiper = next((a for a in did if a.action == "zero_grad" and clears(a, min(met))), None)
    if wiper is None or not step.losses or not any(a.action == "fetch" for a in did):
        return
    own = _steps_with_its_own(step)
    if own is False and step.summary is not None and step.summary.full:
        loop.running = -1  # something else is made of the gradients
    elif own and loop.running >= sustain:
        yield _draft(step, wiper, loop, sustain)


def _loop(memory: dict[str, Any], turn: _Turn) -> _Loop:
    """What is known of the turns like this one; a cycle that others interrupt begins anew."""
    loops: dict[_Turn, _Loop] = memory.setdefault("loops", {})
    loop = loops.get(turn) or _Loop()
    if len(loops) < _MOST_LOOPS:
        loops[turn] = loop
    if memory.get("last") is not loop:
        memory["last"], loop.bare, loop.early, loop.split = loop, 0, True, False
    return loop


def _end_cycle(loop: _Loop) -> int:
    """Count a cycle that ends with a step; how many turns without one it had."""
    bare, early, split = loop.bare, loop.early, loop.split
    loop.bare, loop.early, loop.split = 0, False, False
    if split or loop.running < 0:
        return bare
    if bare == loop.apart:
        loop.running += 1
    elif loop.apart is None or not (early or loop.settled):
        loop.apart, loop.running = bare, 1
    elif not (early and loop.settled):
        loop.running = -1
    loop.settled = loop.settled or not early
    return bare


def _steps_with_its_own(step: StepView) -> bool | None:
    """Whether the optimizer takes what the backward of its turn gave; None where nobody knows.

    Gradients that were summed up, averaged or projected by hand are in other proportions. Those
    that were unscaled or clipped by their norm are in the same.
    """
    given: dict[str, list[float | None]] = {}
    for call in step.calls:
        if call.phase == "backward" and call.op is None and not call.inputs:
            for name, id in call.outputs:
                path = f"{call.module}.{name}" if call.module else name
                norm = step.tensors[id].norm if id in step.tensors else None
                given.setdefault(path, []).append(norm)
    shares: list[float] = []
    for param in step.params:
        norms = given.get(param.name, ())
        norm = param.grad.norm if param.grad is not None else None
        if len(norms) == 1 and norms[0] and norm is not None:
            shares.append(norm / norms[0])
    if not shares:
        return None
    if any(action.action in ("clip", "scale", "unscale") for action in step.actions):
        return len(shares) > 1 and max(shares) <= (1 + _ROUNDING) * min(shares)
    return all(abs(share - 1) <= _ROUNDING for share in shares)


def _draft(step: StepView, wiper: Action, loop: _Loop, sustain: int) -> Draft:
    stepped, apart = step.optimizers[-1], loop.apart or 0
    return Draft(
        message=f"{loop.running} times running (limit {sustain}) zero_grad cleared the gradients "
        f"of {apart} batches one by one before optimizer {stepped.index}, {stepped.cls}, stepped "
        f"with those of the next: only one batch in {apart + 1} counts",
        cause=f"optimizer {stepped.index}", phase="optimizer", value=loop.running, limit=sustain,
        location=wiper.location,
        chain=(ChainLink(stepped.seq, None, f"{stepped.cls}.step", stepped.location),),
        evidence={"optimizer": stepped.index, "batches": apart},
    )  # fmt: skip
