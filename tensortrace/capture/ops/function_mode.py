"""Ops one by one: losses, metrics, data preparation, and at op level those inside modules.

One stateless function mode. It is off the stack while an optimizer steps, and at module level from
the entry of the outermost module to its exit: there it would cost a microsecond a call and turn the
fused transformer paths off. At op level it is off inside modules that may take such a path. It goes
to the bottom of the stack, so that a mode of the user's that spans a module call still pops itself.

Hot: loops of tensor ops come through here 100,000 times a second. Of those that are passed over
(`passed`) nothing is done before that is known, and Python's trace function rests throughout.
Compiled (`_turns.c`) that is one function; `OutsideMode` says in Python what it does.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tensortrace.capture import compiled
from tensortrace.capture.active import Ours, here, slot
from tensortrace.capture.dynamo import leave_to_python
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.lines.reader import Held
from tensortrace.capture.ops.backward import run_backward
from tensortrace.capture.ops.calls import begin_op, end_op, op_raised
from tensortrace.capture.ops.names import BACKWARD, HOOKS, REVERSED, SYNCS, op_of
from tensortrace.capture.ops.passed import (
    PassedOp,
    has_news,
    is_met,
    pass_over,
    raise_late,
    record_late,
    run_passed,
)
from tensortrace.capture.ops.places import Place, versions_given, writes

if TYPE_CHECKING:
    from tensortrace.capture.receiver import Receiver

_no_functions = torch._C.DisableTorchFunction
_clock = time.perf_counter_ns
# The two parts of `torch.compiler.is_compiling`; of the function Dynamo knows that it is true.
_compiler = torch.compiler
_is_compiling = torch.compiler.is_dynamo_compiling
_tracing_state = torch._C._get_tracing_state
# The number that the next autograd node of this thread gets.
_next_node = torch._C._autograd._get_sequence_nr
_default_device: Any = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
_HOSTS = frozenset({"cpu", "meta"})
# In each step so many are recorded: a loop over single elements would fill the log.
_SYNCS_PER_STEP = 20


class OutsideMode(TorchFunctionMode):
    """Shows every torch function called where it is on. No attributes: Dynamo guards on them."""

    @leave_to_python
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` and report it."""
        if _is_compiling():
            return func(*args, **(kwargs or {}))
        if _call is not None:
            done = _call(func, args, kwargs, sys._getframe(1))
            if type(done) is not Turn:
                return done
            return done.way(done, func, args, kwargs or {})
        # While source lines are followed each function that is called costs 0.3 us more, unless
        # Python's trace function rests: so all that is done here is done in two rests.
        try:
            here.rest()
            turn = _turn(func, kwargs, sys._getframe(1))
        finally:
            here.go_on()
        if turn is None:
            return func(*args, **(kwargs or {}))
        if isinstance(turn, Turn):
            return turn.way(turn, func, args, kwargs or {})
        return run_passed(turn, func, args, kwargs or {})


