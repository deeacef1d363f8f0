"""TT203: modules that the gradient of the loss never reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call
from tensortrace.text import module_text


@check("TT203", "cut-off-gradient")
def cut_off_gradient(
    step: StepView, memory: dict[str, Any], *, sustain: int = 8
) -> Iterator[Draft]:
    """Modules run and are held by the optimizer, and the gradient never reaches them.

    Symptom:    part of the model stays at its initial weights; the loss may go down all the same
    Threshold:  in `sustain` optimizer steps running, and in none before, a module that runs in
                training with gradients enabled, and whose parameters require them and are held by
                an optimizer that steps, has the gradient None or exactly 0, while another
                module has one
    Source:     definition (autograd leaves None where no path leads to the loss); `sustain` chosen
                here: zero-initialised residual branches and LoRA matrices get theirs in the second
                step, alternating losses within a few
    Fix:        look for detach(), .item(), .data, numpy(), argmax or torch.no_grad between the
                named module and the loss, or for an output that the loss does not use
    Misses:     a branch that is used less than once in `sustain` optimizer steps is reported; one
                parameter of a module that has others with a gradient is not
    Example:    def forward(self, x):
                    features = self.encoder(x).detach()
                    return self.decoder(features)
    Fixed:      def forward(self, x):
                    features = self.encoder(x)
                    return self.decoder(features)
    """
    summary = step.summary
    taken = [o for o in step.optimizers if not o.skipped]
    held: dict[int, set[str]] = memory.setdefault("held", {})
    for optimizer in taken:
        if optimizer.parameters is not None:
            held[optimizer.index] = set(optimizer.parameters)
    if summary is None or not taken:
        return
    columns = summary.modules
    rows = list(zip(columns.path, columns.param_grad_rms, strict=False))
    if not any(rms for _, rms in rows):
        return
    streaks: dict[str, int] = memory.setdefault("streaks", {})
    reached: set[str] = memory.setdefault("reached", set())
    reached.update(path for path, rms in rows if rms)
    cut = [path for path in _without(step, rows, held) if path not in reached]
    for path in cut:
        streaks[path] = streaks.get(path, 0) + 1
    cut = [path for path in cut if streaks[path] >= sustain]
    told: set[str] = memory.setdefault("told", set())
    if told.issuperset(cut):
        return
    # Whether gradients were enabled, and whether an expert got any rows at all, is known from the
    # calls alone, which only full steps write.
    enabled = {c.module for c in step.calls if c.phase == "forward" and c.op is None
               and c.grad_enabled and c.training is not False and not _empty(step, c)}  # fmt: skip
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
    )  # fmt: skip


def _without(
    step: StepView, rows: list[tuple[str, float | None]], held: dict[int, set[str]]
) -> list[str]:
    """List the modules of this step without a gradient whose parameters an optimizer moves."""
    taken = [o for o in step.optimizers if not o.skipped]
    stepping = set[str]().union(*(held.get(o.index, set()) for o in taken))
    # A gradient put into .grad by hand passes no hook: then nothing lacks one at the optimizer.
    lacking = any(o.no_grad for o in taken)
    return [
        path
        for path, rms in rows
        if not rms and (rms == 0 or lacking) and not stepping.isdisjoint(step.trainable(path))
    ]


def _empty(step: StepView, call: Call) -> bool:
    made = [step.tensors[id] for _, id in call.outputs if id in step.tensors]
    return bool(made) and not any(t.numel for t in made)
