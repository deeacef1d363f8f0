"""TT203: modules that the gradient of the loss never reaches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from typing import Any

from tensortrace.checks import Draft, StepView, check, finite, plain_op
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


@check("TT203", "cut-off-gradient")
def cut_off_gradient(
    step: StepView, memory: dict[str, Any], *, sustain: int = 8, idle: int = 40
) -> Iterator[Draft]:
    """Modules run and are held by the optimizer, and the gradient never reaches them.

    Symptom:    part of the model stays at its initial weights; the loss may go down all the same
    Threshold:  in `sustain` optimizer steps running, and in none before, a module that runs in
                training with gradients enabled, and whose parameters require them and are held by
                an optimizer that steps, has the gradient None or exactly 0, while another
                module has one. Or: in `idle` optimizer steps whose loss is finite and not 0, and in
                none before, all gradients there are of all modules are exactly 0
    Source:     definition (autograd leaves None where no path leads to the loss); `sustain` chosen
                here: zero-initialised residual branches and LoRA matrices get theirs in the second
                step, alternating losses within a few; `idle` so that it takes far longer than the
                first reward of a sparse one, before which the loss is 0 besides
    Fix:        look for detach(), .item(), .data, numpy(), argmax or torch.no_grad between the
                named module and the loss, or for an output that the loss does not use; where the
                gradient is exactly 0, for round, floor or sign (w + (q - w).detach() lets it past),
                a clamp that always cuts off, dead ReLUs, a factor of 0, a ratio with itself
    Misses:     a branch that is used less than once in `sustain` optimizer steps is reported; one
                parameter of a module that has others with a gradient is not; gradients that are all
                0 only later on
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
            return
    rows = list(zip(columns.path, columns.param_grad_rms, strict=False))
    some = any(rms for _, rms in rows)
    if some:
        memory["met"] = True
    if not step.taken:
        return
    yield from _all_zero(step, memory, rows, idle)
    if not some:
        return
    streaks: dict[str, int] = memory.setdefault("streaks", {})
    reached.update(path for path, rms in rows if rms)
    cut = [path for path in _without(step, rows, held) if path not in reached]
    for path in cut:
        streaks[path] = streaks.get(path, 0) + 1
    cut = [path for path in cut if streaks[path] >= sustain]
    told: set[str] = memory.setdefault("told", set())
    if told.issuperset(cut):
        return
    # Whether gradients were enabled, whether an expert got any rows at all, and whether a call that
    # raised was caught by the program, is known from the calls alone, which only full steps write.
    enabled = {c.module for c in step.calls if c.phase == "forward" and c.op is None
               and c.grad_enabled and c.training is not False and not c.exception
               and not _empty(step, c)}  # fmt: skip
    new = [path for path in cut if path not in told and path in enabled]
    if not new:
        return
    told.update(new)
    values = {path: rms for path, rms in rows if path in new}
    what = "exactly 0" if all(rms == 0 for rms in values.values()) else "None"
    names = ", ".join(module_text(path) for path in new[:4]) + (", ..." if len(new) > 4 else "")
    yield Draft(
        message=f"gradient {what} in {streaks[new[-1]]} optimizer steps running (limit {sustain}) "
        f"for {len(new)} of {len(rows)} modules: {names}",
        # The last in order of call is the one next to the cut.
        cause=new[-1], phase="backward", module=new[-1], value=streaks[new[-1]], limit=sustain,
        location=next((c.location for c in step.calls if c.module == new[-1]), None),
        evidence={"modules": new, "profile": [[path, rms] for path, rms in rows]},
        fix=_ZERO if what == "exactly 0" else _NONE,
    )  # fmt: skip


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
