"""What goes wrong in backward(): the graph, its leaves, and values written over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from tensortrace.checks import StepView, plain_op
from tensortrace.checks.exception.facts import (
    Facts,
    Match,
    Told,
    code_name,
    dims_in,
    line_text,
    quoted,
    shape_of,
)
from tensortrace.records import DERIVATIVE, Action, Call, ChainLink, Tensor
from tensortrace.text import shape_text

# Backward formulas that use what the op returned, and those that use what it was given.
_KEEP_RESULT = frozenset(
    [
        "exp",
        "expm1",
        "tanh",
        "sigmoid",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "relu",
        "softmax",
        "logsoftmax",
        "elu",
        "pow",
        "norm",
    ]
)


_KEEP_INPUT = frozenset(
    [
        "mul",
        "div",
        "pow",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "linear",
        "convolution",
        "conv1d",
        "conv2d",
        "log",
        "sin",
        "cos",
        "square",
        "abs",
        "layernorm",
        "nativelayernorm",
        "batchnorm",
        "gelu",
        "silu",
        "prod",
        "cumprod",
        "norm",
        "std",
        "var",
    ]
)


def _losses(facts: Facts) -> list[Action]:
    return [a for a in facts.step.actions if a.action == "loss" and a.seq < facts.action.seq]


def not_scalar(facts: Facts, found: Match) -> Told:
    """backward() on more than one number."""
    losses = _losses(facts)
    shape = tuple(losses[-1].detail.get("shape") or ()) if losses else ()
    one = next((one for one in facts.operands if shape_of(one)), None)
    name = code_name(one, "loss")
    shape = shape_of(one) if one else shape
    return Told(
        f"`{name}` is {shape_text(shape)}: backward() starts from one number, and this has "
        f"{math.prod(shape)}",
        "the gradient of many numbers needs a weight for each; for one number it is 1",
        f'{name}.mean().backward()  # often the loss has reduction="none"',
    )


def second_backward(facts: Facts, found: Match) -> Told:
    """backward() through a graph that was freed."""
    losses = _losses(facts)
    last = losses[-1] if losses else None
    first = losses[-2] if len(losses) > 1 else None
    if first is not None and last is not None:
        again = first.tensor is not None and first.tensor == last.tensor
        what = "the same loss" if again else "a loss that shares a part of its graph with it"
        return Told(
            f"the graph was freed by backward() at {line_text(first.location)}; this is "
            f"backward() on {what}",
            "backward() frees what the graph kept, to save memory",
            "call backward() once" if again else
            "(loss_a + loss_b).backward(), or detach() what both share, or retain_graph=True",
            (_link(first), _link(last)),
        )  # fmt: skip
    freed = ", which the backward() of an earlier step freed; this one goes into it"
    return _from_earlier_step(facts, freed) or Told(
        "the graph was freed by the backward() of an earlier step: something that is kept from "
        "step to step still hangs on it",
        "a hidden state, a running loss or a cached output carries the graph of its own step",
        "hidden = hidden.detach()  # at the start of each step",
    )


def _from_earlier_step(facts: Facts, fate: str) -> Told | None:
    """A module got something with the graph of an earlier step, and this is the only backward."""
    carried = next(facts.step.carried(), None)
    if carried is None or len(_losses(facts)) != 1:
        return None
    call, name, state = carried
    return Told(
        f"{name} of {quoted(call.module or 'the model')} at {line_text(call.location)} comes from "
        f"step {state.from_step} with its graph{fate}",
        "a hidden state carries the graph of the step that made it: see TT705",
        "hidden = hidden.detach()  # at the start of each step; each of them, if it is a tuple",
        (ChainLink(call.seq, state.id, call.module, call.location),),
    )


def _link(action: Action) -> ChainLink:
    return ChainLink(action.seq, action.tensor, "backward", action.location)


def leaf_in_place(facts: Facts, found: Match) -> Told:
    """A parameter changed in place while gradients are recorded."""
    one = next((one for one in facts.operands if one.get("requires_grad")), None)
    name = code_name(one, "w")
    what = f"`{name}` {shape_text(shape_of(one))}" if one else "a parameter"
    view = "a part of " if found[0].startswith("a view") else ""
    return Told(
        f"{what} requires grad and is a leaf: {view}it may not be changed in place while gradients "
        "are recorded",
        "its gradient is asked for at the value that is about to be overwritten",
        f"with torch.no_grad(): ...  # for an update by hand; else {name} = {name} - ...",
    )


def modified_in_place(facts: Facts, found: Match) -> Told:
    """A value that backward needs and that is gone."""
    shape, node = dims_in(found["shape"]), plain_op(found["node"])
    step, text = facts.step, shape_text(dims_in(found["shape"]))
    why = "backward needs the values that forward had, and they are gone"
    moved = step.optimizers[-1] if step.optimizers else None
    change = _changed(step, shape, node)
    if change is None and moved is not None:
        return Told(
            f"a parameter {text} was changed by {moved.cls}.step() at "
            f"{line_text(moved.location)} before this backward()",
            why, "call every backward() before the first optimizer.step()",
            (ChainLink(moved.seq, None, f"{moved.cls}.step", moved.location),),
        )  # fmt: skip
    then = ": this backward() needs the weights as they were then"
    if change is None and (told := _from_earlier_step(facts, then)):
        return told
    if change is None:
        return Told(
            f"a tensor {text} made by {node or 'the program'} was changed in place before this "
            "backward()", why,
            f"look for `+=`, `{node}_`, relu_(inplace=True) or an index assignment on it; write "
            "x = x + 1 instead of x += 1",
        )  # fmt: skip
    old, new, writer, made, needed = change
    by = quoted(writer.op or writer.module or "the model")
    if not writer.op and not _has(writer.outputs, new.id):
        by = f"something before {by}"
    what = f"a tensor {text} made by {node} was changed in place by {by} at " + (
        line_text(writer.location))  # fmt: skip
    chain = [made, needed, writer] if needed is not made else [made, writer]
    if needed is not None:
        what += f"; the backward of `{needed.op or needed.module}` at "
        what += f"{line_text(needed.location)} needs the old values"
    links = tuple(ChainLink(c.seq, old.id, c.op or c.module, c.location) for c in chain if c)
    plain = (writer.op or "").rstrip("_")
    return Told(what, why, f"x = x.{plain}(...) instead of x.{plain}_(...) or an augmented "
                 "assignment; or change a .clone()" if plain else
                 "write x = x + 1 instead of x += 1, or change a .clone()", links)  # fmt: skip


def _changed(
    step: StepView, shape: tuple[int, ...], node: str
) -> tuple[Tensor, Tensor, Call, Call | None, Call | None] | None:
    """Find the tensor before and after, the call that wrote it, its maker, and who needs it."""
    best = None
    for new in step.tensors.values():
        old = step.tensors.get(new.previous) if new.previous is not None else None
        if old is None or old.shape != shape or new.grad_of is not None:
            continue
        if node not in (plain_op(old.grad_fn), plain_op(new.grad_fn)):
            continue
        writer = _writer(step, new.id)
        if writer is not None:
            best = old, new, writer
    if best is None:
        return None
    old, new, writer = best
    forward = [c for c in step.calls if c.phase == "forward" and c.seq < writer.seq]
    made = next((c for c in reversed(forward) if _has(c.outputs, old.id)), None)
    users = [c for c in forward if _has(c.inputs, old.id) and c is not writer]
    needed = next((c for c in reversed(users) if plain_op(c.op) in _KEEP_INPUT), None)
    if needed is None and made is not None and plain_op(made.op or old.grad_fn) in _KEEP_RESULT:
        needed = made
    return old, new, writer, made, needed


def _writer(step: StepView, new: int) -> Call | None:
    """The op, else the innermost module, that made this version; else the first to get it."""
    made = [c for c in step.calls if _has(c.outputs, new) and not _has(c.inputs, new)]
    ops = [c for c in made if c.op]
    if ops:
        return ops[0]
    given = next((c for c in step.calls if _has(c.inputs, new)), None)
    return max(made, key=lambda c: c.seq) if made else given


def _has(names: Iterable[tuple[str, int]], id: int) -> bool:
    return any(one == id for _, one in names)


def no_grad(facts: Facts, found: Match) -> Told:
    """backward() on a loss without a graph."""
    step = facts.step
    why = "backward() follows grad_fn from the loss to the parameters, and there is none"
    for call in _behind(step, [a.tensor for a in _losses(facts)[-1:] if a.tensor is not None]):
        name = call.op or call.module or "the model"
        if not call.grad_enabled:
            return Told(
                f"the loss does not require grad: {quoted(name)} ran with gradients off at "
                f"{line_text(call.location)}",
                why, "call it outside torch.no_grad() and inference_mode()", (_call_link(call),),
            )  # fmt: skip
        if call.op == DERIVATIVE and not call.arguments.get("create_graph"):
            return Told(
                "the loss does not require grad: it is made of what torch.autograd.grad returned "
                f"at {line_text(call.location)}, without create_graph=True",
                why, "torch.autograd.grad(..., create_graph=True): then what it returns can be "
                "differentiated again", (_call_link(call),),
            )  # fmt: skip
        if _cuts(step, call):
            return Told(
                f"the loss does not require grad: {quoted(name)} at "
                f"{line_text(call.location)} has inputs with a gradient and an output without",
                why, f"leave {name} out of the loss, or use a form that can be differentiated",
                (_call_link(call),),
            )  # fmt: skip
    given = [p for m in step.modules.values() for p in m.parameters]
    if given and not any(p.requires_grad for p in given):
        return Told(
            f"the loss does not require grad: none of the {len(given)} parameters that took part "
            "does",
            why, "p.requires_grad_(True) for what should be trained",
        )  # fmt: skip
    return Told(
        "the loss does not require grad: it was made without parameters, or cut off by detach(), "
        ".data, .item() or torch.tensor(...)",
        why, "compute the loss from what the model returned, with torch functions only",
    )  # fmt: skip


def _behind(step: StepView, ids: list[int]) -> Iterator[Call]:
    """The forward calls that a tensor comes from, the last first."""
    calls = [c for c in step.calls if c.phase == "forward"]
    wanted = set(ids)
    for call in sorted(calls, key=lambda c: -c.seq):
        if call.parent is None and any(id in wanted for _, id in call.outputs):
            wanted.update(id for _, id in call.inputs)
            yield call


def _cuts(step: StepView, call: Call) -> bool:
    inputs = [step.tensors.get(id) for _, id in call.inputs]
    outputs = [step.tensors.get(id) for _, id in call.outputs]
    return (
        call.grad_enabled
        and bool(call.outputs)
        and any(t is not None and t.requires_grad for t in inputs)
        and not any(t is None or t.requires_grad for t in outputs)
    )


def _call_link(call: Call) -> ChainLink:
    return ChainLink(call.seq, None, call.op or call.module, call.location)
