"""TT702: dropout and moving BatchNorm statistics where the network is judged or frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import BATCH_NORMS, BINARY_OPS, CLASS_OPS, DISTANCE_OPS, DROPOUTS
from tensortrace.records import Call, Location
from tensortrace.text import location_text, module_text

_DROPOUT_OPS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
                          "feature_alpha_dropout"))  # fmt: skip
# What makes a class of a score.
_GUESSES = frozenset(("argmax", "max", "gt", "ge", "round"))
_LOSSES = CLASS_OPS | DISTANCE_OPS | BINARY_OPS


@check("TT702", "train-mode-in-evaluation")
def train_mode_in_evaluation(
    step: StepView, memory: dict[str, Any], *, batches: int = 2, sustain: int = 3
) -> Iterator[Draft]:
    """The network is judged in train mode, or dropout or BatchNorm is on where it must not be.

    Symptom:    validation is worse than it should be and differs from run to run; BatchNorm learns
                the statistics of the validation data
    Threshold:  in `batches` steps running there is no backward and no optimizer step, and in the
                last a network that an optimizer holds runs outermost, in train mode, with gradients
                disabled, has a BatchNorm or a Dropout that acts inside, and a loss or the accuracy
                is computed. Or F.dropout, or a Dropout made in forward, acts in a module in eval
                mode (a note if neither is computed; the Dropout: with gradients disabled); with
                level="module", where each call of that module's forward comes to it with a p above
                0, and the outermost call has moved torch's random state. A note: a BatchNorm whose
                weights are frozen and in no optimizer runs in train mode inside a network that is
                trained, for `sustain` optimizer steps. Or inside a network in eval mode a BatchNorm
                or a spectral norm has the statistics it was made with: a warning if a loss or the
                accuracy is computed after an optimizer has stepped, else a note
    Source:     torch.nn.Module.eval, torch.nn.functional.dropout (training=True by default);
                `batches` and `sustain` chosen here
    Fix:        model.eval() before the evaluation and model.train() behind it; F.dropout(x, p,
                training=self.training), or a Dropout made in __init__; norm.eval() in a part that
                is frozen; for a norm without statistics: load them, copy buffers too where weights
                are averaged, or call torch.optim.swa_utils.update_bn
    Misses:     rollouts, teachers and BatchNorm recalibration compute no loss and are silent, but
                so is evaluation whose metric is not seen; F.dropout under a condition, of a forward
                that is decorated, or in a function that it calls, is seen with level="op" only; one
                that acts on purpose (Monte Carlo dropout), or a Dropout made anew for that, is
                reported, but at module level for training=True; norms on other devices than the
                CPU are not asked for their statistics
    Example:    for x, y in validation:
                    correct += (model(x).argmax(1) == y).sum()
    Fixed:      model.eval()
                for x, y in validation:
                    correct += (model(x).argmax(1) == y).sum()
                model.train()
    """
    held: set[str] = memory.setdefault("held", set())
    if step.optimizers:
        if "holds" in step.has:
            held.update(*(o.parameters for o in step.optimizers if o.parameters))
        memory["updates"] = memory.get("updates", 0) + len(step.taken)
    if step.summary is None:
        return
    idle = not (step.optimizers or step.losses)
    memory["idle"] = memory.get("idle", 0) + 1 if idle else 0
    if not step.calls:
        return  # all that follows is about calls
    yield from _left_on(step)
    yield from _never_fed(step, memory)
    judging = memory["idle"] >= batches and _judged(step)
    if not held or not (judging or (step.optimizers and memory["updates"] >= sustain)):
        return
    for root in step.forward():
        if root.op or root.parent is not None or not root.training:
            continue
        inside = step.inside(root)
        if held.isdisjoint(name for c in inside for name in step.trainable(c.module)):
            continue
        if judging and not root.grad_enabled:
            acting = [c.module or "" for c in inside if _acts(step, c)]
            if acting:
                yield Draft(
                    message=f"{module_text(root.module)} is evaluated in train mode: "
                    f"{len(acting)} BatchNorm or Dropout modules act as in training, in "
                    f"{memory['idle']} steps running (limit {batches})",
                    cause=f"evaluation {root.module}", phase="forward", module=root.module,
                    seq=root.seq, value=memory["idle"], limit=batches, location=root.location,
                    evidence={"placed": "direct", "modules": acting[:20]},
                )  # fmt: skip
        elif not judging and root.grad_enabled:
            frozen = [c.module or "" for c in inside if _is_frozen_norm(step, c, held)]
            if frozen:
                yield Draft(
                    message=f"{len(frozen)} BatchNorm modules are frozen and in train mode: their "
                    f"statistics move, after {memory['updates']} optimizer steps (limit {sustain})",
                    cause=f"frozen {root.module}", severity="note", phase="forward",
                    module=frozen[0], seq=root.seq, value=memory["updates"], limit=sustain,
                    location=root.location, evidence={"modules": frozen[:20]},
                )  # fmt: skip


def _left_on(step: StepView) -> Iterator[Draft]:
    for call in step.forward():
        module = step.module_of(call)
        if module is not None and not module.registered and call.parent is not None:
            yield from _made_in_forward(step, call)
        if call.op not in _DROPOUT_OPS or call.training is not False:
            continue
        if call.arguments.get("training") is not True or call.arguments.get("p") == 0:
            continue
        yield _functional(step, call, call.op, call.location)
    yield from _dropped_inside(step)


def _dropped_inside(step: StepView) -> Iterator[Draft]:
    """Tell of an F.dropout inside a module, by the text of its forward and the random state."""
    roots = [c for c in step.forward() if c.drew]
    for call in [inside for root in roots for inside in step.inside(root)]:
        module = step.module_of(call)
        if module is not None and module.drops is not None and call.training is False:
            yield _functional(step, call, "dropout", module.drops)


def _functional(step: StepView, call: Call, op: str, location: Location | None) -> Draft:
    return Draft(
        message=f"F.{op} acts in {module_text(call.module)}, which is in eval mode: its "
        "training= is True, as it is by default",
        severity=None if _judged(step) else "note",
        cause=f"functional {location_text(location)}", phase="forward", module=call.module,
        op=op, seq=call.seq, location=location, evidence={"placed": "direct"},
        fix="F.dropout(x, p, training=self.training), or an nn.Dropout",
    )  # fmt: skip


def _made_in_forward(step: StepView, call: Call) -> Iterator[Draft]:
    """Tell of a Dropout that eval() does not reach: one of the model's own is on by intention."""
    dropout = step.cls_of(call.module).startswith(DROPOUTS)
    if call.grad_enabled or not dropout or not _acts(step, call):
        return
    around = step.by_seq().get(call.parent) if call.parent is not None else None
    if around is not None and around.training is False:
        yield Draft(
            message=f"{module_text(call.module)} acts in {module_text(around.module)}, which is in "
            "eval mode and does not hold it: it is in train mode, as a new module is",
            severity=None if _judged(step) else "note",
            cause=f"made in forward {location_text(call.location)}", phase="forward",
            module=call.module, seq=call.seq, location=call.location,
            evidence={"placed": "direct"},
            fix="make the Dropout in __init__, or F.dropout(x, p, training=self.training)",
        )  # fmt: skip


