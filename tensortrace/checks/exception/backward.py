"""What goes wrong in backward(): the graph, its leaves, and values written over."""

from __future__ import annotations

import ast
import math
import re
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


_CHECKPOINT = re.compile(r"\bcheckpoint(?:_sequential)?\((?!.*use_reentrant=False)")
_INPUT = "an input that requires grad (transformers: model.enable_input_require_grads())"
_IN_PLACE: dict[type, tuple[str, str]] = {ast.Sub: ("-=", "sub"), ast.Add: ("+=", "add")}


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
        again = _is_same(facts.step, first, last)
        what = "the same loss" if again else "a loss that shares a part of its graph with it"
        return Told(
            f"the graph was freed by backward() at {line_text(first.location)}; this is "
            f"backward() on {what}",
            "backward() frees what the graph kept, to save memory",
            _anew(facts.step, first, last) or _apart(facts.step, first, last)
            or ("call backward() once" if again else
            "(loss_a + loss_b).backward(), or detach() what both share, or retain_graph=True"),
            (_link(first), _link(last)),
        )  # fmt: skip
    if last is not None and last.tensor is None and not _forward(facts.step, last.seq):
        return Told(
            "the graph was freed by the backward() of an earlier step, and this is backward() on "
            "the loss of that step: nothing was computed since",
            "backward() frees what the graph kept, to save memory",
            "call the model and make the loss anew in the loop, before each backward()",
            (_link(last),),
        )  # fmt: skip
    freed = ", which the backward() of an earlier step freed; this one goes into it"
    return _from_earlier_step(facts, freed) or Told(
        "the graph was freed by the backward() of an earlier step: something that is kept from "
        "step to step still hangs on it",
        "a hidden state, a running loss or a cached output carries the graph of its own step",
        "hidden = hidden.detach()  # at the start of each step; what the loop does not make anew, "
        "such as a penalty, belongs into it",
    )


def _forward(step: StepView, before: int, after: int = -1) -> list[Call]:
    """The outermost forward calls of a step between two of its records."""
    return [c for c in step.forward() if c.parent is None and after < c.seq < before]


def _is_same(step: StepView, first: Action, last: Action) -> bool:
    """Whether backward() ran twice on one loss; one that was made before all has no id."""
    if first.tensor is not None or last.tensor is not None:
        return first.tensor == last.tensor
    return first.location == last.location and not _forward(step, last.seq, first.seq)


def _anew(step: StepView, first: Action, last: Action) -> str | None:
    """What a loop must make anew whose line runs backward twice; None where it is no such loop."""
    if first.location is None or first.location != last.location:
        return None
    if _is_same(step, first, last):
        return "make the loss anew in the loop, before each backward(); or call backward() once"
    # Of losses that were all made before, one after another, the sum is meant.
    between = _forward(step, last.seq, first.seq)
    made = any(_has(call.outputs, last.tensor) for call in between if last.tensor is not None)
    models = [call for call in _forward(step, first.seq) if call.op is None]
    if not made or not models or any(call.op is None for call in between):
        return None
    name = models[-1].module or "the model"
    return f"call {quoted(name)} in the loop: its output was made once, before the first backward()"


def _apart(step: StepView, first: Action, last: Action) -> str | None:
    """What to detach where losses train one after another, as a discriminator and its generator do.

    None where the sum of the losses is as good: no optimizer steps in between, or it moves what
    made the values that both are of.
    """
    steps = {o.index for o in step.optimizers if first.seq < o.seq < last.seq}
    moved = {param.module for param in step.params if param.optimizer in steps}
    before = [call for call in _forward(step, first.seq) if call.op is None]
    later = {id for c in _forward(step, last.seq, first.seq) if c.op is None for _, id in c.inputs}
    for maker in before if moved else ():
        shared = later.intersection(id for _, id in maker.outputs)
        users = (c for c in before if c.seq > maker.seq and any(_has(c.inputs, t) for t in shared))
        user = next(users, None)
        if user is not None and moved.isdisjoint(c.module for c in step.inside(maker)):
            made = quoted(maker.module or step.cls_of(maker.module))
            takes = quoted(user.module or step.cls_of(user.module))
            return (
                f"detach what {made} made where {takes} takes it at {line_text(user.location)}, "
                f"as x.detach(): the first loss does not train {made}, and its backward() then "
                "leaves that graph to the second"
            )
    return None


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


def no_leaf(facts: Facts, found: Match) -> Told | None:
    """The gradient of what an op returned is asked for: it is None."""
    asked = {one["name"] for one in facts.operands}
    one = next((one for one in facts.operands
                if one.get("grad_fn") and f"{one['name']}.grad" in asked), None)  # fmt: skip
    if one is None:
        return None
    name, op = one["name"], plain_op(one["grad_fn"])
    update = _rebound(facts, name)
    return Told(
        f"`{name}.grad` is None: `{name}` {shape_text(shape_of(one))} is what `{op}` returned and "
        "no leaf, and backward() keeps the gradients of leaves only",
        f"`{name} = {name} ...` bound the name to a new tensor; the leaf that it was is gone"
        if update else "an op on what requires grad makes another tensor, with a graph",
        f"with torch.no_grad(): {update}  # in place: it stays a leaf; then {name}.grad = None"
        if update else f"{name} = {name}.detach().requires_grad_() where it is made, or "
        f"{name}.retain_grad() before backward()",
    )  # fmt: skip


