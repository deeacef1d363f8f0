"""Calls of backward and of `torch.autograd.grad`: where a turn of the loop begins to end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.active import Ours, here
from tensortrace.capture.drafts import CallDraft
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.ops.calls import begin_op, end_op, op_raised
from tensortrace.records import DERIVATIVE, Location

if TYPE_CHECKING:
    from tensortrace.capture.ops.function_mode import Turn
    from tensortrace.capture.receiver import Receiver

_no_functions = torch._C.DisableTorchFunction
_functorch = torch._C._functorch
_clock = time.perf_counter_ns


def run_backward(
    turn: Turn, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a backward pass: its losses become actions, a derivative is an op with a record."""
    recorder, name = turn.recorder, turn.name
    if recorder.replaying:
        recorder.guard(name, args, kwargs)
    draft = None
    with _no_functions():
        here.busy += 1
        try:
            here.rest()
            location = recorder.sources.locate_frame(sys._getframe(2))
            if name == "backward":
                losses = tensors_in(args[0] if args else kwargs.get("tensors"), "loss")
                recorder.loss_seen(losses, location)
            else:
                draft = _begin_derivative(recorder, location, args, kwargs)
        except Exception as error:
            recorder.fault("ops", error)
        finally:
            here.busy -= 1
            here.go_on()
    seen, started_ns = recorder.now.backward_seen, _clock()
    result = None
    try:
        result = func(*args, **kwargs)
    except Exception as error:
        if draft is not None:
            with Ours(recorder, "ops"):
                op_raised(recorder, draft, error, _clock() - started_ns)
        raise
    finally:
        # What a module does inside is no turn of the loop (nor seen at module level).
        if not here.stack:
            if name == "backward" or not (_makes_graph(args, kwargs) and _goes_on(result)):
                freed = not _keeps_graph(name, args, kwargs)
                recorder.backward_finished(freed, name != "backward")
            else:
                # A gradient with a graph of its own is a part of the loss that is still to come:
                # what the checks decide when that has run, they decide of this, too.
                recorder.now.backward_seen = seen
    if draft is not None:
        draft.fields["host_ns"] = _clock() - started_ns
        with Ours(recorder, "ops"):
            _end_derivative(recorder, draft, args, kwargs, result)
        recorder.raise_if_stopped()
    return result


def _begin_derivative(
    recorder: Receiver, location: Location | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallDraft | None:
    """Begin the record of a call of torch.autograd.grad: what it differentiates goes in."""
    outputs = args[0] if args else kwargs.get("outputs")
    seeds = args[2] if len(args) > 2 else kwargs.get("grad_outputs")
    asked = {"create_graph": True} if _makes_graph(args, kwargs) else {}
    return begin_op(recorder, DERIVATIVE, location, (outputs, seeds), asked)


def _end_derivative(
    recorder: Receiver, draft: CallDraft, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> None:
    """Complete it. The gradient of a parameter is what the hook on that has described."""
    of = args[1] if len(args) > 1 else kwargs.get("inputs")
    of = (of,) if isinstance(of, torch.Tensor) else of
    for tensor, grad in zip(of or (), result, strict=False):
        if isinstance(tensor, torch.Tensor) and isinstance(grad, torch.Tensor):
            described = recorder.parameters.gradient_seen(tensor, grad)
            if described is not None:
                recorder.tensors.adopt(grad, described.id)
    # Its nodes are those of a whole backward pass.
    end_op(recorder, draft, result, since=None)


def _keeps_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # backward(tensors, grad_tensors, retain_graph, ...), grad(outputs, inputs, grad_outputs, ...)
    at = 2 if name == "backward" else 3
    keeps = kwargs.get("retain_graph", args[at] if len(args) > at else None)
    return bool(kwargs.get("create_graph") if keeps is None else keeps)


def _goes_on(grads: Sequence[torch.Tensor | None] | None) -> bool:
    """Whether a graph that was asked for is the program's: `torch.func.grad` always asks for one.

    Of that, none is left if it is in no other one and nothing that it was given requires grad.
    """
    around = _functorch.get_interpreter_stack() or ()
    passes = [each.key() == _functorch.TransformType.Grad for each in around]
    if sum(passes) != 1 or not passes[-1]:
        return True
    made = [g for g in grads or () if g is not None and _functorch.is_functorch_wrapped_tensor(g)]
    return any(_functorch.get_unwrapped(grad).requires_grad for grad in made)


def _makes_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # grad(outputs, inputs, grad_outputs, retain_graph, create_graph, ...)
    return bool(kwargs.get("create_graph", args[4] if len(args) > 4 else False))
