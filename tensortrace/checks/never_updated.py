"""TT401: parameters that get gradients and never move."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from tensortrace.checks import Draft, StepView, check, held_by, unheld
from tensortrace.records import Action, ChainLink, Location, Optimizer, Param, Tensor, from_scalar

# So many batches are known again; 100 backwards are told of whatever they were on.
_MOST_BATCHES = 100
# Of float32 half the distance between two numbers is 6e-8 of them; momentum adds up to ten times.
_ROUNDING = 6e-9
_FIXES = {
    "waiting": "call its step() after backward() as well, unless it is to begin later on",
    "unmoved": "look for code that restores the weights, and for a learning rate below the "
    "rounding of the dtype (bfloat16 keeps 3 digits): keep float32 master weights",
    "faint": "where it stays so: give the term of the loss that these weights serve a larger "
    "factor, or look at what makes its gradient that small on the way",
}


@dataclass(slots=True)
class _Unused:
    """How many backwards an optimizer has cleared the gradients of; the last that it has not.

    It `holds` parameters of these names.

    Before `scheduled` of them running something had set another learning rate; `repeated` of them
    running gave a loss and gradients that one before had given, as the last did if `again`.
    `epoch` is where that of its batch began; `passes` are those of each sampler that shuffles.
    """

    cleared: int = 0
    scheduled: int = 0
    repeated: int = 0
    rates: Any = None
    backward: Action | None = None
    again: bool = False
    epoch: Action | None = None
    passes: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    holds: frozenset[str] = frozenset()

    def passed(self, times: int) -> bool:
        """Whether a sampler has begun so many epochs."""
        return any(len(epochs) >= times for epochs in self.passes.values())


@check("TT401", "never-updated", after=("TT202", "TT303", "TT405", "TT406"), until=("threads",))
def never_updated(
    step: StepView,
    memory: dict[str, Any],
    *,
    updates: int = 4,
    idle: int = 20,
    unused: int = 100,
    passes: int = 3,
) -> Iterator[Draft]:
    """Parameters get a gradient in every step and no optimizer moves them.

    Symptom:    part of the model stays at its initial weights though its gradients look healthy
    Threshold:  in `updates` optimizer steps running a module in training mode has gradients of its
                own parameters, and they are held by no optimizer that has stepped so far, or their
                update is exactly 0 at a learning rate above 0 and was so from the start (a note if
                the gradient is so small that SGD rounds it away, or if an optimizer that has never
                stepped holds them and clears their gradients: it may wait for its turn).
                Or: every learning rate of an optimizer is exactly 0 in more than `idle` of its
                steps running. Or: an optimizer that has never stepped has cleared its gradients,
                with a backward before it each time, `unused` times running in which modules are in
                training mode, and its first parameters are what they were; `idle` times where its
                learning rate is another one each time, as a scheduler sets it, or (a note, and only
                while no optimizer has stepped) where loss, activations and gradients are each time
                those of a backward before, by their norms, or where a sampler that shuffles has
                begun `passes` epochs of their batches
    Source:     definition; the numbers are chosen here: both optimizers of a GAN have stepped after
                `updates`, a warm-up from 0 has one step at 0 (measured: tests/healthy); tasks or
                samples whose gradients are taken one by one are fewer than `unused`, and each has
                another one, and is met once
    Fix:        give the optimizer all of model.parameters(), after the last layer was added or
                replaced; freeze on purpose with requires_grad_(False), which also saves time
    Misses:     a network for a perceptual loss in training mode that is not frozen is reported;
                an optimizer that takes its first step after `updates` steps of another one too,
                unless it clears gradients from the start (a note);
                weights that stop moving later in the run: they have converged, or the learning rate
                has decayed below their rounding (TT410); those of LBFGS, which may converge in its
                first step (a subclass has another name, and is told of); layers that TT202 or TT303
                names
    Example:    encoder, decoder = Encoder(), Decoder()
                optimizer = torch.optim.Adam(decoder.parameters())
                loss = criterion(decoder(encoder(x)), x)
    Fixed:      encoder, decoder = Encoder(), Decoder()
                optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
                loss = criterion(decoder(encoder(x)), x)
    """
    missing, taken = unheld(step), step.taken
    zero_lr: dict[int, int] = memory.setdefault("zero_lr", {})
    yield from _never_stepped(step, memory, unused, idle, passes)
    for optimizer in taken:
        index, rates = optimizer.index, optimizer.lr
        still = bool(rates) and rates.count(0) == len(rates)
        zero_lr[index] = zero_lr.get(index, 0) + 1 if still else 0
    if step.summary is None or not taken:
        return
    for index, count in zero_lr.items():
        if count > idle:
            yield Draft(
                message=f"the learning rate of optimizer {index} is 0 in {count} of its steps "
                f"running (limit {idle}): nothing it holds moves",
                cause=f"lr {index}", phase="optimizer", value=count, limit=idle,
                location=next((o.location for o in taken if o.index == index), None),
                fix="check the scheduler: its total number of steps, and where step() is called",
            )  # fmt: skip
    forgotten = [name for count, names in missing.values() if count >= updates for name in names]
    unmoved = _unmoved(step, memory, updates)
    if not (forgotten or unmoved):
        return
    # Where another check says why, it has said all.
    told = {name for f in step.findings if f.code in ("TT405", "TT406")
            for name in f.evidence["parameters"]}  # fmt: skip
    forgotten = [name for name in forgotten if name not in told]
    # A gradient that has died out on its way moves nothing, so a layer of such a row is told.
    faded = {path for f in step.findings if f.code in ("TT202", "TT303")
             for path, _ in f.evidence["profile"]}  # fmt: skip
    unmoved = [name for name in unmoved if name.rpartition(".")[0] not in faded]
    late = frozenset().union(*(seen.holds for seen in memory["unused"].values()))
    waiting, forgotten = _part(forgotten, late)
    faint, unmoved = _part(unmoved, memory.get("faint", ()))
    told_of = {"forgotten": forgotten, "waiting": waiting, "unmoved": unmoved, "faint": faint}
    for why, names in told_of.items():
        if names:
            yield _draft(step, why, names, updates)


def _part(names: list[str], apart: Container[str]) -> tuple[list[str], list[str]]:
    """Those that are to be told apart, and the others."""
    return [n for n in names if n in apart], [n for n in names if n not in apart]


def _never_stepped(
    step: StepView, memory: dict[str, Any], unused_most: int, idle_most: int, passes: int
) -> Iterator[Draft]:
    """Tell of an optimizer of which only zero_grad is called.

    Args:
        unused_most: backwards that may be cleared so.
        idle_most: those that may be at a learning rate that changes each time, which is meant
            for steps, or on the same batches again: gradients of many tasks or samples are taken
            at one rate, and one of each.
        passes: epochs of one sampler that say so, too.
    """
    stepped: set[int] = memory.setdefault("stepped", set())
    unused: dict[int, _Unused] = memory.setdefault("unused", {})
    began: dict[Location | None, Action] = memory.setdefault("began", {})
    again = bool(unused or not stepped) and _is_repeated(step, memory)
    epoch: Action | None = None
    for record in step.happened():
        if isinstance(record, Optimizer):
            stepped.add(record.index)
            unused.pop(record.index, None)
        elif record.action == "loader":
            began[record.location] = record
        elif record.action == "fetch":
            epoch = began.get(record.location)
        elif record.action == "loss":
            for seen in unused.values():
                seen.backward, seen.again, seen.epoch = record, again, epoch
        elif record.action == "zero_grad" and record.optimizer not in stepped:
            index = record.optimizer
            if index is None:
                continue
            seen = unused.setdefault(index, _Unused())
            seen.holds |= frozenset(record.detail.get("held", ()))
            loss, seen.backward = seen.backward, None
            if loss is None:
                continue
            _count(seen, record)
            scheduled = seen.scheduled >= idle_most
            again_and_again = seen.repeated >= idle_most or seen.passed(passes)
            soon = scheduled or (again_and_again and not stepped)
            most = idle_most if soon else unused_most
            if seen.cleared >= most and any(map(step.trains, step.modules)):
                yield Draft(
                    message=f"optimizer {index}, {record.of}, has cleared the gradients of "
                    f"{seen.cleared} backwards (limit {most}) and has never stepped: its "
                    "parameters are what they were",
                    severity=None if scheduled or seen.cleared >= unused_most else "note",
                    cause=f"unused {index}", phase="optimizer", value=seen.cleared, limit=most,
                    location=loss.location, explanation="gradients alone move nothing",
                    fix="call optimizer.step() after backward()", evidence={"optimizer": index},
                )  # fmt: skip


def _count(seen: _Unused, zero_grad: Action) -> None:
    """Take in that an optimizer which has never stepped clears the gradients of a backward."""
    still, rates, before = zero_grad.detail.get("still"), zero_grad.detail.get("lr"), seen.rates
    seen.rates = rates
    seen.cleared = seen.cleared + 1 if still else 0
    seen.repeated = seen.repeated + 1 if still and seen.again else 0
    changed = None not in (rates, before) and rates != before
    seen.scheduled = seen.scheduled + 1 if changed else 0
    if not still:
        seen.passes.clear()
    sampler = seen.epoch.detail.get("sampler_index") if seen.epoch is not None else None
    if seen.epoch is not None and sampler is not None:
        seen.passes.setdefault(sampler, set()).add((seen.epoch.step, seen.epoch.seq))


def _is_repeated(step: StepView, memory: dict[str, Any]) -> bool:
    """Whether the only backward of a step gave the loss and the gradients of one before.

    A model that starts at zero gives the same for all inputs.
    """
    if step.summary is None or len(step.losses) != 1:
        return False
    loss, columns = step.losses[0].detail.get("value"), step.summary.modules
    if loss is None or not any(columns.param_grad_rms) or not any(columns.output_rms):
        return False
    before: set[Any] = memory.setdefault("before", set())
    now = (loss, *columns.output_rms, *columns.param_grad_rms)
    repeated = now in before
    if len(before) < _MOST_BATCHES:
        before.add(now)
    return repeated


def _unmoved(step: StepView, memory: dict[str, Any], updates: int) -> list[str]:
    assert step.summary is not None
    columns = step.summary.modules
    ever: set[str] = memory.setdefault("moved", set())
    ever.update(compress(columns.path, columns.update_ratio))
    if not step.params and ever.issuperset(compress(columns.path, columns.param_grad_rms)):
        return []
    taken, held = step.taken, held_by(step)
    moving = all((from_scalar(rate) or 0) > 0 for o in taken for rate in o.lr)
    stepping: set[str] | None = None
    streaks: dict[str, int] = memory.setdefault("streaks", {})
    found: list[str] = []
    # The rms is that of the whole layer: the gradient of a bias hides one of zeros beside it.
    idle: set[str] = memory.setdefault("idle", set())
    faint: set[str] = memory.setdefault("faint", set())
    for param in step.params:
        if param.grad is not None:
            (idle.add if _is_zero(param.grad) else idle.discard)(param.name)
            (faint.add if _rounds_away(step, param) else faint.discard)(param.name)
    for path, rms, moved in zip(
        columns.path, columns.param_grad_rms, columns.update_ratio, strict=False
    ):
        if path in ever:
            continue
        if not rms or not step.trains(path):
            continue
        names = step.trainable(path) if moving and moved == 0 else []
        if any(name in held.get(o.index, ()) for o in taken if o.cls == "LBFGS" for name in names):
            continue
        if names and stepping is None:
            stepping = set().union(*(held.get(o.index, set()) for o in taken))
        # The ratio is that of the weights, where there are any: a bias beside them may move.
        told = [name for name in step.trainable(path, dims=2) or names if name not in idle]
        unmoved = bool(names and told) and stepping is not None and stepping.issuperset(names)
        streaks[path] = streaks.get(path, 0) + 1 if unmoved else 0
        if streaks[path] >= updates:
            found += told
    return found


def _rounds_away(step: StepView, param: Param) -> bool:
    """Whether what SGD takes off a parameter is too little to be seen in it."""
    wrote, grad = step.step_of(param), param.grad
    norm, value = grad.norm if grad is not None else None, param.value.norm
    if wrote is None or wrote.cls != "SGD" or norm is None or value is None:
        return False
    return wrote.highest_lr * norm < _ROUNDING * value


def _is_zero(grad: Tensor) -> bool:
    return grad.numel > 0 and grad.zeros == grad.numel


def _draft(step: StepView, why: str, names: list[str], updates: int) -> Draft:
    many = len(names) > 1
    still = "do not change" if many else "does not change"
    said = {
        "forgotten": "in no optimizer",
        "waiting": "held by an optimizer that has never stepped",
    }.get(why, f"held by an optimizer with lr > 0 and {still}")
    what = f"{len(names)} parameters have gradients" if many else "1 parameter has a gradient"
    path = next((p for p in step.modules if names[0] in step.trainable(p)), None)
    more = ", ..." if len(names) > 4 else ""
    taken = next(iter(step.taken), None)
    ran = next((c for c in step.calls if c.module == path and c.phase == "forward"), None)
    small = ", of less than what the optimizer rounds away," if why == "faint" else ""
    return Draft(
        message=f"{what}{small} and {'are' if many else 'is'} {said}, {updates} optimizer steps "
        f"running: {', '.join(names[:4])}{more}",
        severity="note" if why in ("waiting", "faint") else None,
        cause=why, phase="optimizer", module=path, param=names[0], value=len(names), limit=0,
        location=taken.location if taken else None,
        chain=(ChainLink(ran.seq, None, path, ran.location),) if ran else (),
        fix=_FIXES.get(why), evidence={"parameters": names[:100]},
    )  # fmt: skip
