"""Optimizer steps: the gate before the weights move, and how far they moved.

Updates are measured on a fixed strided sample of each parameter, so that no copy of the weights is
ever made.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tensortrace.capture import compiled
from tensortrace.capture.active import Ours, here, slot
from tensortrace.capture.drafts import OptimizerDraft, ParamDraft
from tensortrace.capture.ops import function_mode
from tensortrace.capture.tensors import TensorDraft, version_of
from tensortrace.capture.unwrap import plain, quiet
from tensortrace.records import Scalar, to_scalar
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder

# Most elements of a parameter whose change is measured, in full steps and in thin ones: reading
# 65,536 of each of the eight weights of an MLP before and after costs 5 % of its step, 4,096 1 %,
# and a norm from 4,096 elements is known to 1.1 % (one over the root of twice their number).
SAMPLE = 65_536
THIN_SAMPLE = 4_096
# Four lines of cache: single elements so far apart would read all of the parameter, and shorter
# runs touch as many pages as there are runs.
_RUN = 64
# Units that start alike and get the same gradients show it here: a hidden layer behind an output of
# zeros has none in the first step.
_FIRST_STEPS = 2
# An optimizer that took fewer steps leaves its number to the next like it, whatever that holds: an
# inner loop makes thousands. Past so many numbers each leaves it.
_SHORT = 20
_MOST_MET = 64
# A sampler of an energy-based model takes some hundred derivatives between two updates.
_MOST_DERIVATIVES = 1000
# What schedules change beside the learning rate.
_SCHEDULED = ("weight_decay", "momentum", "betas")
_no_functions = torch._C.DisableTorchFunction


class StepInFlight:
    """An optimizer step between its two hooks; not `begun` while its closure has yet to run."""

    __slots__ = ("begun", "frame", "index", "mode", "most", "optimizer", "samples")

    def __init__(self, optimizer: Optimizer, index: int, frame: FrameType) -> None:
        self.optimizer, self.index, self.frame, self.most = optimizer, index, frame, SAMPLE
        self.begun = False
        self.mode = 0  # what the function mode was changed by
        # Each parameter that has a gradient, its draft, its version and a copy of its sample.
        self.samples: list[tuple[torch.Tensor, ParamDraft, int, _Sample | None]] = []


class OptimizerHooks:
    """The registered pair; `remove` leaves torch as it was."""

    def __init__(self) -> None:
        self._handles = [
            register_optimizer_step_pre_hook(_before),
            register_optimizer_step_post_hook(_after),
        ]

    def remove(self) -> None:
        """Take both hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Met:
    """What is known of an optimizer when it is gone; no parameter can be held, not even weakly."""

    __slots__ = (
        "anew", "hooks", "keeps_state", "keys", "likeness", "lost_state", "ref", "steps", "told",
    )  # fmt: skip

    def __init__(self, optimizer: Optimizer) -> None:
        self.anew = self.told = self.keeps_state = False
        self.lost_state = 0
        self.ref = weakref.ref(optimizer)
        self.likeness = _likeness(optimizer)
        self.keys = hash(tuple(map(id, _parameters(optimizer))))
        self.steps = 0
        # The table of hooks that a parameter has as long as it lives, and another never gets.
        self.hooks: weakref.ref[Any] | None = None

    def stepped(self) -> None:
        """Count a step. Hot."""
        self.steps += 1
        optimizer = self.ref() if self.hooks is None else None
        if optimizer is not None:
            self.keeps_state = bool(optimizer.state)
            tables = (p._backward_hooks for p in _parameters(optimizer))
            self.hooks = next((weakref.ref(table) for table in tables if table is not None), None)

    def leaves_to(self, other: _Met, optimizer: Optimizer) -> bool:
        """Whether an optimizer made after this one died is the same one to the program."""
        if self.ref() is not None or self.likeness != other.likeness:
            return False
        return self.steps < _SHORT or self.goes_on_in(other, optimizer)

    def goes_on_in(self, other: _Met, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds the very parameters that this one has stepped."""
        if self.keys != other.keys:
            return False
        if self.hooks is not None:
            hooks = self.hooks()
            held = (p._backward_hooks for p in _parameters(optimizer))
            return hooks is not None and any(table is hooks for table in held)
        # Each step has written them. What was made since at the same addresses is younger.
        written = max(map(version_of, _parameters(optimizer)), default=0)
        return written >= self.steps


class Optimizers:
    """The optimizers met so far, numbered by their first step.

    One made anew for the same parameters has the number of the dead one whose place it takes: a
    program that makes an optimizer in every step has one series, not thousands. One for the
    parameters of a new model has a number of its own: another fold, another restart.
    """

    def __init__(self) -> None:
        self._met: list[_Met] = []
        self._held: dict[int, list[str]] = {}
        self._steps: dict[tuple[int, str], int] = {}
        # The update that the run has come to, and how many derivatives were taken since.
        self._taken = 0, 0

    def index_of(self, optimizer: Optimizer) -> int:
        """The number of an optimizer in this run."""
        for i, met in enumerate(self._met):
            if met.ref() is optimizer:
                return i
        new = _Met(optimizer)
        full = len(self._met) >= _MOST_MET
        for i, met in enumerate(self._met):
            alike = full and met.ref() is None and met.likeness == new.likeness
            if alike or met.leaves_to(new, optimizer):
                new.anew = not met.goes_on_in(new, optimizer)
                if met.keeps_state and not new.anew and not optimizer.state:
                    new.lost_state = met.steps
                self._met[i] = new
                return i
        self._met.append(new)
        return len(self._met) - 1

    def tell_anew(self, index: int) -> bool:
        """True once, of one that has taken the number of another and holds other parameters."""
        met = self._met[index]
        anew, met.anew = met.anew, False
        return anew

    def tell_lost_state(self, index: int) -> int:
        """How many steps the one before had taken whose place it takes without its state, once."""
        met = self._met[index]
        lost, met.lost_state = met.lost_state, 0
        return lost

    def stepped(self, index: int) -> None:
        """Count a step of an optimizer that has moved what it holds."""
        self._met[index].stepped()

    def steps(self) -> list[int]:
        """How often each optimizer has moved what it holds, by number."""
        return [met.steps for met in self._met]

    def has_stepped(self, index: int) -> bool:
        """Whether an optimizer has moved what it holds."""
        return self._met[index].steps > 0

    def tell_held(self, index: int) -> bool:
        """True once, so that what an optimizer holds is told before it has stepped."""
        met = self._met[index]
        told, met.told = met.told, True
        return not told

    def has_met(self) -> bool:
        """Whether any optimizer was met so far."""
        return bool(self._met)

    def count_derivative(self, update: int) -> bool:
        """Count a derivative that was taken after so many updates.

        Returns:
            Whether it is part of a turn: a penalty's, an attack's, a sampler's. Where an optimizer
            steps, that ends the turn; unless it has stopped doing so.
        """
        last, count = self._taken
        self._taken = update, count + 1 if last == update else 1
        return self.has_met() and self._taken[1] <= _MOST_DERIVATIVES

    def met(self) -> Iterator[tuple[int, Optimizer]]:
        """The optimizers that still live, with their numbers. Hot."""
        for i, met in enumerate(self._met):
            optimizer = met.ref()
            if optimizer is not None:
                yield i, optimizer

    def is_new(self, index: int, name: str) -> bool:
        """Whether a parameter is at one of its first steps; each question counts as one."""
        count = self._steps.get((index, name), 0)
        if count < _FIRST_STEPS:
            self._steps[index, name] = count + 1
        return count < _FIRST_STEPS

    def newly_held(self, index: int, names: list[str]) -> list[str] | None:
        """The names that it holds, if they are not what they were."""
        if self._held.get(index) == names:
            return None
        self._held[index] = names
        return names


def _likeness(optimizer: Optimizer) -> int:
    """What an optimizer made anew for the same parameters shares with the one before it."""
    groups = tuple(tuple(map(_shape, group["params"])) for group in optimizer.param_groups)
    return hash((type(optimizer).__qualname__, groups))


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    try:
        return tuple(parameter.shape)
    except RuntimeError:
        return ()  # a lazy parameter, a nested one


def names_held(recorder: Recorder, optimizer: Optimizer) -> list[str]:
    """The full names of the parameters that modules have of those that an optimizer holds."""
    owners = [_name(recorder, parameter, parameter.grad) for parameter in _parameters(optimizer)]
    return [".".join(filter(None, owner)) for owner in owners if owner is not None]


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_compiling():
        return None
    recorder = slot.followed()
    if recorder is None or here.busy or not recorder.on["optimizers"]:
        return None
    changed = None
    with _no_functions():
        here.busy += 1
        try:
            here.rest()
            if not recorder.optimizer_running():
                closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
                if callable(closure):
                    recorder.closure_given()
                    changed = _gate_closure(recorder, closure, args, kwargs)
                if changed is None or recorder.now.backward_seen:
                    begin_step(recorder, optimizer, sys._getframe(1))
                else:  # there are no gradients yet, and at first not even names
                    index = recorder.optimizers.index_of(optimizer)
                    recorder.stepping = StepInFlight(optimizer, index, sys._getframe(1))
        except Exception as error:
            recorder.fault("optimizers", error)
        finally:
            here.busy -= 1
            here.go_on()
    recorder.raise_if_stopped()
    running = recorder.stepping
    # One that another optimizer calls inside its own step is part of that.
    if running is not None and running.frame is sys._getframe(1):
        running.mode = function_mode.enter_module(False)
    return changed


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    recorder = slot.followed()
    if recorder is None or here.busy:
        return
    running = recorder.stepping
    if running is None or running.optimizer is not optimizer:
        return
    with _no_functions():
        here.busy += 1
        try:
            here.rest()
            if not running.begun:  # it has never called its closure, so nothing moved is known
                begin_step(recorder, optimizer, running.frame)
                running.samples.clear()
            finish_step(recorder, running)
        except Exception as error:
            recorder.fault("optimizers", error)
        finally:
            here.busy -= 1
            here.go_on()
            function_mode.leave_module(running.mode)
            recorder.stepping = None


def begin_step(
    recorder: Recorder, optimizer: Optimizer, frame: FrameType, skipped: bool = False
) -> None:
    """Record the optimizer and its parameters as they are, and decide the gate."""
    recorder.thread_number()  # it may be a thread's first report
    recorder.note_threads()
    index = recorder.optimizers.index_of(optimizer)
    running = recorder.stepping or StepInFlight(optimizer, index, frame)
    running.begun, running.most = True, SAMPLE if recorder.full else THIN_SAMPLE
    names: list[str] = []
    grads: list[TensorDraft] = []
    lone: list[TensorDraft] = []
    unowned: list[tuple[int, ...]] = []
    no_grad = 0
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            grad = parameter.grad
            path, name = _name(recorder, parameter, grad) or (None, f"group{g}.{i}")
            full_name = f"{path}.{name}" if path else name
            names.append(full_name)
            if path is None:
                unowned.append(_shape(parameter))
            if grad is None:
                no_grad += 1
                continue
            fields = {"update": recorder.update, "optimizer": index, "name": full_name}
            if path is not None:
                fields["module"] = path
            param = _draft_parameter(recorder, parameter, grad, fields)
            grads.append(param.grad)
            if path is None:
                lone.append(param.grad)
            if skipped:
                param.changed = False
                recorder.pend(param)
            else:
                sample = _sample(parameter, running.most)
                running.samples.append((parameter, param, version_of(parameter), sample))
    changed = recorder.optimizers.newly_held(index, names)
    moved = recorder.carried.moved(recorder.names, recorder.parameters) if recorder.full else []
    fields = {
        "update": recorder.update,
        "index": index,
        "cls": shorten(type(optimizer).__name__),
        "lr": rates_of(optimizer),
        "skipped": skipped,
        "no_grad": no_grad,
        "parameters": changed,
        "unowned": unowned if changed else [],
        "eps": _epsilons(optimizer) if changed else [],
        "stray": _strays(optimizer),
        "added": recorder.carried.added_to(index),
        "moved": moved,
        "anew": recorder.optimizers.tell_anew(index),
        "lost_state": recorder.optimizers.tell_lost_state(index),
        "location": recorder.sources.locate_frame(frame),
    }
    # Replayed calls come before the record that makes the checks decide.
    recorder.narrow(lone=lone)
    recorder.pend(OptimizerDraft(recorder.step, recorder.next_seq(), fields, grads))
    if not skipped:
        recorder.stepping = running
    recorder.decide()


def _name(
    recorder: Recorder, parameter: torch.Tensor, grad: torch.Tensor | None
) -> tuple[str, str] | None:
    """(module path, local name); None if no module has the parameter, or none has it any more."""
    known = recorder.parameters.name_of(parameter)
    # What is still there after a replacement has no gradient: only that is worth a look.
    if known is None or (grad is None and recorder.parameters.was_replaced(parameter)):
        return recorder.names.owner_of(parameter)
    return known


def finish_step(recorder: Recorder, running: StepInFlight) -> None:
    """Measure how far the parameters moved; the numbers travel with the next gate."""
    befores: list[torch.Tensor] = []
    afters: list[torch.Tensor] = []
    drafts: list[ParamDraft] = []
    kernel = compiled.kernel
    with quiet():
        for parameter, draft, version, before in running.samples:
            draft.changed = parameter.is_inference() or parameter._version != version
            if kernel is not None and isinstance(before, tuple):
                draft.moved = kernel.moved(parameter, running.most, _RUN, before)
                _, draft.fields["sampled"], draft.numel, _ = before
                continue
            after = _sample(parameter, running.most)
            if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
                continue
            if before.shape != after.shape:
                continue
            draft.fields["sampled"] = before.numel()
            draft.numel = parameter.numel()
            drafts.append(draft)
            befores.append(before)
            afters.append(after)
        norms = _norms([*_differences(afters, befores), *befores]) if drafts else ()
    tickets = recorder.queue.add_scalars(norms) if drafts else []
    for draft, change, weight in zip(drafts, tickets, tickets[len(drafts) :], strict=False):
        draft.change, draft.weight = change, weight
    for _, draft, _, _ in running.samples:
        draft.step, draft.seq = recorder.step, recorder.next_seq()
        recorder.pend(draft)
    recorder.carried.stepped(running.index, running.optimizer)
    recorder.optimizers.stepped(running.index)
    recorder.update += 1
    recorder.rules.optimizer_stepped(running.index)


def _draft_parameter(
    recorder: Recorder, parameter: torch.Tensor, grad: torch.Tensor, fields: dict[str, Any]
) -> ParamDraft:
    table = recorder.tensors
    full = recorder.full
    _, value = table.gradient(parameter, None, measure=full)
    seen = recorder.parameters.gradient_seen(parameter, grad)
    if seen is None:
        # Of what no module has nobody saw the gradient before it was clipped. Where the norm was
        # not finite, a hook has made it so, or another rank: in the backward pass all was well.
        measured = recorder.now.clipped and not recorder.now.clip_spoilt and "module" in fields
        measure = full or not measured
        _, seen = table.gradient(grad, None, measure=measure)
    if full and recorder.optimizers.is_new(fields["optimizer"], fields["name"]):
        table.compare_rows(parameter, value)
        table.compare_rows(grad, seen)
    return ParamDraft(recorder.step, recorder.next_seq(), fields, value, seen)


def _gate_closure(
    recorder: Recorder, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Wrap the closure, so that each evaluation (LBFGS makes many) is seen and gated."""

    def evaluate() -> Any:
        running = recorder.stepping
        if running is not None:
            function_mode.leave_module(running.mode)
        try:
            loss = closure()
        finally:
            if running is not None:
                running.mode = function_mode.enter_module(False)
        if running is not None and not running.begun:
            with Ours(recorder, "optimizers"):
                begin_step(recorder, running.optimizer, running.frame)
        recorder.gate_safely()
        recorder.raise_if_stopped()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluate}
    return (args[0], evaluate, *args[2:]), kwargs


