"""Module calls: one stateless pair of global forward hooks.

Never a full backward hook: it puts an autograd function around every module's output, which breaks
in-place ops and changes results. The forward hook is registered with ``always_call`` so that a
forward that raises is closed too; it gets four arguments normally and three after an exception.
"""

from __future__ import annotations

import bisect
import sys
import time
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules import module as torch_module

from tensortrace.capture.active import here, slot
from tensortrace.capture.autograd_functions import watch_function, watch_functions
from tensortrace.capture.compiled import untracked
from tensortrace.capture.drafts import CallDraft
from tensortrace.capture.dynamo import leave_to_python
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.gradients import is_training, watch_output, watch_parameters
from tensortrace.capture.ops import function_mode
from tensortrace.capture.ops.calls import autocast_text
from tensortrace.capture.ops.places import compiled_around, outputs_of
from tensortrace.capture.roots import Root, Roots, is_wrapper
from tensortrace.capture.tensors import TensorDraft
from tensortrace.records import Location
from tensortrace.text import shorten

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tensortrace.capture.receiver import Receiver

_in_backward = torch._C._current_graph_task_id  # -1 outside every backward
_no_functions = torch._C.DisableTorchFunction
_tracing_state = torch._C._get_tracing_state
_clock = time.perf_counter_ns
# The two parts of `torch.compiler.is_compiling`; of the function Dynamo knows that it is true.
_compiler = torch.compiler
_is_compiling = torch.compiler.is_dynamo_compiling
_FIRST_KEY = -2  # torch counts from 0
# How non-reentrant checkpointing ends a recomputation early: nothing went wrong.
_EARLY_STOP = "_StopRecomputationError"
_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class OpenCall(msgspec.Struct):
    """A module call that has been entered and not yet left."""

    module: nn.Module
    path: str
    frame: FrameType
    serial: int  # of the recorder that was told of its entry
    seq: int = -1
    step: int = -1
    root: Root | None = None
    mode: int = 0  # what its entry did to the function mode
    wanted: bool = False
    location: Location | None = None
    inputs: list[tuple[str, int]] = []
    tensors: list[TensorDraft] = []
    nth: int = 0
    recompute: bool = False
    forward: int | None = None
    grad_enabled: bool = True
    autocast: str | None = None
    started_ns: int = 0
    began: tuple[int, Any] | None = None
    # Which modules a step at rest passes over inside it, by id: see `rest.inside_root`.
    inside: frozenset[int] | None = None


