"""Set a program aside, run one of its module calls again, and put everything back.

Modules get another ``__dict__`` for the time of a replay, and then the very same old one: attribute
order, counters, caches and hooks come back at no risk, and closures over the module see the swap.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._C import (
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.generators import RandomStates, set_state, state_of
from tensortrace.capture.names import unwrapped
from tensortrace.capture.ops.places import writes
from tensortrace.capture.roots import (
    OWN,
    Alias,
    KeptGenerator,
    Root,
    UnkeptError,
    is_constant,
    several_ranks,
)
from tensortrace.capture.tensors import version_of
from tensortrace.capture.user_hooks import is_of_torch
from tensortrace.signal_handlers import let_through
from tensortrace.text import shorten

_HOOK_TABLES = {name for name in nn.Module().__dict__ if "hook" in name}
_SHARED = (
    type(threading.Lock()), type(threading.RLock()), logging.Logger, weakref.ref, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, type, torch.device, torch.dtype,
)  # fmt: skip
_SHARED_NAMES = frozenset({"ProcessGroup", "DeviceMesh"})


class Stage:
    """The stand-ins of one replay.

    `leaves` are those that gradients may go to; `notes` say what is not as it was at entry.
    """

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.leaves: list[torch.Tensor] = []
        self.notes: list[str] = []
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        # The memory of the parameters, and why the replay was given up.
        self.weights: set[int] = set()
        self.refused = ""
        # Stand-in of a tensor of the user's -> that tensor's id in memory; and, of what the call
        # was given, its id in the step: the tensor itself may be gone, and its memory another's.
        self.origins: dict[int, int] = {}
        self.given: dict[int, int] = {}
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        # What `memo` and `weights` know by its id or memory: neither may be given away meanwhile.
        self.alive: list[Any] = []

    def stand_in(self, tensor: torch.Tensor, alias: Alias | None = None) -> torch.Tensor:
        """A copy of a tensor that may be changed; the same copy for the same tensor."""
        key = alias.origin if alias is not None else id(tensor)
        known = self.memo.get(key)
        if known is not None:
            return known  # type: ignore[no-any-return]
        requires_grad = alias.requires_grad if alias is not None else tensor.requires_grad
        is_leaf = alias.is_leaf if alias is not None else tensor.is_leaf
        made = tensor.detach().clone()
        if requires_grad:
            made.requires_grad_(True)
            self.leaves.append(made)
            if not is_leaf:
                # A leaf that requires grad must not be changed in place; the original could be.
                made = made.clone()
        self.memo[key] = made
        self.origins[id(made)] = key
        self.alive.append((tensor, made))
        return made

    def know_given(self, inputs: Sequence[tuple[str, int]]) -> None:
        """Give what the call is given the ids that its record has."""
        ids = dict(inputs)
        given = tensors_in(self.args, "input")
        for key, value in self.kwargs.items():
            given += tensors_in(value, shorten(key))
        self.given = {id(tensor): ids[name] for name, tensor in given if name in ids}

    def restore(self, kept: Any, what: str) -> Any:
        """Build the value back that `roots.keep` kept; `what` names it where it cannot be."""
        if isinstance(kept, Alias):
            kept.check()
            return self.stand_in(kept.tensor, kept)
        if isinstance(kept, KeptGenerator):
            key = id(kept.generator)
            if key not in self.memo:
                stand_in = torch.Generator(kept.generator.device)
                set_state(stand_in, kept.state)
                self.memo[key] = stand_in
            return self.memo[key]
        kind = type(kept)
        if kind is tuple or kind is list:
            return kind(self.restore(part, what) for part in kept)
        if kind is dict:
            return {key: self.restore(part, what) for key, part in kept.items()}
        if isinstance(kept, tuple) and hasattr(kept, "_fields"):
            return tuple.__new__(kind, (self.restore(part, what) for part in kept))
        return self.isolate(kept, f"{what} of type {kind.__name__}")

    def isolate(self, value: Any, what: str) -> Any:
        """Copy a value so that the replay cannot change the user's."""
        if isinstance(value, _SHARED) or type(value).__name__ in _SHARED_NAMES:
            return value
        if is_constant(value):
            return value  # some tuples cannot be made from their parts
        for _, tensor in tensors_in(value, ""):
            if not isinstance(tensor, nn.Parameter) or id(tensor) not in self.memo:
                self.stand_in(tensor)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception as error:
            let_through(error)
            raise UnkeptError(f"{what} cannot be copied ({type(error).__name__})") from error

    def guard(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an op that is about to run.

        A generator that it draws from is remembered with its state. Parameters are not copied, so
        no op may write into them: through ``.data`` a forward can, and no version tells.

        Raises:
            UnkeptError: it would.
        """
        changes = writes(name)
        if changes or "out" in kwargs:
            for target in (args[:1] if changes else (), kwargs.get("out")):
                if any(_memory(tensor) in self.weights for _, tensor in tensors_in(target, "")):
                    self.refused = "its forward writes into a parameter"
                    raise UnkeptError(self.refused)
        generator = kwargs.get("generator")
        known = [one for one, _ in self.generators]
        if isinstance(generator, torch.Generator) and generator not in known:
            self.generators.append((generator, state_of(generator)))


def _memory(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0  # sparse, nested: it has no memory of its own that could be compared


@contextlib.contextmanager
def swapped(root: Root, module: nn.Module) -> Iterator[Stage]:
    """Give every module of a call stand-ins for what it holds, with the values of its entry.

    Raises:
        UnkeptError: something that cannot be copied, or is not what it was.
    """
    stage = Stage()
    modules = [m for m in root.tree.modules if unwrapped(m) is None or m is module]
    stage.memo.update({id(m): m for m in root.tree.modules})
    _stand_in_parameters(stage, modules)
    _stand_in_buffers(stage, root)
    kept = {id(m): a for m, a in zip(root.tree.own, root.attributes, strict=True)}
    training = {id(m): t for m, t in zip(root.tree.modules, root.training, strict=True)}
    new = [_stand_in_dict(stage, m, kept.get(id(m), {}), training[id(m)]) for m in modules]
    stage.args = stage.restore(root.args, "an argument")
    stage.kwargs = stage.restore(root.kwargs, "an argument")
    old: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for each, values in zip(modules, new, strict=True):
            old.append((each, each.__dict__))
            object.__setattr__(each, "__dict__", values)
        yield stage
    finally:
        for each, values in old:
            object.__setattr__(each, "__dict__", values)
        for generator, state in stage.generators:
            set_state(generator, state)


def _stand_in_parameters(stage: Stage, modules: list[nn.Module]) -> None:
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in stage.memo:
                continue
            # Same memory: weights are never copied. Own gradient, no hooks.
            made: torch.Tensor
            if type(parameter) is nn.Parameter:
                made = nn.Parameter(parameter.detach(), parameter.requires_grad)
            else:
                made = parameter.detach().requires_grad_(parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            stage.memo[id(parameter)] = made
            stage.alive.append(made)
            stage.weights.add(_memory(made) or -1)
            if not parameter.is_leaf:  # the program made it, and the step may know of what
                stage.origins[id(made)] = id(parameter)
            if parameter.requires_grad:
                stage.leaves.append(made)


def _stand_in_buffers(stage: Stage, root: Root) -> None:
    for buffer, (value, version) in zip(root.tree.buffers, root.buffers, strict=True):
        if id(buffer) in stage.memo:
            continue
        if value is None and version_of(buffer) != version:
            stage.notes.append("a buffer changed and its value at entry was not kept")
        made = (buffer if value is None else value).detach().clone()
        stage.memo[id(buffer)] = made.requires_grad_(buffer.requires_grad)
        stage.alive.append(made)


def _stand_in_dict(
    stage: Stage, module: nn.Module, kept: dict[str, Any], training: bool
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        what = f"attribute {key!r} of {type(module).__name__}"
        if key == "training":
            values[key] = training
        elif key in ("_parameters", "_buffers"):
            values[key] = type(value)(
                (name, None if held is None else stage.memo.get(id(held), held))
                for name, held in value.items()
            )
        elif key == "_modules":
            values[key] = copy.copy(value)
        elif key in ("_forward_hooks", "_forward_pre_hooks"):
            values[key] = _hooks_of_torch(stage, module, value)
        elif key in _HOOK_TABLES:
            values[key] = type(value)() if key.startswith("_backward") else copy.copy(value)
        elif key == "_compiled_call_impl":
            values[key] = None
        elif key in kept:
            values[key] = stage.restore(kept[key], what)
        elif key in OWN:
            values[key] = value
        else:
            values[key] = stage.isolate(value, what)
    return values


def _hooks_of_torch(stage: Stage, module: nn.Module, hooks: Any) -> Any:
    """Only hooks that torch itself implements run again: pruning, old weight and spectral norm."""
    kept = type(hooks)()
    for key, hook in hooks.items():
        if is_of_torch(hook):
            kept[key] = hook
    if len(kept) != len(hooks):
        stage.notes.append(f"hooks of the user's on {type(module).__name__} do not run again")
    return kept


@contextlib.contextmanager
def as_it_was(root: Root) -> Iterator[None]:
    """Set random states, modes, autocast, grad mode and printing as at entry; then all back."""
    with contextlib.ExitStack() as stack:
        _random_as_it_was(root, stack)
        _modes_as_they_were(stack)
        _global_hooks_off(stack)
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(torch.inference_mode(root.inference))
        stack.enter_context(torch.set_grad_enabled(root.grad_enabled))
        # While the user is inside an autocast block, his cache must not get casts of ours.
        nested = torch.autocast_increment_nesting() > 1
        torch.autocast_decrement_nesting()
        cache = root.cast_cache and not nested
        for device, enabled, dtype in root.autocast:
            stack.enter_context(
                torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            )
        from torch.nn.utils import parametrize

        stack.callback(setattr, parametrize, "_cache", parametrize._cache)
        parametrize._cache = {}
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if several_ranks():
            stack.enter_context(NoCollectives())  # type: ignore[no-untyped-call]
        _silence(stack)
        yield


def _random_as_it_was(root: Root, stack: contextlib.ExitStack) -> None:
    stack.callback(RandomStates().put_back)
    set_state(torch.default_generator, root.rng)
    if root.python_rng is not None:
        random.setstate(root.python_rng)
    if root.numpy_rng is not None:
        sys.modules["numpy"].random.set_state(root.numpy_rng)
    if root.cuda_rng:
        # Every device's comes back: the call may draw where none of its parameters lie.
        for generator in torch.cuda.default_generators:
            stack.callback(set_state, generator, state_of(generator))
        for device, state in root.cuda_rng.items():
            set_state(torch.cuda.default_generators[device], state)


def _modes_as_they_were(stack: contextlib.ExitStack) -> None:
    above = [_pop_torch_function_stack() for _ in range(_len_torch_function_stack())]

    def put_back() -> None:
        while _len_torch_function_stack():
            _pop_torch_function_stack()
        for mode in reversed(above):
            _push_on_torch_function_stack(mode)

    stack.callback(put_back)
    # Where new tensors are made is part of what the forward does.
    for mode in reversed(above):
        if type(mode).__name__ == "DeviceContext":
            _push_on_torch_function_stack(mode)
    stack.enter_context(_disable_current_modes())
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.6
    if top is None or top(True) is not None:
        # Hide the user's; packing to the same tensor would make a cycle.
        hide = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)
        stack.enter_context(hide)


def _global_hooks_off(stack: contextlib.ExitStack) -> None:
    """Take away the global module hooks of the user's; ours stay."""
    for table in (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    ):
        held = list(table.items())
        for key, hook in held:
            if getattr(hook, "__module__", "") != "tensortrace.capture.modules":
                del table[key]
        stack.callback(_refill, table, held)


def _refill(table: dict[Any, Any], held: list[tuple[Any, Any]]) -> None:
    table.clear()
    table.update(held)


def _silence(stack: contextlib.ExitStack) -> None:
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    stack.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.CRITICAL)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")


class NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse to talk to other ranks: the one rank that replays would wait for them for ever."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, unless it is a collective."""
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise UnkeptError("the module talks to other ranks")
        return func(*args, **(kwargs or {}))
