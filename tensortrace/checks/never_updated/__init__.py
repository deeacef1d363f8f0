"""TT401: parameters that get gradients and never move."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, unheld
from tensortrace.checks.never_updated.unmoved import faint_ones, unmoved_since
from tensortrace.checks.never_updated.unstepped import held_unstepped, never_stepped
from tensortrace.records import ChainLink

_FIXES = {
    "waiting": "call its step() after backward() as well, unless it is to begin later on",
    "unmoved": "look for code that restores the weights, and for a learning rate below the "
    "rounding of the dtype (bfloat16 keeps 3 digits): keep float32 master weights",
    "faint": "where it stays so: give the term of the loss that these weights serve a larger "
    "factor, or look at what makes its gradient that small on the way",
}


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
                replaced, and call step() of every one; freeze on purpose with
                requires_grad_(False), which also saves time
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
    yield from never_stepped(step, memory, unused, idle, passes)
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
    unmoved = unmoved_since(step, memory, updates)
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
    waiting, forgotten = _part(forgotten, held_unstepped(memory))
    faint, unmoved = _part(unmoved, faint_ones(memory))
    told_of = {"forgotten": forgotten, "waiting": waiting, "unmoved": unmoved, "faint": faint}
    for why, names in told_of.items():
        if names:
            yield _draft(step, why, names, updates)


def _draft(step: StepView, why: str, names: list[str], updates: int) -> Draft:
    many = len(names) > 1
    still = "do not change" if many else "does not change"
    said = {
        "forgotten": "in no optimizer that steps",
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


def _part(names: list[str], apart: Container[str]) -> tuple[list[str], list[str]]:
    """Those that are to be told apart, and the others."""
    return [n for n in names if n in apart], [n for n in names if n not in apart]