class ModuleHooks:
    """The registered pair; `remove` leaves torch as it was."""

    def __init__(self) -> None:
        # A compiled module warns if there are global hooks, since those see it twice. Ours know
        # that, and a warning that is an error would break the program. (Not asked by torch 2.6.)
        self._has_any: Any = getattr(torch_module, "_has_any_global_hook", None)
        if self._has_any is not None:
            torch_module._has_any_global_hook = _has_other_hooks
        self._handles = [
            torch_module.register_module_forward_pre_hook(_before),
            torch_module.register_module_forward_hook(_after, with_kwargs=True, always_call=True),
        ]
        for key, handle in enumerate(self._handles, start=_FIRST_KEY):
            _move(handle, key)
        self._compiled: list[tuple[weakref.ref[nn.Module], Any, Any]] = []

    def take_in(self, module: nn.Module) -> None:
        """See the calls of a module that is compiled in place.

        torch calls what it has compiled instead of the code that runs the hooks, and the compiler
        leaves ours out.
        """
        if any(ref() is module for ref, _, _ in self._compiled):
            return
        compiled: Any = module._compiled_call_impl
        ref = weakref.ref(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            called, recorder = ref(), slot.recorder
            if called is None or recorder is None or recorder.shows_compiled:
                return compiled(*args, **kwargs)
            _before(called, args)
            _put_mode_back()
            try:
                result = compiled(*args, **kwargs)
            except BaseException:
                _after(called, args, None)
                raise
            _after(called, args, kwargs, result)
            return result

        module._compiled_call_impl = call
        self._compiled.append((ref, compiled, call))

    def remove(self) -> None:
        """Take both hooks away."""
        slot.training.clear()
        slot.called.clear()
        for ref, compiled, call in self._compiled:
            module = ref()
            if module is not None and module._compiled_call_impl is call:
                module._compiled_call_impl = compiled
        self._compiled.clear()
        for handle in self._handles:
            handle.remove()
            # torch forgets this table when a global hook is removed.
            torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
        self._handles.clear()
        if getattr(torch_module, "_has_any_global_hook", None) is _has_other_hooks:
            torch_module._has_any_global_hook = self._has_any


def _put_mode_back() -> None:
    """Have the function mode as it was when a module was compiled: else it is compiled anew.

    A function of its own: a frame that holds the open call that holds it is freed by nobody soon.
    """
    entered = here.stack[-1] if here.stack else None
    if entered is not None and entered.mode == function_mode.TAKEN_OFF:
        entered.mode = function_mode.UNTOUCHED
        function_mode.mode_on()


def _move(handle: RemovableHandle, key: int) -> None:
    """Give a hook the same key every time: Dynamo guards on the keys, so a new one recompiles."""
    tables: tuple[dict[int, Any], ...] = (
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_hooks_with_kwargs,
        torch_module._global_forward_hooks_always_called,
    )
    for table in tables:
        if handle.id in table:
            table[key] = table.pop(handle.id)
    handle.id = key


def _has_other_hooks() -> bool:
    tables = (
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
    )
    return any(hook not in (_before, _after) for table in tables for hook in table.values())


@leave_to_python
def _before(module: nn.Module, args: tuple[Any, ...]) -> None:
    if _is_compiling() or _compiler._is_compiling_flag:
        return
    recorder = slot.recorder
    if recorder is None or here.busy or not recorder.on["modules"]:
        return
    if _tracing_state() is not None:
        return  # torch.jit.trace would write our kernels into its graph
    if recorder.sampling and (stack := here.stack) and recorder.passes_over(module, stack[-1]):
        return
    with _no_functions():
        here.busy += 1
        try:
            here.rest()
            _enter(_recorder_here(recorder), module, args, sys._getframe(1))
        except Exception as error:
            recorder.fault("modules", error)
        finally:
            here.busy -= 1
            here.go_on()
    recorder.raise_if_stopped()


@leave_to_python
def _after(*hook_args: Any) -> None:
    if _is_compiling() or _compiler._is_compiling_flag:
        return
    recorder = slot.recorder
    if recorder is None or here.busy or not (stack := here.stack):
        return
    if (
        recorder.sampling
        and len(hook_args) == 4
        and stack[-1].module is not hook_args[0]
        and (len(stack) == 1 or _place(stack, hook_args[0]) < 0)
    ):
        return  # passed over
    with _no_functions():
        here.busy += 1
        try:
            here.rest()
            _leave(_recorder_here(recorder), hook_args)
        except Exception as error:
            recorder.fault("modules", error)
        finally:
            here.busy -= 1
            here.go_on()


def _enter(recorder: Receiver, module: nn.Module, args: tuple[Any, ...], frame: FrameType) -> None:
    stack = here.stack
    if stack:
        _drop_stale(stack, frame)
    if not stack and _in_backward() == -1:
        recorder.outermost_call(module)
    names = recorder.names
    path = names.known(module)
    if path is None:
        if not stack:
            around = compiled_around(frame)
            if around is not None and around is not module:  # code that was compiled in place
                recorder.places.met_compiled(around)
                return
            path = names.name_outermost(module)
        else:
            path = names.name_inside(module, stack[0].module, stack[-1].path, recorder.step)
        recorder.take_aliases()
    call = OpenCall(module, path, frame, recorder.serial)
    if recorder.op_level:
        call.mode = function_mode.enter_module(not _is_fused(module))
    elif not stack:
        call.mode = function_mode.enter_module(False)
    above = stack[-1] if stack else None
    if above is not None:
        above.inside = None  # what is met now need not be looked at when it is called again
    stack.append(call)
    call.wanted = recorder.wants(path)
    if not call.wanted:
        return
    call.step = recorder.step
    call.seq = recorder.next_seq()
    call.location = _locate(recorder, frame, above)
    _link(recorder, call, above)
    call.grad_enabled = torch.is_grad_enabled()
    if torch._C._is_any_autocast_enabled():
        call.autocast = autocast_text()
    recorder.module_called(module, path)
    if recorder.roots is not None:
        _find_root(recorder.roots, call, above, args)
    _take_inputs(recorder, call, above, args)
    times = recorder.device_times
    call.began = times.begin(tensors_in(args, "input")) if times is not None else None
    call.started_ns = _clock()


def _take_inputs(
    recorder: Receiver, call: OpenCall, above: OpenCall | None, args: tuple[Any, ...]
) -> None:
    for name, tensor in tensors_in(args, "input"):
        number, draft = recorder.tensors.identify(tensor)
        call.inputs.append((name, number))
        if draft is not None:
            call.tensors.append(draft)
        if (above is None or recorder.op_level) and tensor.requires_grad:
            watch_function(recorder, tensor, above.path if above is not None else None)


def _locate(recorder: Receiver, frame: FrameType, above: OpenCall | None) -> Location | None:
    if above is None or not above.wanted:
        return recorder.sources.locate_frame(frame)
    return recorder.sources.locate_below(frame, above.frame, above.location)


def _find_root(roots: Roots, call: OpenCall, above: OpenCall | None, args: tuple[Any, ...]) -> None:
    """Keep an outermost call, so that it can be run again."""
    if above is not None:
        call.root = above.root
    if call.root is None and (above is None or is_wrapper(above.module)):
        call.root = roots.enter(call, call.module, args)


def _is_fused(module: nn.Module) -> bool:
    """Whether a call may take a fused path that any function mode on the stack would turn off."""
    return isinstance(module, _FUSED) and not module.training and not torch.is_grad_enabled()


def _link(recorder: Receiver, call: OpenCall, around: OpenCall | None) -> None:
    """Number the call, or find the forward call that a checkpoint recomputes."""
    key = (call.path, type(call.module))
    seqs = recorder.now.calls.setdefault(key, [])
    todo = recorder.now.to_recompute.setdefault(key, [])
    if _in_backward() == -1 or not seqs:
        call.nth = recorder.turn_of(call.module, len(seqs))
        seqs.append(call.seq)
        todo.append((call.seq, call.nth))
        return
    call.recompute = True
    if not todo:  # backward runs a second time over the same graph
        todo.extend((seq, nth) for nth, seq in enumerate(seqs))
    # Checkpoints run backwards over the calls of a step; inside one, calls run forwards.
    i = len(todo) - 1
    if around is not None and around.forward is not None:
        i = min(bisect.bisect(todo, (around.forward, 0)), i)
    call.forward, call.nth = todo.pop(i)


def _drop_stale(stack: list[OpenCall], frame: FrameType) -> None:
    """Drop calls that were left by a KeyboardInterrupt, for which torch runs no hook."""
    while stack:
        above: FrameType | None = frame.f_back
        top = stack[-1].frame
        while above is not None and above is not top:
            above = above.f_back
        if above is not None:
            return
        function_mode.leave_module(stack.pop().mode)


def _recorder_here(recorder: Receiver) -> Receiver:
    """Whom this thread tells: while another one replays a call, the run that it is in. Hot.

    Calls on the stack whose run another thread has ended are dropped.
    """
    stack = here.stack
    if not stack or stack[-1].serial == recorder.serial:
        return recorder
    live = recorder.live_of(stack[-1].serial)
    if live is not None:
        return live
    while stack:
        function_mode.leave_module(stack.pop().mode)
    return recorder


def _place(stack: list[OpenCall], module: nn.Module) -> int:
    """Where the innermost open call of a module is on the stack; -1 if it has none. Hot."""
    i = len(stack) - 1
    while i >= 0 and stack[i].module is not module:
        i -= 1
    return i


def _leave(recorder: Receiver, hook_args: tuple[Any, ...]) -> None:
    module, stack = hook_args[0], here.stack
    i = _place(stack, module)
    failed = len(hook_args) != 4
    if i < 0 and failed and recorder.sampling:
        # A call that was passed over: what failed is looked at after all.
        _enter(recorder, module, hook_args[1], sys._getframe(2))
        i = len(stack) - 1
    if i < 0:
        return  # passed over, or entered before the trace began
    call = stack[i]
    error = sys.exc_info()[1] if failed else None
    ended_ns = _clock()
    fields: dict[str, Any] = {}
    _end_time(recorder, call, fields)
    while len(stack) > i:
        function_mode.leave_module(stack.pop().mode)
    if not call.wanted or not recorder.on["modules"]:
        return
    if call.step != recorder.step:
        # Its step ended before it did: another thread's call, or t.step() inside a module. What it
        # was given has its ids in that step.
        call.step, call.seq = recorder.step, recorder.next_seq()
        call.inputs, call.tensors = [], []
    fields |= {
        "update": recorder.update,
        "parent": _parent(stack, call),
        "module": call.path,
        "nth": call.nth,
        "recompute": call.recompute,
        "forward": call.forward,
        "training": is_training(module),
        "grad_enabled": call.grad_enabled,
        "location": call.location,
        "host_ns": ended_ns - call.started_ns,
    }
    if call.autocast is not None:
        fields["autocast"] = call.autocast
    if not recorder.owns_thread():
        fields["thread"] = recorder.thread_number()
    if recorder.on_cuda:
        fields["allocated"] = torch.cuda.memory_allocated()
    if call.root is not None and call.root.seq == call.seq and recorder.roots is not None:
        _leave_root(recorder, recorder.roots, call.root, hook_args, fields)
    draft = CallDraft(call.step, call.seq, fields, call.tensors)
    if failed:
        if error is not None and type(error).__name__ != _EARLY_STOP:
            fields["exception"] = shorten(type(error).__name__)
    else:
        _, _, kwargs, output = hook_args
        _describe(recorder, call, draft, kwargs, output)
    fields["inputs"] = untracked(call.inputs)
    untracked(call.tensors)
    untracked(fields)
    recorder.pend(draft)


def _leave_root(
    recorder: Receiver, roots: Roots, root: Root, hook_args: tuple[Any, ...], fields: dict[str, Any]
) -> None:
    failed = len(hook_args) != 4
    roots.leave(root, hook_args[1], {} if failed else hook_args[2], failed)
    if recorder.may_drop and not fields["training"] and root.has_drawn():
        fields["drew"] = True


def _end_time(recorder: Receiver, call: OpenCall, fields: dict[str, Any]) -> None:
    """Note that a call is over on its device, before a kernel of ours follows it."""
    if call.began is not None and recorder.device_times is not None:
        recorder.device_times.end(call.began, fields)


def _parent(stack: list[OpenCall], call: OpenCall) -> int | None:
    if not stack or not stack[-1].wanted or stack[-1].step != call.step:
        return None
    return stack[-1].seq


def _describe(
    recorder: Receiver, call: OpenCall, draft: CallDraft, kwargs: dict[str, Any], output: Any
) -> None:
    # Keyword arguments reach a global hook only now, after the call.
    for key, value in kwargs.items():
        for name, tensor in tensors_in(value, shorten(key)):
            number, described = recorder.tensors.identify(tensor)
            call.inputs.append((name, number))
            if described is not None:
                draft.tensors.append(described)
    outputs: list[tuple[str, int]] = []
    for name, tensor in outputs_of(output):
        number, described = recorder.tensors.identify(tensor)
        outputs.append((name, number))
        if described is not None:
            draft.tensors.append(described)
        if tensor.requires_grad:
            node = watch_output(recorder, tensor, number, call, name)
            if isinstance(node, BackwardCFunction):
                watch_functions(recorder, node, call.path)
    draft.fields["outputs"] = untracked(outputs)
    if call.module._parameters and call.grad_enabled:
        watch_parameters(recorder, call.module, call.path)
