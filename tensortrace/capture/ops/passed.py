"""Ops in loops outside modules that are passed over: nothing is recorded of one without news.

What it made is remembered: where that is taken by something recorded, the op is recorded after all.
Compiled (`_turns.c`), deciding and passing over are one function, which does what is written here.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._C import _len_torch_function_stack

from tensortrace.capture.active import Ours, here
from tensortrace.capture.drafts import CallDraft
from tensortrace.capture.ops.calls import begin_op, end_op, identify_all, op_raised
from tensortrace.capture.ops.places import Place, outputs_of
from tensortrace.capture.tensors import Passed, TensorDraft

if TYPE_CHECKING:
    from tensortrace.capture.receiver import Receiver

_no_functions = torch._C.DisableTorchFunction
_clock = time.perf_counter_ns
# The number that the next autograd node of this thread gets.
_next_node = torch._C._autograd._get_sequence_nr

# Of an op that is to be passed over: the recorder, what it is called in a record, where it is
# called, its seq, the number of the first node that it can make, and when it began.
PassedOp: TypeAlias = "tuple[Receiver, str, Place, int, int, int]"


def pass_over(recorder: Receiver, op: str, place: Place) -> PassedOp:
    """Count an op that is not looked at, unless it has news."""
    seq = recorder.seq
    recorder.seq = seq + 1
    recorder.plain += 1
    return recorder, op, place, seq, _next_node(), _clock()


def run_passed(
    passed: PassedOp, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an op that is passed over, and record it after all if it has news."""
    try:
        result = func(*args, **kwargs)
    except Exception as error:
        raise_late(passed, args, kwargs, error)
        raise
    try:
        here.rest()
        news = has_news(passed, result)
    finally:
        here.go_on()
    if news:
        record_late(passed, args, kwargs, result)
    return result


def has_news(passed: PassedOp, result: Any) -> bool:
    """Whether something came out of an op that cannot be passed over. Hot."""
    recorder, place = passed[0], passed[2]
    try:
        if not _len_torch_function_stack():
            repeats = place.repeats(result, recorder.queue)
        else:  # torch puts one of its own below ours
            with _no_functions():
                repeats = place.repeats(result, recorder.queue)
        if repeats:
            recorder.passed_over += 1
            table = recorder.tensors
            if type(result) is torch.Tensor:
                table.passed[id(result)] = weakref.ref(result), is_met, (passed, None)
            else:
                outputs = [(name, weakref.ref(tensor)) for name, tensor in outputs_of(result)]
                table.passed.update(
                    (id(ref()), (ref, is_met, (passed, outputs))) for _, ref in outputs
                )
            if len(table.passed) > table.most_passed:
                table.forget_passed()
    except Exception as error:
        recorder.fault("ops", error)
        return False
    return not repeats


def is_met(made: Passed, number: int, draft: TensorDraft) -> None:
    """Record an op after all whose output is taken, without its inputs: they may be others now."""
    passed, outputs = made[2]
    recorder, op, place, seq, _, _ = passed
    grad_enabled = torch.is_grad_enabled()
    fields: dict[str, Any] = {
        "update": recorder.update, "op": op, "grad_enabled": grad_enabled,
        "location": place.location,
    }  # fmt: skip
    if not recorder.owns_thread():
        fields["thread"] = recorder.thread_number()
    call = CallDraft(recorder.step, seq, fields)
    call.tensors.append(draft)
    if outputs is None:
        fields["outputs"] = [("output[0]", number)]
    else:
        alive = [(name, tensor) for name, ref in outputs if (tensor := ref()) is not None]
        for _, tensor in alive:
            recorder.tensors.passed.pop(id(tensor), None)
        fields["outputs"] = identify_all(recorder, call, alive, grad_enabled)
    recorder.pend(call)
    recorder.passed_over -= 1


def record_late(
    passed: PassedOp, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> None:
    """Record an op that has run, and has changed none of its inputs."""
    recorder, _, place, _, since, started_ns = passed
    host_ns = _clock() - started_ns
    with Ours(recorder, "ops"):
        draft = _begin_late(passed, args, kwargs)
        draft.fields["host_ns"] = host_ns
        end_op(recorder, draft, result, since, place)
        if place.has_turned and here.line is not None:
            here.line.has_news = True
    recorder.raise_if_stopped()


def raise_late(
    passed: PassedOp, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> None:
    """Record an op that has raised."""
    recorder, started_ns = passed[0], passed[5]
    host_ns = _clock() - started_ns
    with Ours(recorder, "ops"):
        op_raised(recorder, _begin_late(passed, args, kwargs), error, host_ns)


def _begin_late(passed: PassedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallDraft:
    recorder, op, place, seq, _, _ = passed
    given = args[::-1] if place.reverses else args
    draft = begin_op(recorder, op, place.location, given, kwargs, seq=seq)
    assert draft is not None  # it is in no module
    return draft
