"""TT105: data that is not finite when it comes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from tensortrace.causes.beside import began_beside
from tensortrace.checks import (
    FILLS,
    Draft,
    StepView,
    check,
    completion_order,
    count_text,
    is_left_by,
    plain_op,
)
from tensortrace.records import DERIVATIVE, Call, Severity, Tensor
from tensortrace.text import location_text, module_text

# Ops that only bring data in: what they return counts as data.
_SOURCES = frozenset(("tensor", "astensor", "asarray", "fromnumpy", "frombuffer", "load"))
_SENT = (
    "it was loaded so, or another rank has sent it: read the logs of the others, too (tensortrace "
    "report FOLDER shows all)"
)
# Who took it, under which name, and what it was.
_Entry: TypeAlias = tuple[Call, str, Tensor]


@check("TT105", "nonfinite-input", severity="error", when="gate", after=("TT104",), of=("calls",))
def nonfinite_input(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A tensor that nothing in the program made comes in with NaN or infinity.

    Symptom:    NaN loss on some batches only, whatever the weights are
    Threshold:  a floating tensor of more than one element that enters an outermost module, or an
                op outside modules, that no call of this or an earlier step made (what the end of
                the step before left for this one counts if no call there did), holds NaN (error)
                or infinity (warning), and the damage reaches the loss, a gradient or the output;
                a note if it does not (missing values that are handled), if what spoilt these is
                known and took nothing made of it, or if it is -inf alone and may be a mask: its
                other elements are 0 or alike, or it goes where masks go, and not first into a
                module, a product, a norm or a loss, nor becomes +inf
    Source:     definition of the origin rule for data; one element alone is left out because of
                `best = torch.tensor(float("inf"))`
    Fix:        find the sample: (~x.isfinite()).flatten(1).any(1).nonzero(); clean it where it is
                loaded (0/0 in a normalisation, missing values, log of 0 in a spectrogram). A mask
                that multiplies keeps it, since NaN * 0 is NaN: torch.where leaves it out
    Misses:     data made by operations inside the block is seen as those operations (TT101)
    Example:    frame = pandas.read_csv("train.csv")  # empty cells are NaN
                x = torch.tensor(frame.values, dtype=torch.float32)
    Fixed:      frame = pandas.read_csv("train.csv")
                x = torch.tensor(frame.fillna(frame.median()).values, dtype=torch.float32)
    """
    if memory.get("step") != step.number:
        # Of the step before, as in TT101: a batch may be taken from the data after the last update.
        follows = memory.get("step") == step.number - 1
        before, made = (memory["last"], memory["makes"]) if follows else ([], False)
        memory.update(step=step.number, met=[], before=before, made=made, last=[], makes=False)
    met: list[_Entry] = memory["met"]
    if step.bad:
        fresh = step.calls[step.fresh :]
        makes = _hands_on if memory["made"] else _makes_bad
        memory["makes"] = memory["makes"] or any(makes(step, call) for call in fresh)
        # What the step before left, and no call of it made, is data too.
        left = None if memory["made"] or memory["before"] else step.number - 1
        met += list(_entries(step, left))[: 8 - len(met)]
    damage = step.damage() if met or memory["before"] else None
    if damage and not met and step.inherited():
        yield from (_draft(step, entry, damage, earlier=True) for entry in memory["before"])
        memory["before"] = []
    if met and (step.summary or damage):
        # What an op took out of bad data is bad: a batch of it that is clean explains no other.
        memory["last"] += [one for one in met if one[0].op and step.hurt(one[0].outputs)]
        yield from (_draft(step, entry, damage) for entry in met)
        memory["met"] = []