def _never_fed(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """Find norms that are evaluated with the statistics they were made with."""
    fresh: dict[str, Call] = {}
    roots = (c for c in step.forward() if c.parent is None and c.op is None)
    for root in roots if any(module.untrained for module in step.modules.values()) else ():
        for call in step.inside(root) if not root.training else ():
            module = step.module_of(call)
            if module is not None and module.untrained:
                fresh.setdefault(module.path, call)
    if fresh:
        updates = memory.get("updates", 0)
        path, call = next(iter(fresh.items()))
        more = f" and {len(fresh) - 1} others" if len(fresh) > 1 else ""
        yield Draft(
            message=f"{module_text(path)}{more} evaluated with the statistics of a new norm, after "
            f"{updates} optimizer steps: no data ever came in in train mode",
            severity=None if updates and memory["idle"] and _judged(step) else "note",
            cause="never fed", phase="forward", module=path, seq=call.seq, value=updates,
            location=call.location, evidence={"placed": "direct", "modules": list(fresh)[:20]},
        )  # fmt: skip


def _judged(step: StepView) -> bool:
    """Tell whether a loss, or how many classes were guessed right, is computed outside modules."""
    guesses: set[int] = set()
    for call in step.forward():
        if call.parent is not None and call.op is None:
            continue
        if call.op in _LOSSES or (call.op is None and step.kind_of(call).endswith("Loss")):
            return True
        if call.op in _GUESSES:
            guesses.update(id for _, id in call.outputs)
        elif call.op == "eq" and any(id in guesses for _, id in call.inputs):
            return True
    return False


def _acts(step: StepView, call: Call) -> bool:
    """Tell whether a call is of a BatchNorm in train mode, or of a Dropout that dropped."""
    if not call.training:
        return False
    if step.cls_of(call.module).startswith(BATCH_NORMS):
        return True
    if not step.cls_of(call.module).startswith(DROPOUTS) or not call.inputs or not call.outputs:
        return False
    given, made = (step.tensors.get(names[0][1]) for names in (call.inputs, call.outputs))
    return given is not None and made is not None and made.zeros > given.zeros


def _is_frozen_norm(step: StepView, call: Call, held: set[str]) -> bool:
    module = step.module_of(call)
    if module is None or not call.training or not module.cls.startswith(BATCH_NORMS):
        return False
    names = {f"{module.path}.{p.name}" for p in module.parameters}
    return bool(names) and not any(p.requires_grad for p in module.parameters) and not names & held
