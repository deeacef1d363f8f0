"""TT706: the host waits: for the device in each step, or for data most of the time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from statistics import median
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Location
from tensortrace.text import location_text, number_text

_COPIES = frozenset(("cpu", "to", "numpy", "tolist"))
_HOSTS = frozenset(("cpu", "meta"))
_SHOWN = {"__repr__": "print", "__format__": "an f-string", "__bool__": "if",
          "__float__": "float()", "__int__": "int()", "__index__": "an index"}  # fmt: skip


@check("TT706", "host-waits", of=("full", "loader", "fetch"))
def host_waits(
    step: StepView,
    memory: dict[str, Any],
    *,
    sustain: int = 5,
    many: int = 10,
    share: float = 0.5,
    floor_ms: float = 5.0,
    window: int = 20,
) -> Iterator[Draft]:
    """The host waits for the device in each step, or waits for data most of the time.

    Symptom:    the device is idle half of the time (nvidia-smi shows 40 %), a larger one helps
                little, and the time goes with the number of lines printed or of files read
    Threshold:  outside modules a tensor of a device is read by the host (.item(), .cpu(), float(),
                if, print) in each of `sustain` full steps running that train: a note, a warning if
                it is done `many` times a step. Or: fetching a batch takes more than `share` of the
                time on the host from one fetch to the next, and more than `floor_ms`, as the median
                of `window` steps
    Source:     PyTorch Performance Tuning Guide, "Avoid unnecessary CPU-GPU synchronization" and
                "Enable async data loading and augmentation"; one .item() a step for a progress bar
                is common, so it is a note; `many`, `share` and `floor_ms` chosen here (silent on
                tests/healthy)
    Fix:        total += loss.detach(), and .item() once in a hundred steps; torch.where for if;
                DataLoader(..., num_workers=4, pin_memory=True, persistent_workers=True) and
                x.to(device, non_blocking=True)
    Misses:     what waits inside modules (level="module"), or by torch.cuda.synchronize(); on a
                device the time of the host is that of the device only where it waits; tracing
                takes time too, which makes the share smaller than it is
    Example:    total += loss.item()
                print(f"loss {loss}")
    Fixed:      total += loss.detach()
                if step % 100 == 0:
                    print(f"loss {total.item() / 100}")
    """
    summary = step.summary
    if summary is None:
        return
    yield from _data(step, memory, share, floor_ms, window)
    if not summary.full or not step.optimizers:
        return
    lines = _waits(step)
    running: dict[str, int] = memory.setdefault("running", {})
    memory["running"] = running = {place: running.get(place, 0) + 1 for place in lines}
    often = [place for place in lines if running[place] >= sustain]
    if often:
        count = sum(lines[place][0] for place in often)
        worst = max(often, key=lambda place: lines[place][0])
        _, what, location = lines[worst]
        yield Draft(
            message=f"the host waits for the device {count} times a step (limit {many}), in "
            f"{running[worst]} full steps running, by {what} in {len(often)} lines",
            cause="sync", severity="warning" if count >= many else "note", value=count, limit=many,
            location=location,
            evidence={"placed": "direct", "lines": {p: lines[p][0] for p in often[:20]}},
        )  # fmt: skip


def _waits(step: StepView) -> dict[str, tuple[int, str, Location | None]]:
    """Count, by line, how often the host reads from a device outside modules; and by what."""
    syncs = [a for a in step.actions if a.action == "sync"]
    found = [(_SHOWN.get(a.of or "", f".{a.of}()"), a.location) for a in syncs]
    for call in step.calls:
        if call.op not in _COPIES or call.module is not None or call.phase != "forward":
            continue
        given = [step.tensors[id].device for _, id in call.inputs[:1] if id in step.tensors]
        made = [step.tensors[id].device for _, id in call.outputs[:1] if id in step.tensors]
        if given and made and made[0] == "cpu" and given[0].split(":")[0] not in _HOSTS:
            found.append((f".{call.op}()", call.location))
    counts = Counter(location_text(location) for _, location in found)
    return {location_text(at): (counts[location_text(at)], what, at) for what, at in found}


def _data(
    step: StepView, memory: dict[str, Any], share: float, floor_ms: float, window: int
) -> Iterator[Draft]:
    for action in step.actions:
        if action.action == "loader":
            memory["loader"] = action.detail
    fetch = next((a for a in step.actions if a.action == "fetch"), None)
    before_ns = step.before.host_ns if step.before is not None else 0
    if fetch is None or not before_ns:
        return
    took_ns = fetch.detail.get("host_ns") or 0
    # The time of a step ends with the fetch that begins the next.
    recent = memory.setdefault("fetches", deque(maxlen=window))
    recent.append((took_ns, took_ns / before_ns))
    took_ms = median(ns for ns, _ in recent) / 1e6
    part = min(1.0, median(part for _, part in recent))
    if len(recent) == window and part > share and took_ms > floor_ms:
        yield Draft(
            message=f"fetching a batch takes {number_text(took_ms)} ms, {part:.0%} of each step "
            f"(limit {share:.0%}), the median of {window} steps",
            cause="data", value=part, limit=share, location=fetch.location, fix=_loader_fix(memory),
            evidence={"placed": "direct", "loader": memory.get("loader", {})},
        )  # fmt: skip


def _loader_fix(memory: dict[str, Any]) -> str:
    loader = memory.get("loader", {})
    workers = loader.get("workers", 0)
    more = f"num_workers={max(4, 2 * workers)} (it is {workers}), persistent_workers=True"
    pinned = "" if loader.get("pin_memory") else ", pin_memory=True for a CUDA device"
    return f"DataLoader(..., {more}{pinned}); prepare once on disk what is the same each epoch"