Way: TypeAlias = Callable[["Turn", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Turn:
    """One call of a function of torch's that there is something to do about.

    `way` is how it runs, `op` what it is called in a record, and `place` where it is called.
    """

    __slots__ = ("name", "op", "place", "recorder", "way")

    def __init__(
        self, recorder: Receiver, name: str, op: str, place: Place | None, way: Way | None = None
    ) -> None:
        self.recorder, self.name, self.op, self.place = recorder, name, op, place
        self.way = _run if way is None else way


def _turn(
    func: Callable[..., Any], kwargs: dict[str, Any] | None, frame: FrameType
) -> Turn | PassedOp | None:
    """What is to be done about a call; None for nothing. Hot."""
    recorder = slot.recorder
    if (
        recorder is None
        or here.busy
        or _compiler._is_compiling_flag
        or _tracing_state() is not None
    ):
        return None
    try:
        name = getattr(func, "__name__", "")
        op = op_of(name)
        if recorder.rules.awaits_write and (writes(name) or name == "__set__"):
            recorder.rules.ends_at_graph = True
        if op is None and _is_nothing(name):
            return None
        if op is None or not recorder.on["ops"] or name in BACKWARD or recorder.replaying:
            return _other_turn(recorder, func, name, op)
        place = recorder.places.find(name, frame)
        if place.is_generated or (place.is_compiled and not recorder.op_level):
            return None
        if recorder.rules.ends_at_graph and not here.stack and torch.is_grad_enabled():
            return Turn(recorder, name, op, place, _run_first)
        if here.stack or not recorder.thins_ops:
            return Turn(recorder, name, op, place, _run)
        if recorder.rules.stepped:
            _op_called(recorder)
        taken = place.takes(recorder.step, here.line)
        if taken or (kwargs and _writes(kwargs)):
            return Turn(recorder, name, op, place, _run)
        return pass_over(recorder, op, place)
    except Exception as error:
        recorder.fault("ops", error)
        return None


def _other_turn(
    recorder: Receiver, func: Callable[..., Any], name: str, op: str | None
) -> Turn | None:
    if op is None and writes(name) and not recorder.replaying:
        recorder.next_seq()  # so that whoever counts knows that something happened
    if name in _DETACHING and recorder.on["ops"] and _detaches(func, name):
        return Turn(recorder, name, name, None, _detach)
    if op is None or not recorder.on["ops"]:
        asked = name in SYNCS or name in HOOKS
        return Turn(recorder, name, name, None, _ask) if asked else None
    if name in BACKWARD and getattr(func, "__module__", "").startswith("torch."):
        return Turn(recorder, name, op, None, run_backward)
    return Turn(recorder, name, op, None, _run)


def _writes(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _op_called(recorder: Receiver) -> None:
    """A step may end here."""
    with _no_functions():
        here.busy += 1
        try:
            recorder.op_called()
        finally:
            here.busy -= 1


def _ask(
    turn: Turn, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call what is no op."""
    if turn.name in HOOKS:
        with Ours(turn.recorder, "ops"):
            hook = args[1] if len(args) > 1 else kwargs.get("hook")
            turn.recorder.hook_given(args[0] if args else None, hook)
        if turn.recorder.replaying:
            return RemovableHandle(OrderedDict())  # a hook of the user's must not run twice
        return func(*args, **kwargs)
    _sync(turn.recorder, turn.name, args)
    return func(*args, **kwargs)


# Methods, and the getter of an attribute.
_DETACHING = frozenset({"detach", "__get__"})


@functools.lru_cache(4096)
def _is_nothing(name: str) -> bool:
    """Whether a function of this name, which is no op, is none of those that are asked about."""
    return not writes(name) and name not in _DETACHING | SYNCS | HOOKS


def _detaches(func: Callable[..., Any], name: str) -> bool:
    return name != "__get__" or getattr(func, "__self__", None) is torch.Tensor.data


def _detach(
    turn: Turn, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call what takes the graph off, and no value is changed by: no record, but not forgotten."""
    result = func(*args, **kwargs)
    if args and type(result) is torch.Tensor:
        with Ours(turn.recorder, "ops"):
            turn.recorder.tensors.detached(result, args[0])
    return result


def _sync(recorder: Receiver, name: str, args: tuple[Any, ...]) -> None:
    """Record, on full steps, that the host waits for a device at this line."""
    with _no_functions():
        tensor = args[0] if args else None
        if not isinstance(tensor, torch.Tensor) or tensor.device.type in _HOSTS:
            return
        if not recorder.full or recorder.replaying or not recorder.on["ops"]:
            return
        now, (step, count) = (recorder.serial, recorder.step), here.synced
        here.synced = (now, count + 1 if step == now else 1)
        if here.synced[1] > _SYNCS_PER_STEP:
            return
        here.busy += 1
        try:
            here.rest()
            detail = {"device": str(tensor.device)}
            recorder.action("sync", of=name, frame=sys._getframe(3), detail=detail)
        except Exception as error:
            recorder.fault("ops", error)
        finally:
            here.busy -= 1
            here.go_on()


_MODE = OutsideMode()
# What entering a module did to the mode.
UNTOUCHED, _PUT_ON, TAKEN_OFF = 0, 1, -1


def enter_module(wanted: bool) -> int:
    """Switch the mode as a module call wants it; returns what `leave_module` must undo. Hot."""
    depth = _len_torch_function_stack()
    if depth == 1:  # nearly always it is ours alone, or nobody's
        on = _get_function_stack_at(0) is _MODE
        if on and not wanted:
            _pop_torch_function_stack()
            return TAKEN_OFF
    else:
        on = any(_get_function_stack_at(i) is _MODE for i in range(depth))
    if on == wanted:
        return UNTOUCHED
    if wanted:
        mode_on()
        return _PUT_ON
    mode_off()
    return TAKEN_OFF


def leave_module(change: int) -> None:
    """Put the mode back to what it was at the entry. Hot."""
    if change == TAKEN_OFF:
        mode_on()
    elif change == _PUT_ON:
        mode_off()


def mode_on() -> None:
    """Put the mode below all modes of the user's in this thread, while module calls are seen."""
    recorder = slot.recorder
    if recorder is None or not recorder.on["modules"]:
        return
    depth = _len_torch_function_stack()
    if depth == 0:
        _push_on_torch_function_stack(_MODE)
        return
    above = [_pop_torch_function_stack() for _ in range(depth)]
    # Below all others torch expects that of set_default_device, and raises where it is not. What a
    # `with torch.device(...)` has pushed is popped from the top.
    if above[-1] is getattr(_default_device, "device_context", None):
        _push_on_torch_function_stack(above.pop())
    _push_on_torch_function_stack(_MODE)
    for mode in reversed(above):
        if mode is not _MODE:
            _push_on_torch_function_stack(mode)


def mode_off() -> None:
    """Take the mode off this thread's stack, wherever it is."""
    depth = _len_torch_function_stack()
    if depth == 1 and _get_function_stack_at(0) is _MODE:
        _pop_torch_function_stack()
        return
    if not any(_get_function_stack_at(i) is _MODE for i in range(depth)):
        return
    above = [_pop_torch_function_stack() for _ in range(depth)]
    for mode in reversed(above):
        if mode is not _MODE:
            _push_on_torch_function_stack(mode)


def _run(
    turn: Turn, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an op and record it."""
    recorder, place = turn.recorder, turn.place
    if recorder.replaying:
        recorder.guard(turn.name, args, kwargs)
    draft = None
    before: list[int] | None = None
    with _no_functions():
        here.busy += 1
        try:
            here.rest()
            location = (
                place.location
                if place is not None and place.is_own
                else recorder.sources.locate_frame(sys._getframe(2))
            )
            given = args[::-1] if turn.name in REVERSED else args
            draft = begin_op(recorder, turn.op, location, given, kwargs)
            since = _next_node()
            if place is not None and draft is not None:
                if place.checked:
                    recorder.plain += not (place.writes or _writes(kwargs))
                elif place.runs > 1:
                    before = versions_given(args, kwargs)
        except Exception as error:
            recorder.fault("ops", error)
        finally:
            here.busy -= 1
            here.go_on()
    started_ns = _clock()
    try:
        result = func(*args, **kwargs)
    except Exception as error:
        if draft is not None:
            op_raised(recorder, draft, error, _clock() - started_ns)
        raise
    if draft is not None:
        draft.fields["host_ns"] = _clock() - started_ns
        with _no_functions():
            here.busy += 1
            try:
                here.rest()
                if place is not None and before is not None:
                    place.checked, place.writes = True, before != versions_given(args, kwargs)
                # What writes by index returns nothing.
                made = args[0] if turn.name == "__setitem__" else result
                end_op(recorder, draft, made, since, place)
            except Exception as error:
                recorder.fault("ops", error)
            finally:
                here.busy -= 1
                here.go_on()
        recorder.raise_if_stopped()
    return result


def _run_first(
    turn: Turn, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an op that is the first of a step if it makes a node: the one before had its update."""
    recorder, place = turn.recorder, turn.place
    takes = True
    with Ours(recorder, "ops"):
        given = tensors_in((*args, *kwargs.values()), "")
        if any(tensor.requires_grad for _, tensor in given):
            recorder.graph_begins()
        elif place is not None and recorder.thins_ops and not _writes(kwargs):
            takes = place.takes(recorder.step, here.line)
    if takes or place is None:
        return _run(turn, func, args, kwargs)
    return run_passed(pass_over(recorder, turn.op, place), func, args, kwargs)


@functools.lru_cache(4096)
def _plain_op_of(name: str) -> str | None:
    """What an op is called in a record that may be passed over."""
    return None if name in BACKWARD else op_of(name)


def _prepare() -> Callable[..., Any] | None:
    """The compiled way of an op that is passed over, where there is one."""
    turns, kernel = compiled.turns, compiled.kernel
    if turns is None or kernel is None:
        return None
    turns.prepare({
        "slot": slot, "here": here, "compiler": _compiler, "clock": _clock,
        "guard": _no_functions,
        "op_of": _plain_op_of, "tracing_state": _tracing_state, "next_node": _next_node,
        "mode_count": _len_torch_function_stack, "is_quiet": kernel.is_quiet,
        "tensor": torch.Tensor, "is_met": is_met, "decide": _turn, "turn": Turn,
        "has_news": has_news, "record_late": record_late, "raise_late": raise_late,
        "held": Held, "no_names": frozenset(),
    })  # fmt: skip
    call: Callable[..., Any] = turns.call
    return call


_call = _prepare()
