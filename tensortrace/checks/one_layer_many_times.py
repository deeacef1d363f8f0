"""TT413: a stack of layers that all are one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tensortrace.causes.terms import behind
from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.records import Call, Module
from tensortrace.text import module_text

# By what a layer's result is often taken on to the next one, in the forward around them.
_BETWEEN = frozenset(
    ("add", "relu", "gelu", "silu", "tanh", "sigmoid", "leakyrelu", "elu", "softplus", "mul",
     "nativedropout")
)  # fmt: skip


@check("TT413", "one-layer-many-times", severity="note", when="full", since=("repeated",))
def one_layer_many_times(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A stack of layers is one layer that its container holds again and again.

    Symptom:    a model of many layers has as many parameters as one of them, and learns less than
                it should
    Threshold:  a Sequential, ModuleList or ModuleDict holds one module with parameters to train
                several times running, alone or with what is repeated as often, and no other module
                holds it; in one forward it runs that often or more, and each call takes what the
                one before returned; or, if it is held three times or more, what has the same shape
                and is made by an activation, a sum or a product
    Source:     docs.python.org, "Common Sequence Operations": items in s * n "are not copied; they
                are referenced multiple times"
    Fix:        make a layer for each place: nn.ModuleList([Block() for _ in range(n)]), with
                copy.deepcopy(layer) of one that is given. If the layers are to share their weights,
                a loop over the one module says so
    Misses:     layers that are shared on purpose and held so are told; a layer that has a name of
                its own in the model besides is taken for such; other ops between the calls in a
                forward of your own; parts that are one in layers that are several
    Example:    layers = nn.Sequential(*[nn.Linear(64, 64), nn.Tanh()] * 6)
    Fixed:      layers = nn.Sequential(
                    *[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
                )
    """
    for module in step.modules.values():
        if not module.places or not step.learns(module.path):
            continue
        by_parent: dict[int | None, list[Call]] = {}
        for call in step.forward():
            if call.module == module.path and call.op is None and not call.recompute:
                by_parent.setdefault(call.parent, []).append(call)
        for parent, calls in by_parent.items():
            if len(calls) >= module.places and _is_stack(step, module, parent, calls):
                yield _draft(step, module, calls)
                break


def _is_stack(step: StepView, module: Module, parent: int | None, calls: list[Call]) -> bool:
    """Whether each call takes what the one before has returned."""
    beside = [call for call in step.forward() if call.parent == parent]
    made = {id: call for call in beside for _, id in call.outputs}
    for before, after in pairwise(calls):
        if not before.outputs or not after.inputs or not before.grad_enabled:
            return False
        given = behind(after.inputs[0][1], made, step.tensors)
        returned = before.outputs[0][1]
        if returned in given:
            continue
        # Two inputs of one encoder may have activations of their own.
        between = [call for call in beside if before.seq < call.seq < after.seq]
        if module.places < 3 or not all(_leads(call, given) for call in between):
            return False
        if not any(_is_next(step, returned, id) for id in given if id not in made):
            return False
    return True


def _leads(call: Call, to: set[int]) -> bool:
    """Whether a call has made one of some tensors.

    One between two calls of a module that has not makes what that is given, each time anew: a head
    behind each layer is no stack.
    """
    return any(id in to for _, id in call.outputs)


def _is_next(step: StepView, returned: int, given: int) -> bool:
    """Whether an op of a forward, which is not seen, may have made one tensor of another."""
    one, other = step.tensors.get(returned), step.tensors.get(given)
    if one is None or other is None:
        return False
    return one.shape == other.shape and plain_op(other.grad_fn) in _BETWEEN


def _draft(step: StepView, module: Module, calls: list[Call]) -> Draft:
    container = module.path.rpartition(".")[0]
    inside = (p for p in step.modules if f"{p}.".startswith(f"{module.path}."))
    names = [name for path in inside for name in step.trainable(path)]
    own = f"{len(names)} parameters" if len(names) > 1 else "1 parameter"
    return Draft(
        message=f"{module_text(container, 'the model')} holds one {module.cls} {module.places} "
        f"times and runs it {len(calls)} times in a row: that is one layer, of {own}, where "
        f"{module.places} with their own may be meant",
        cause=module.path, phase="forward", module=module.path, seq=calls[0].seq,
        value=module.places, limit=1, location=calls[0].location,
        evidence={"placed": "direct", "parameters": names[:100]},
        fix=f"[{module.cls}(...) for _ in range({module.places})], a module for each place",
    )  # fmt: skip