# The values as the compiled kernel copied them, how many, of how many, and the code of their dtype:
# a tenth of the time of torch operators.
_Taken: TypeAlias = tuple[bytes, int, int, int]
_Sample: TypeAlias = torch.Tensor | _Taken


def _sample(parameter: torch.Tensor, most: int) -> _Sample | None:
    """A copy of at most so many elements, evenly strided; None where it cannot be had."""
    kernel = compiled.kernel
    taken: _Taken | None = kernel.sample(parameter, most, _RUN) if kernel is not None else None
    if taken is not None:
        return taken
    with quiet():
        dense = plain(parameter)
        if isinstance(dense, str) or not dense.is_floating_point() or not dense.numel():
            return None
        try:
            flat = dense.view(-1) if dense.is_contiguous() else dense.reshape(-1)
            return _strided(flat, most).clone()
        except RuntimeError:
            return None


def _strided(flat: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many elements, in runs of `_RUN`, evenly spaced; as in _statistics.c."""
    n = flat.numel()
    stride = math.ceil(n / most)
    # An odd spacing meets other columns in each row of a matrix of even width.
    pitch = _RUN * (stride | 1)
    if stride == 1 or n < pitch:
        return flat[:most]
    runs = n // pitch
    return flat[: runs * pitch].view(runs, pitch)[:, :_RUN]


def _differences(left: list[torch.Tensor], right: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    # One call for all: a third of the time of as many of their own, for small parameters.
    return torch._foreach_sub(left, right) if left else ()


def _norms(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The L2 norm of each, accumulated in f32 at least."""
    if all(x.dtype is torch.float32 for x in tensors):
        return torch._foreach_norm(tensors) if tensors else ()
    wide = {torch.float64: torch.float64}
    return [torch.linalg.vector_norm(x, dtype=wide.get(x.dtype, torch.float32)) for x in tensors]


def _epsilons(optimizer: Optimizer) -> list[float | None]:
    """What each group adds to a denominator; nothing if none does."""
    each = [group.get("eps") for group in optimizer.param_groups]
    known = [float(eps) if isinstance(eps, (int, float)) else None for eps in each]
    return known if any(eps is not None for eps in known) else []


def _strays(optimizer: Optimizer) -> dict[str, Scalar]:
    """What a schedule has made NaN or infinite, by group and name. Hot: a microsecond a group."""
    return {
        f"{g}.{name}": to_scalar(number)
        for g, group in enumerate(optimizer.param_groups)
        for name in _SCHEDULED
        for number in _numbers(group.get(name))
        if not math.isfinite(number)
    }


def _numbers(value: Any) -> Sequence[float]:
    """A float or those of a pair; nothing for what is on a device, and for what is no number."""
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, float)]


def rates_of(optimizer: torch.optim.Optimizer) -> list[Scalar | None]:
    """Read the learning rate of each group."""
    return [_rate(group.get("lr")) for group in optimizer.param_groups]


def _rate(lr: Any) -> Scalar | None:
    """A learning rate; None for what is no number, and on a device (reading it would sync)."""
    if isinstance(lr, torch.Tensor):
        return to_scalar(float(lr)) if lr.device.type == "cpu" else None
    return to_scalar(float(lr)) if isinstance(lr, (int, float)) else None
