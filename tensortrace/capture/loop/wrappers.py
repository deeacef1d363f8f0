"""What a training loop does that no hook shows: wrappers around a few methods of torch's.

Fetching data, zeroing and clipping gradients, scaling the loss, switching between training and
evaluation, loading a state dict, what other ranks send, a schedule of micro-batches. Each wrapper
calls the original with the arguments that it got and looks the recorder up in the slot, so that one
left in place by somebody else is inert.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.amp import grad_scaler
from torch.nn.utils import clip_grad
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    dataloader,
)
from torch.utils.weak import WeakIdKeyDictionary

from tensortrace.capture.active import Ours, here, slot
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.gradients import is_training
from tensortrace.capture.loop import optimizers
from tensortrace.capture.loop.batches import Batches
from tensortrace.capture.loop.losses import record_clip, record_scale
from tensortrace.capture.loop.orders import Orders
from tensortrace.capture.loop.states import States
from tensortrace.capture.ops import function_mode
from tensortrace.capture.tensors import let_go
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder

# So many names of each side are told, and are enough to look for a prefix with.
_EXAMPLES = 5
# Those whose length is arithmetic.
_SAMPLERS = frozenset({SequentialSampler, RandomSampler, SubsetRandomSampler, DistributedSampler,
                       WeightedRandomSampler})  # fmt: skip
_BATCH_SAMPLERS = frozenset({BatchSampler, type(None)})
# What writes to tensors, and torch does not count it as it counts what else does.
_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "recv", "recv_anysource",
    "allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced",
    "gather", "scatter", "reduce_scatter", "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base",
)  # fmt: skip
_SCHEDULES = ("PipelineScheduleSingle", "PipelineScheduleMulti")
_Call = Callable[[], Any]
_Original = Callable[..., Any]
# Reports a call: gets the recorder, the positional and the named arguments, and the call itself.
_Report = Callable[["Recorder", tuple[Any, ...], dict[str, Any], _Call], Any]


class Patches:
    """The wrappers in place; `remove` puts the originals back."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []
        for owner, name, report in _targets():
            self._put(owner, name, functools.partial(_wrap, report=report))
        self._put(torch.utils, "swap_tensors", _wrap_swap)

    def _put(self, owner: Any, name: str, wrap: Callable[[_Original], _Original]) -> None:
        original = owner.__dict__.get(name)
        if original is not None:  # else another torch version
            wrapper = wrap(original)
            setattr(owner, name, wrapper)
            self._done.append((owner, name, original, wrapper))

    def remove(self) -> None:
        """Put back what was there, unless somebody else has wrapped it since."""
        for owner, name, original, wrapper in reversed(self._done):
            if owner.__dict__.get(name) is wrapper:
                setattr(owner, name, original)
        self._done.clear()


def _targets() -> list[tuple[Any, str, _Report]]:
    scaler = grad_scaler.GradScaler
    group = torch.distributed.ProcessGroup if torch.distributed.is_available() else None
    schedules = sys.modules.get("torch.distributed.pipelining.schedules")
    states = States()
    return [
        *((group, name, _receive) for name in _COLLECTIVES if group is not None),
        *((getattr(schedules, name), "step", _schedule) for name in _SCHEDULES if schedules),
        (dataloader.DataLoader, "__iter__", functools.partial(_loader, Orders())),
        (dataloader._BaseDataLoaderIter, "__next__", functools.partial(_fetch, Batches())),
        (torch.optim.Optimizer, "zero_grad", _zero_grad),
        (nn.Module, "zero_grad", _zero_grad),
        (nn.Module, "train", functools.partial(_train, WeakIdKeyDictionary())),
        (nn.Module, "state_dict", functools.partial(_state_dict, states)),
        (nn.Module, "load_state_dict", functools.partial(_load_state_dict, states)),
        (clip_grad, "_get_total_norm", _silently),
        (clip_grad, "_clip_grads_with_norm_", _clip_norm),
        (nn.utils, "get_total_norm", _silently),
        (nn.utils, "clip_grads_with_norm_", _clip_norm),
        (clip_grad, "_group_tensors_by_device_and_dtype", _clip_value),
        (scaler, "scale", _scale),
        (scaler, "unscale_", _unscale),
        (scaler, "step", _scaler_step),
        (scaler, "update", _silently),
    ]