def _rebound(facts: Facts, name: str) -> str | None:
    """The update in place for a line ``w = w - ...`` that has run before; None without one.

    It is the line itself, or one of the few above it.
    """
    at = facts.action.location
    if at is None:
        return None
    lines = dict(facts.action.detail.get("lines", ()))
    ran = {(call.op, call.location.line) for call in facts.step.calls
           if call.location and call.location.file == at.file}  # fmt: skip
    for line in sorted((line for line in lines if line <= at.line), reverse=True):
        update = _update(lines[line], name)
        if update is not None and (update[1], line) in ran:
            return f"{name} {update[0]} {update[2]}"
    return None


def _update(text: str, name: str) -> tuple[str, str, str] | None:
    """Of ``w = w - x`` how it is written in place, the op, and what it takes; None of another."""
    try:
        # Python warns of a backslash that it does not know.
        (line,) = ast.parse(text.strip()[:200].replace("\\", "")).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(line, ast.Assign) or not isinstance(line.value, ast.BinOp):
        return None
    found = _IN_PLACE.get(type(line.value.op))
    names = {ast.unparse(line.targets[0]), ast.unparse(line.value.left)}
    if found is None or names != {name}:
        return None
    return *found, ast.unparse(line.value.right)


def modified_in_place(facts: Facts, found: Match) -> Told:
    """A value that backward needs and that is gone."""
    shape, node = dims_in(found["shape"]), plain_op(found["node"])
    step, text = facts.step, shape_text(dims_in(found["shape"]))
    why = "backward needs the values that forward had, and they are gone"
    moved = step.optimizers[-1] if step.optimizers else None
    change = _changed(step, shape, node)
    maker = _maker(step, shape, node) if change is None else None
    if maker is not None:
        return Told(
            f"a tensor {text} made by {quoted(maker.op or maker.module or 'the model')} at "
            f"{line_text(maker.location)} was changed in place before this backward()",
            why, "look below that line for `+=`, `/=`, an op whose name ends with `_`, "
            "ReLU(inplace=True) or an index assignment on its result; write x = x + 1 instead of "
            'x += 1. With level="op" the line is named',
            (_call_link(maker),),
        )  # fmt: skip
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
            f"look for `+=`, `{node}_`, ReLU(inplace=True) or an index assignment on it; write "
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


def _maker(step: StepView, shape: tuple[int, ...], node: str) -> Call | None:
    """The call that was differentiated last, if its own result is what torch names.

    Of what another op has kept torch names the node that wrote over it, not the one that made it.
    """
    backward = [c for c in step.calls if c.phase == "backward"]
    last = max(backward, key=lambda c: c.seq).forward if backward else None
    maker = step.by_seq().get(last) if last is not None and node in _KEEP_RESULT else None
    made = (step.tensors[id] for _, id in maker.outputs if id in step.tensors) if maker else ()
    return maker if any((t.shape, plain_op(t.grad_fn)) == (shape, node) for t in made) else None


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
            return _ran_without(facts, call)
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
        off = _off_inside(step, call)
        if off is not None:
            return _ran_without(facts, off)
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


def _ran_without(facts: Facts, call: Call) -> Told:
    """A call with gradients off: under no_grad, or in a reentrant checkpoint without a gradient."""
    step, name = facts.step, call.op or call.module or "the model"
    told = f"the loss does not require grad: {quoted(name)} ran with gradients off at "
    told += line_text(call.location)
    why = "backward() follows grad_fn from the loss to the parameters, and there is none"
    fix = "call it outside torch.no_grad() and inference_mode()"
    if _may_update(facts, call):
        fix += "; if it is an update by hand, write it in place: w -= ..."
    given = any(step.tensors[id].requires_grad for _, id in call.inputs if id in step.tensors)
    could = call.op is None and not given and bool(_trained(step, call))
    if _CHECKPOINT.search(_line_of(facts, call)):
        why = "a reentrant checkpoint runs what it is given with gradients off, and its result has "
        why += "a graph only if one of its inputs requires grad: here none does"
        fix = f"checkpoint(..., use_reentrant=False), or {_INPUT}"
    elif could:
        fix += "; if torch.utils.checkpoint calls it, none of its inputs requires grad: then "
        fix += f"use_reentrant=False, or {_INPUT}"
    return Told(told, why, fix, (_call_link(call),))


def _line_of(facts: Facts, call: Call) -> str:
    """The text of the line of a call where it is near the one that raised; else nothing."""
    at, raised = call.location, facts.action.location
    if at is None or raised is None or at.file != raised.file:
        return ""
    lines: dict[int, str] = dict(facts.action.detail.get("lines", ()))
    return lines.get(at.line, "")


def _trained(step: StepView, root: Call) -> list[Call]:
    """The calls inside one of modules with parameters of their own that require grad."""
    own = {m.path for m in step.modules.values() if any(p.requires_grad for p in m.parameters)}
    return [c for c in step.inside(root) if c.module in own]


def _off_inside(step: StepView, root: Call) -> Call | None:
    """Where gradients went off inside a call, if all that could be trained in it ran without."""
    trained = _trained(step, root)
    if not trained or any(c.grad_enabled for c in trained):
        return None
    inside = step.inside(root)
    on = {c.seq for c in inside if c.grad_enabled}
    began = [c for c in inside
             if not c.grad_enabled and c.parent in on and c.seq <= trained[0].seq]  # fmt: skip
    return began[-1] if began else None


def _may_update(facts: Facts, call: Call) -> bool:
    """Whether a difference from a leaf may be meant as its next value: a backward came before."""
    given = facts.step.tensors.get(call.inputs[0][1]) if call.inputs else None
    leaf = given is not None and given.is_leaf and given.requires_grad
    before = any(loss.seq < call.seq for loss in facts.step.losses)
    return leaf and before and call.op in ("sub", "add")


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