def _draft(step: StepView, entry: _Entry, damage: str | None, *, earlier: bool = False) -> Draft:
    """Tell of data that came in, in this step or at the end of the one before."""
    call, name, tensor = entry
    severity: Severity = "error" if tensor.nan else "warning"
    # What the step before has left, and did harm, is no mask; ids are of one step.
    beside = not earlier and damage is not None and began_beside(step, tensor)
    if damage is None or beside or not (earlier or step.hurt([(name, tensor.id)])):
        severity = "note"
    message = f"{count_text(tensor)} in the data: {name} of {call.op or call.module or 'the model'}"
    evidence: dict[str, Any] = {"placed": "direct", "shape": tensor.shape, "reached": damage}
    if earlier:
        message += f", at the end of step {step.number - 1}"
        evidence["made_in_step"] = step.number - 1
    elif damage is None:
        message += "; loss and gradients stay finite"
    elif beside:
        message += "; what spoilt the loss or the gradients took nothing made of it"
    elif severity == "note":
        message += ", as a mask has them"
    maker = None if earlier or severity == "note" else _made_before(step, call)
    explanation = _SENT if step.world_size > 1 else None
    if maker is not None:
        what = maker.op or module_text(maker.module, step.cls_of(maker.module))
        message += f"; before it in this step {what} made {count_text(_bad_of(step, maker))} from "
        message += f"finite inputs ({location_text(maker.location)})"
        evidence["made_before"] = location_text(maker.location)
        explanation = (
            f"what goes through NumPy or a Python number comes back as data: if what {what} made "
            "did, that is the cause, else the data were so when they came"
        )
    return Draft(
        message=message, severity=severity, follows=step.blamed(), phase="forward",
        explanation=explanation,
        cause=f"{name} {location_text(call.location)}", module=call.module, op=call.op,
        # Of the step before, they would be those of something else.
        seq=None if earlier else call.seq, tensor=None if earlier else tensor.id,
        value=tensor.nonfinite, limit=0, location=call.location, evidence=evidence,
    )  # fmt: skip


def _made_before(step: StepView, taker: Call) -> Call | None:
    """The first call of the step that made bad values of good ones, by its op where that is known.

    They may have left torch, and have come back.
    """
    own = (c for c in completion_order(step.calls)
           if c.seq < taker.seq and not c.replay and not c.recompute)  # fmt: skip
    made = (c for c in own if _makes_bad(step, c))
    first = next(made, None)
    if first is None or first.op is not None:
        return first
    return step.narrowed(first.seq, "forward")[1] or first


def _bad_of(step: StepView, call: Call) -> Tensor:
    return (step.hurt(call.outputs) or step.nonfinite(call.outputs))[0]


def _makes_bad(step: StepView, call: Call) -> bool:
    """Whether bad values begin in a call; what fills with a literal only says what they are."""
    if call.phase != "forward" or plain_op(call.op) in FILLS:
        return False
    return bool(step.hurt(call.outputs)) and not step.hurt(call.inputs)


def _hands_on(step: StepView, call: Call) -> bool:
    """Whether bad values begin in a call, or come to it from an earlier step."""
    earlier = any(tensor.from_step is not None for tensor in step.nonfinite(call.inputs))
    return earlier or _makes_bad(step, call)


def _entries(step: StepView, left: int | None) -> Iterator[_Entry]:
    """List the bad tensors that come in from outside, once each, where they are first used."""
    made: set[int] = set()
    for call in step.calls:
        if call.phase == "forward" and not (plain_op(call.op) in _SOURCES and not call.inputs):
            taken = {id for _, id in call.inputs}  # x.to(device) is x where it is there already
            made.update(id for _, id in call.outputs if id not in taken)
    # What `.grad` holds after a backward has another id than what was seen on its way there.
    grads = [(call.seq, tensor.shape) for call in step.calls if call.phase == "backward"
             for tensor in step.nonfinite(call.outputs)]  # fmt: skip
    # So has what torch.func hands on of what autograd.grad has returned to it.
    returned = [(call.seq, _look(tensor)) for call in step.forward()
                if call.op == DERIVATIVE and not step.nonfinite(call.inputs)
                for tensor in step.nonfinite(call.outputs)]  # fmt: skip
    seen: set[int] = set()
    for call in step.calls[step.fresh :]:
        if call.phase != "forward" or call.parent is not None or call.recompute or call.replay:
            continue
        for name, id in call.inputs:
            if id in made or id in seen:
                continue
            seen.add(id)
            tensor = step.tensors.get(id)
            if tensor is None or not tensor.nonfinite or not _is_data(tensor, left):
                continue
            if any(f.code == "TT101" and is_left_by(f, tensor) for f in step.findings):
                continue
            if any(seq < call.seq and shape == tensor.shape for seq, shape in grads):
                continue
            if not any(seq < call.seq and look == _look(tensor) for seq, look in returned):
                yield call, name, tensor


def _look(tensor: Tensor) -> tuple[int | None, ...]:
    """What a tensor unwrapped from vmap, whose shape was another, is known by."""
    return tensor.numel, tensor.nan, tensor.posinf, tensor.neginf


def _is_data(tensor: Tensor, left: int | None) -> bool:
    links = (tensor.view_of, tensor.grad_of, tensor.previous)
    return (
        tensor.numel > 1
        and tensor.from_step in (None, left)
        and not tensor.requires_grad
        and tensor.dtype.startswith(("float", "bfloat", "complex"))
        and all(link is None for link in links)
    )