def _wrap(original: _Original, report: _Report) -> _Original:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        recorder = slot.followed()
        if torch.compiler.is_compiling() or recorder is None or here.busy:
            return original(*args, **kwargs)
        if not recorder.on["loop"]:
            return original(*args, **kwargs)
        return report(recorder, args, kwargs, lambda: original(*args, **kwargs))

    return wrapper


def _wrap_swap(original: _Original) -> _Original:
    """What swaps the parameters of a module that is moved or loaded, if torch.__future__ says so.

    It may be called inside load_state_dict, and between two calls of a decorated function.
    """

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for tensor in (*args, *kwargs.values()):
                let_go(tensor)
        return original(*args, **kwargs)

    return wrapper


def _quietly(call: _Call) -> Any:
    """Call torch without recording the ops it makes: to be shown each, one by one, takes time."""
    mode = function_mode.enter_module(False)
    here.busy += 1
    try:
        here.rest()
        return call()
    finally:
        here.busy -= 1
        here.go_on()
        function_mode.leave_module(mode)


def _silently(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    return _quietly(call)


def _loader(orders: Orders, recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    outside = not here.stack and torch._C._current_graph_task_id() == -1
    counts = recorder.owns_thread() and outside
    order: dict[str, Any] = {}
    if counts:
        with Ours(recorder, "loop"):
            order = orders.order_of(args[0])  # before anything is drawn
    started = time.perf_counter_ns()
    batches = _quietly(call)  # with workers, that is where they start
    if counts:
        with Ours(recorder, "loop"):
            loader = args[0]
            recorder.rules.loaders.began(batches, sys._getframe(2))
            detail = {
                "host_ns": time.perf_counter_ns() - started,
                "batches": _count_batches(loader),
                "workers": loader.num_workers,
                "pin_memory": bool(loader.pin_memory),
                "shuffled": not isinstance(_sampler_of(loader), SequentialSampler),
                "replacement": _may_draw_again(loader),
                **order,
            }
            of = shorten(type(loader.dataset).__name__)
            recorder.action("loader", of=of, frame=sys._getframe(2), detail=detail)
    return batches


def _sampler_of(loader: dataloader.DataLoader[Any]) -> Any:
    """What draws the indices: `loader.sampler` says nothing where a batch sampler was given."""
    batches = loader.batch_sampler  # whose truth is its length, which may draw
    return loader.sampler if batches is None else getattr(batches, "sampler", batches)


def _may_draw_again(loader: dataloader.DataLoader[Any]) -> bool:
    """Whether an epoch may have the same index twice; a sampler of the user's may."""
    if isinstance(loader.dataset, IterableDataset):
        return False
    sampler = _sampler_of(loader)
    known = type(sampler) in _SAMPLERS and type(loader.batch_sampler) in _BATCH_SAMPLERS
    return bool(getattr(sampler, "replacement", not known))


def _count_batches(loader: dataloader.DataLoader[Any]) -> int | None:
    """How many batches an epoch has; None for a stream, and where a sampler of the user's says it.

    Such a sampler may draw random numbers to say its length, as nobody has asked it to.
    """
    plain = type(loader.sampler) in _SAMPLERS and type(loader.batch_sampler) in _BATCH_SAMPLERS
    if not plain or isinstance(loader.dataset, IterableDataset):
        return None
    return len(loader._index_sampler)


def _fetch(given: Batches, recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    started = time.perf_counter_ns()
    outside = not here.stack and torch._C._current_graph_task_id() == -1
    counts = recorder.owns_thread() and outside
    try:
        batch = _quietly(call)  # collating and the dataset's own ops are no ops of the step
    except StopIteration:
        if counts:
            with Ours(recorder, "loop"):
                recorder.rules.loader_ended()
        raise
    if counts:
        with Ours(recorder, "loop"):
            recorder.fetched(args[0], time.perf_counter_ns() - started, sys._getframe(2))
            repeated = given.repeated(args[0], batch) if recorder.full else None
            if repeated is not None:
                recorder.action("duplicates", frame=sys._getframe(2), detail=repeated)
        recorder.raise_if_stopped()
    return batch


def _zero_grad(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    owner, optimizer = args[0], None
    detail: dict[str, Any] = {}
    with Ours(recorder, "loop"):
        set_to_none = kwargs.get("set_to_none", args[1] if len(args) > 1 else True)
        detail["set_to_none"] = bool(set_to_none)
        if isinstance(owner, torch.optim.Optimizer):
            optimizer = recorder.optimizers.index_of(owner)
            if _is_unused(recorder, optimizer, owner):
                detail["still"] = True
                detail["lr"] = optimizers.rates_of(owner)
                if recorder.optimizers.tell_held(optimizer):
                    detail["held"] = optimizers.names_held(recorder, owner)
    result = _quietly(call)
    with Ours(recorder, "loop"):
        if isinstance(owner, torch.optim.Optimizer):
            detail["parameters"] = sum(len(group["params"]) for group in owner.param_groups)
            if recorder.full:  # the only part that walks over all modules
                detail.update(recorder.carried.left_over(recorder.names))
        else:
            parameters = list(owner.parameters())
            detail["parameters"] = len(parameters)
            detail["optimizers"] = recorder.carried.reached(parameters)
        recorder.action(
            "zero_grad",
            of=shorten(type(owner).__name__),
            optimizer=optimizer,
            frame=sys._getframe(2),
            detail=detail,
        )
    return result


def _is_unused(recorder: Recorder, index: int, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that has never stepped has gradients, and its weights do not move."""
    if recorder.optimizers.has_stepped(index):
        return False
    held = [p for group in optimizer.param_groups for p in group["params"]]
    still = recorder.carried.by_hand.is_still(index, held)
    return still and any(p.grad is not None for p in held)


def _receive(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    result = call()
    with Ours(recorder, "loop"):
        for _, tensor in tensors_in((args[1:], kwargs), ""):
            recorder.tensors.received(tensor)
    return result


def _schedule(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    if not recorder.owns_thread():
        return call()
    with Ours(recorder, "loop"):
        recorder.schedule_begins()
    with recorder.rules.one_turn():
        return call()


def _train(
    asked: WeakIdKeyDictionary, recorder: Recorder, args: Any, kwargs: Any, call: _Call
) -> Any:
    module = args[0]
    before = is_training(module)
    result = _quietly(call)  # the children's own calls of train() are part of this one
    mode = kwargs.get("mode", args[1] if len(args) > 1 else True)
    with Ours(recorder, "loop"):
        # How many updates had been made when eval() was asked last. Who asks once more after some,
        # of a module that is in eval mode, takes it to have been trained in the other one.
        again = not (before or mode) and module in asked and asked[module] < recorder.update
        if not mode:
            asked[module] = recorder.update
        if before != mode or again:
            detail = {"modules": sum(1 for _ in module.modules())}
            recorder.action(
                "train" if mode else "eval",
                of=recorder.names.known(module) or shorten(type(module).__name__),
                frame=sys._getframe(2),
                detail={**detail, "again": True} if again else detail,
            )
    return result


def _state_dict(states: States, recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    result = call()
    # The children's own calls are part of this one; with keep_vars it holds what is no view.
    if len(args) == 1 and kwargs.get("destination") is None and not kwargs.get("keep_vars"):
        with Ours(recorder, "loop"):
            states.taken(recorder, args[0], result)
    return result


def _load_state_dict(
    states: States, recorder: Recorder, args: Any, kwargs: Any, call: _Call
) -> Any:
    module, state = args[0], args[1] if len(args) > 1 else kwargs.get("state_dict", ())
    own: dict[str, Any] = {}
    with Ours(recorder, "loop"):
        # Before the call: with assign=True what is given becomes the module's own.
        own = states.own(recorder, module, state)
    result = _quietly(call)
    with Ours(recorder, "loop"):
        given = len(state)
        missing = list(getattr(result, "missing_keys", ()))
        unexpected = list(getattr(result, "unexpected_keys", ()))
        prefix = _common_prefix(unexpected, missing)
        apart = {"prefix_given": prefix} if prefix else {}
        if not prefix and (prefix := _common_prefix(missing, unexpected)):
            apart = {"prefix_wanted": prefix}
        recorder.action(
            "load_state_dict",
            of=recorder.names.known(module) or shorten(type(module).__name__),
            frame=sys._getframe(2),
            detail={
                "optimizers": recorder.carried.reached(list(module.parameters())),
                "matched": given - len(unexpected),
                "missing": len(missing),
                "unexpected": len(unexpected),
                "examples": [*missing[:_EXAMPLES], *unexpected[:_EXAMPLES]],
                **own,
                **apart,
            },
        )
    return result


def _common_prefix(long: list[str], short: list[str]) -> str | None:
    """What most names of one side have in front of a name of the other, None if nothing."""
    have = set(long)
    for name in short[:_EXAMPLES]:
        for candidate in long:
            if candidate.endswith(f".{name}"):
                prefix = candidate.removesuffix(name)
                found = sum(prefix + other in have for other in short)
                if 2 * found > min(len(have), len(short)):
                    return prefix
    return None


def _clip_norm(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    with Ours(recorder, "loop"):
        max_norm = kwargs.get("max_norm", args[1] if len(args) > 1 else None)
        total = kwargs.get("total_norm", args[2] if len(args) > 2 else None)
        parameters = args[0] if args else kwargs.get("parameters")
        record_clip(
            recorder,
            # A generator would be used up by looking at it.
            parameters if isinstance(parameters, (list, tuple)) else [],
            float(max_norm) if isinstance(max_norm, (int, float)) else None,
            total if isinstance(total, torch.Tensor) else None,
            sys._getframe(2),
        )
    return _quietly(call)


def _clip_value(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    frame = sys._getframe(2)
    if frame.f_code.co_name == "clip_grad_value_":
        with Ours(recorder, "loop"):
            value = frame.f_locals.get("clip_value")
            owner = recorder.carried.owner(args[0][0])
            recorder.action("clip", frame=frame, optimizer=owner, detail={"value": value})
            recorder.now.clipped = True
    return _quietly(call)


def _scale(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    scaler = args[0]
    if scaler.is_enabled():
        with Ours(recorder, "loop"):
            outputs = args[1] if len(args) > 1 else kwargs.get("outputs")
            record_scale(recorder, tensors_in(outputs, "loss"), scaler, sys._getframe(2))
    return _quietly(call) if scaler.is_enabled() else call()


def _unscale(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    result = _quietly(call)
    scaler = args[0]
    if scaler.is_enabled():
        with Ours(recorder, "loop"):
            # The kernel that unscales leaves the version as it was.
            recorder.parameters.forget_gradients()
            optimizer = args[1] if len(args) > 1 else kwargs.get("optimizer")
            index = recorder.optimizers.index_of(optimizer)
            unscale = recorder.action("unscale", optimizer=index, frame=sys._getframe(2))
            state = scaler._per_optimizer_states[id(optimizer)]
            scalars = {"scale": scaler._scale}
            # One count for each device that holds gradients; the first stands for all but rarely.
            scalars.update(("found_inf", n) for n in state["found_inf_per_device"].values())
            tickets = recorder.queue.add_scalars(scalars.values())
            unscale.scalars.update(zip(scalars, tickets, strict=True))
    return result


def _scaler_step(recorder: Recorder, args: Any, kwargs: Any, call: _Call) -> Any:
    scaler = args[0]
    optimizer = args[1] if len(args) > 1 else kwargs.get("optimizer")
    if not scaler.is_enabled() or not isinstance(optimizer, torch.optim.Optimizer):
        return call()
    frame = sys._getframe(2)
    with Ours(recorder, "loop"):
        recorder.scaler_begins()
    before = recorder.update
    # Not quietly: the optimizer's own hooks must fire inside.
    result = call()
    if recorder.update == before and recorder.on["optimizers"]:
        with Ours(recorder, "loop"):
            optimizers.begin_step(recorder, optimizer, frame, skipped=True)
            index = recorder.optimizers.index_of(optimizer)
            recorder.carried.stepped(index, optimizer)
            recorder.rules.optimizer_stepped(index)
        recorder.raise_if_stopped()
    return result
