"""TT203: modules that the gradient of the loss never reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import compress
from typing import Any

from tensortrace.checks import Draft, StepView, check, completion_order, finite, plain_op
from tensortrace.records import Call, from_scalar
from tensortrace.text import location_text, module_text, number_text

# Of these the slope is 0 wherever there is one.
_STAIRS = frozenset(("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"))
_ITSELF = frozenset(("sub", "rsub", "div", "truediv"))
_NONE = (
    "look for detach(), .item(), .data, numpy(), argmax or torch.no_grad between the named module "
    "and the loss, or for an output that the loss does not use"
)
_ZERO = (
    "the path to the loss is there, and a factor on it is 0: look for round, floor or sign (let "
    "the gradient past it: w + (q - w).detach()), a clamp that always cuts off, ReLUs that are "
    "all dead, a weight or factor of 0, a difference or ratio of something with itself (the old "
    "of the two wants detach())"
)
_DIED = (
    "a lower learning rate for what leapt in the steps before: a scale or temperature whose exp() "
    "is 0 or that a clamp cuts off, ReLUs that are all dead, sigmoids that are all at their end"
)
_UNUSED = (
    "add their term to the loss if they are to learn; if they are not, leave them out of the "
    "forward, or set requires_grad to False"
)
_BLOCKED = (
    "if it is a checkpoint: model.enable_input_require_grads(), or requires_grad_(True) on the "
    "input of the first one, or use_reentrant=False; if not, take the call out of torch.no_grad(), "
    "or set requires_grad to False for what is not to learn"
)


@check("TT203", "cut-off-gradient")
def cut_off_gradient(
    step: StepView,
    memory: dict[str, Any],
    *,
    sustain: int = 8,
    idle: int = 40,
    share: float = 0.1,
) -> Iterator[Draft]:
    """Modules run and are held by the optimizer, and the gradient never reaches them.

    Symptom:    part of the model stays at its initial weights; the loss may go down all the same
    Threshold:  in `sustain` optimizer steps running, and in none before, a module that runs in
                training with gradients enabled, and whose parameters require them and are held by
                an optimizer that steps, has the gradient None or exactly 0, while another
                module has one. The same of one that runs in training under no_grad, inside a call
                with gradients enabled or on the way to one of a module that learns, and not again
                in the backward. Or: in `idle` optimizer steps whose loss is finite and not 0, and
                in none before, all gradients there are of all modules are exactly 0. Or: later on
                they are in `idle` running, and the loss is the same to the last bit in them,
                another than the first was, and >= `share` of that. A note, where an outermost
                module returns what was made of theirs and no op or module takes it, while another
                thing that it returns is taken: heads that the loss does not need
    Source:     definition (autograd leaves None where no path leads to the loss);
                torch.utils.checkpoint (a reentrant one runs its block under no_grad, and again in
                the backward if an input of it requires a gradient); `sustain` chosen here:
                zero-initialised residual branches and LoRA matrices get theirs in the second step,
                alternating losses within a few; `idle` so that it takes far longer than the first
                reward of a sparse one, before which the loss is 0 besides; `share` chosen here: a
                loss that a clamp keeps from 0 is solved there
    Fix:        look for detach(), .item(), .data, numpy(), argmax or torch.no_grad between the
                named module and the loss, or for an output that the loss does not use; where the
                gradient is exactly 0, for round, floor or sign (w + (q - w).detach() lets it past),
                a clamp that always cuts off, dead ReLUs, a factor of 0, a ratio with itself; behind
                a frozen embedding with reentrant checkpoints model.enable_input_require_grads(), or
                use_reentrant=False
    Misses:     a branch that is used less than once in `sustain` optimizer steps is reported, and a
                part that the optimizer holds and that runs under no_grad until it may learn, or is
                moved by hand; one parameter of a module that has others with a gradient is not; an
                optimum that a whole data set in one batch reaches exactly looks like one that died;
                of several outputs one that goes on as a number or through NumPy is a note
    Example:    def forward(self, x):
                    features = self.encoder(x).detach()
                    return self.decoder(features)
    Fixed:      def forward(self, x):
                    features = self.encoder(x)
                    return self.decoder(features)
    """
    summary = step.summary
    held: dict[int, set[str]] = memory.setdefault("held", {})
    reached: set[str] = memory.setdefault("reached", set())
    for optimizer in step.taken if "holds" in step.has else ():
        if optimizer.parameters is not None:
            held[optimizer.index] = set(optimizer.parameters)
    if summary is None:
        return
    columns = summary.modules
    if "met" in memory:
        if step.taken:
            reached.update(compress(columns.path, columns.param_grad_rms))
        # No gradient is 0, and none is lacking.
        if 0 not in columns.param_grad_rms and not any(o.no_grad for o in step.taken):
            memory.pop("still", None)
            return
    rows = list(zip(columns.path, columns.param_grad_rms, strict=False))
    some = any(rms for _, rms in rows)
    if some:
        memory["met"] = True
    if not step.taken:
        return
    yield from _all_zero(step, memory, rows, idle)
    yield from _died(step, memory, rows, idle, share)
    if not some:
        return
    streaks: dict[str, int] = memory.setdefault("streaks", {})
    reached.update(path for path, rms in rows if rms)
    cut = [path for path in _without(step, rows, held) if path not in reached]
    for path in cut:
        streaks[path] = streaks.get(path, 0) + 1
    told: set[str] = memory.setdefault("told", set())
    fresh = {path: streaks[path] for path in cut if streaks[path] >= sustain and path not in told}
    if fresh:
        yield from _tell(step, rows, fresh, told, sustain)


def _tell(
    step: StepView,
    rows: list[tuple[str, float | None]],
    fresh: dict[str, int],
    told: set[str],
    sustain: int,
) -> Iterator[Draft]:
    # Whether gradients were enabled, whether an expert got any rows at all, and whether a call that
    # raised was caught by the program, is known from the calls alone, which only full steps write.
    ran = [c for c in step.forward() if c.op is None and c.training is not False
           and not c.exception and not _empty(step, c)]  # fmt: skip
    enabled = {c.module for c in ran if c.grad_enabled}
    new = [path for path in fresh if path in enabled]
    off = set(fresh) - enabled
    blocked = _blocked(step, [c for c in ran if c.module in off])
    told.update(new, blocked)
    unused = [path for path in new if _is_unused(step, path)]
    for group in (unused, [path for path in new if path not in unused]):
        if group:
            yield _cut_draft(step, group, rows, fresh[group[-1]], sustain, unused=group is unused)
    if blocked:
        yield _blocked_draft(blocked, rows, fresh[next(reversed(blocked))], sustain)


def _cut_draft(
    step: StepView,
    new: list[str],
    rows: list[tuple[str, float | None]],
    streak: int,
    sustain: int,
    *,
    unused: bool,
) -> Draft:
    values = {path: rms for path, rms in rows if path in new}
    what = "exactly 0" if all(rms == 0 for rms in values.values()) else "None"
    return Draft(
        message=f"gradient {what} in {streak} optimizer steps running (limit {sustain}) "
        f"for {len(new)} of {len(rows)} modules: {_names(new)}"
        f"{'; what was made of theirs is returned, and nothing takes it' * unused}",
        severity="note" if unused else None,
        # The last in order of call is the one next to the cut.
        cause=new[-1], phase="backward", module=new[-1], value=streak, limit=sustain,
        location=next((c.location for c in step.calls if c.module == new[-1]), None),
        evidence={"modules": new, "profile": [[path, rms] for path, rms in rows]},
        fix=_UNUSED if unused else _ZERO if what == "exactly 0" else _NONE,
    )  # fmt: skip


def _is_unused(step: StepView, path: str) -> bool:
    """Whether what came of a module was returned to the program, which took other things only."""
    forward, views = step.forward(), {id: t.view_of for id, t in step.tensors.items()}
    made = {id for call in forward if call.module == path for _, id in call.outputs}
    taken = {a.tensor for a in step.losses if a.tensor is not None}
    for call in forward:
        given = {id for _, id in call.inputs}
        given |= {of for id in given if (of := views.get(id)) is not None}
        if call.parent is None:
            taken |= given
        elif not made.isdisjoint(given):
            made.update(id for _, id in call.outputs)
    returned = [{id for _, id in c.outputs} for c in forward if c.parent is None and c.op is None]
    from_it = [ids for ids in returned if not made.isdisjoint(ids)]
    return bool(from_it) and made.isdisjoint(taken) and all(ids & taken for ids in from_it)


def _blocked_draft(
    blocked: dict[str, Call], rows: list[tuple[str, float | None]], streak: int, sustain: int
) -> Draft:
    new = list(blocked)
    borders = list(dict.fromkeys(call.module or "" for call in blocked.values()))
    call = blocked[new[-1]]
    return Draft(
        message=f"gradient None in {streak} optimizer steps running (limit {sustain}) for "
        f"{len(new)} of {len(rows)} modules: {_names(new)}; {_names(borders)} ran under no_grad, "
        "with gradients enabled around, and not again in the backward",
        cause=f"no_grad {new[-1]}", phase="backward", module=call.module, seq=call.seq,
        value=streak, limit=sustain, location=call.location,
        explanation="what runs under no_grad does not learn; a reentrant checkpoint runs its block "
        "so, and again in the backward only if an input of it requires a gradient",
        evidence={"modules": new, "no_grad": borders,
                  "profile": [[path, rms] for path, rms in rows]},
        fix=_BLOCKED,
    )  # fmt: skip


def _names(paths: list[str]) -> str:
    return ", ".join(module_text(path) for path in paths[:4]) + (", ..." if len(paths) > 4 else "")


def _blocked(step: StepView, calls: list[Call]) -> dict[str, Call]:
    """Map modules that ran under no_grad where gradients are wanted to the outermost such call.

    The output of a teacher or a target network goes to the loss, and to no module that learns.
    """
    by_seq = step.by_seq()
    wanted: dict[int, bool] = {}
    found: dict[str, Call] = {}
    for call in calls:
        path, outer, around = call.module or "", call, _around(by_seq, call)
        while around is not None and not around.grad_enabled:
            outer, around = around, _around(by_seq, around)
        if outer.seq not in wanted:
            wanted[outer.seq] = around is not None or _goes_on(step, outer)
        if wanted[outer.seq]:
            found.setdefault(path, outer)
    return found


def _around(by_seq: Mapping[int, Call], call: Call) -> Call | None:
    return by_seq.get(call.parent) if call.parent is not None else None


def _goes_on(step: StepView, call: Call) -> bool:
    """Whether what a call made reaches a module that learns, through calls that were seen."""
    made = {id for _, id in call.outputs}
    for later in step.forward():
        if later.seq > call.seq and not made.isdisjoint(id for _, id in later.inputs):
            if later.op is None and later.grad_enabled and step.learns(later.module or ""):
                return True
            made.update(id for _, id in later.outputs)
    return False


def _all_zero(
    step: StepView, memory: dict[str, Any], rows: list[tuple[str, float | None]], idle: int
) -> Iterator[Draft]:
    """Tell of a run in which no parameter has had a gradient other than 0."""
    if any(o.grad_norm != 0 for o in step.taken):
        memory["met"] = True
    zero = [path for path, rms in rows if rms == 0]
    loss = from_scalar(step.summary.loss) if step.summary is not None else None
    # A reward that has never come, a margin that is kept: then the loss is 0 as well.
    if "met" in memory or not zero or not finite(loss) or loss == 0:
        return
    memory["idle"] = memory.get("idle", 0) + 1
    if step.summary is not None and step.summary.full:
        # Most steps past the first twenty have no ops.
        memory["flat"] = _flat(step) or memory.get("flat")
    if memory["idle"] < idle:
        return
    call, what = memory.get("flat") or (None, "")
    by = f": {what} at {location_text(call.location)}" if call else ""
    backward = next((a.location for a in step.actions if a.action == "loss"), None)
    # Weights that are all 0 keep each other there; float16 rounds what is small to 0.
    told = (f.id for f in step.findings if f.code in ("TT403", "TT502"))
    yield Draft(
        message=f"the gradient of all {len(zero)} modules that have one is exactly 0 in "
        f"{memory['idle']} optimizer steps, from the first on (limit {idle}), at a loss of "
        f"{number_text(loss)}{by}",
        cause="all", phase="backward", module=call.module if call else zero[-1],
        op=call.op if call else None, value=memory["idle"], limit=idle,
        location=call.location if call else backward, follows=next(told, None),
        explanation="weights whose gradient is 0 do not learn: nothing does in this run",
        evidence={"modules": zero, "placed": "direct" if call else "not known"}, fix=_ZERO,
    )  # fmt: skip


def _died(
    step: StepView,
    memory: dict[str, Any],
    rows: list[tuple[str, float | None]],
    idle: int,
    share: float,
) -> Iterator[Draft]:
    """Tell of a run whose gradients are all 0 by now, at a loss that does not move either."""
    loss = from_scalar(step.summary.loss) if step.summary is not None else None
    if loss is None or not finite(loss):
        memory.pop("still", None)
        return
    first: float = memory.setdefault("first", loss)
    zero = [path for path, rms in rows if rms == 0]
    none = not any(rms for _, rms in rows) and all(o.grad_norm == 0 for o in step.taken)
    # A loss that has never moved is TT608's.
    if "met" not in memory or not zero or not none or loss == first or loss < share * first:
        memory.pop("still", None)
        return
    still = memory.get("still")
    if still is None or still[0] != loss:
        still = (loss, 0, None)
    constant = _constant(step) if step.summary and step.summary.full else None
    _, count, seen = memory["still"] = (loss, still[1] + 1, constant or still[2])
    if count < idle:
        return
    call, what = seen or (None, "")
    backward = next((a.location for a in step.actions if a.action == "loss"), None)
    # What told of the leap, or of the units that it left dead or saturated, told why.
    told = (f.id for f in step.findings
            if f.code in ("TT301", "TT302", "TT402", "TT404", "TT502"))  # fmt: skip
    yield Draft(
        message=f"the gradient of all {len(zero)} modules that have one is exactly 0 in {count} "
        f"optimizer steps running (limit {idle}), as it was not before, at a loss of "
        f"{number_text(loss)} to the last bit{what}",
        cause="died", phase="backward", module=call.module if call else zero[-1],
        op=call.op if call else None, value=count, limit=idle,
        location=call.location if call else backward, follows=next(told, None),
        explanation="weights whose gradient is 0 do not learn: nothing does any more",
        evidence={"modules": zero, "placed": "direct" if call else "not known"}, fix=_DIED,
    )  # fmt: skip


def _constant(step: StepView) -> tuple[Call, str] | None:
    """Find the first call with a graph that made the same value throughout; and say which."""
    for call in completion_order(step.forward()):
        made = step.tensors.get(call.outputs[0][1]) if call.outputs else None
        if made is None or not made.requires_grad or call.recompute or len(made.shape or ()) < 2:
            continue
        if made.numel > 1 and made.min is not None and made.min == made.max:
            by = call.op or module_text(call.module)
            return call, f"; all {made.numel} that {by} returns are {number_text(made.min)}"
    return None


def _flat(step: StepView) -> tuple[Call, str] | None:
    """Find an op with a graph whose slope is 0 for certain, the last; and say what it is."""
    for call in reversed(step.forward()):
        made = step.tensors.get(call.outputs[0][1]) if call.outputs else None
        if made is None or not made.requires_grad or call.recompute:
            continue
        word = plain_op(call.op)
        if word in _STAIRS:
            return call, f"the slope of {word} is 0"
        ids = [id for _, id in call.inputs]
        if word in _ITSELF and len(ids) == 2 and ids[0] == ids[1]:
            return call, f"{word} of a tensor and itself is constant"
    return None


def _without(
    step: StepView, rows: list[tuple[str, float | None]], held: dict[int, set[str]]
) -> list[str]:
    """List the modules of this step without a gradient whose parameters an optimizer moves."""
    stepping = set[str]().union(*(held.get(o.index, set()) for o in step.taken))
    # A gradient put into .grad by hand passes no hook: then nothing lacks one at the optimizer.
    lacking = any(o.no_grad for o in step.taken)
    return [
        path
        for path, rms in rows
        if not rms and (rms == 0 or lacking) and not stepping.isdisjoint(step.trainable(path))
    ]


def _empty(step: StepView, call: Call) -> bool:
    made = [step.tensors[id] for _, id in call.outputs if id in step.tensors]
    return bool(made) and not any(t.numel for t in made)
