"""Outermost module calls, kept until the next gate so that one of them can be run again.

What is kept is cheap: references to the memory of the inputs, versions that prove that nothing
moved, the random state, and copies of the few values that a call changes. A tensor is kept as a
detached alias: it shares the memory and the version, and keeps neither graph nor tensor alive.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensortrace.capture.generators import numpy_has_moved, state_of
from tensortrace.capture.gradients import is_training, own_parameters
from tensortrace.capture.names import unwrapped
from tensortrace.capture.tensors import version_of, versions_of
from tensortrace.capture.unwrap import is_wrapped, quiet
from tensortrace.step_view import MOVED

if TYPE_CHECKING:
    from tensortrace.capture.modules import OpenCall

# Kept for one step, inputs and output gradients together (design: "Numbers to hold").
MOST_BYTES = 256 << 20
MOST_ROOTS = 256
# A larger buffer is not copied; if it changes during the call, the call cannot be run again.
_LARGEST_BUFFER = 65_536
# After so many calls of a module it is known what they move: Python's and NumPy's random states,
# attributes.
_LEARNING = 3
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
_in_backward = torch._C._current_graph_task_id


class UnkeptError(Exception):
    """Says why a call cannot be run again."""


class Alias:
    """A tensor of the user's without its graph: same memory, same version counter.

    One whose operators are code in Python cannot be detached unseen: it is kept itself where it has
    no graph, and else refused.
    """

    __slots__ = ("is_leaf", "origin", "refused", "requires_grad", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.refused: str | None = None
        # A plain one has no class with operators of its own: that is known without asking torch.
        if type(tensor) is torch.Tensor or not is_wrapped(tensor):
            self.tensor = tensor.detach()
        elif not tensor.requires_grad:
            self.tensor = tensor
        else:
            self.refused = f"a {type(tensor).__name__} with a graph cannot be copied"
            self.tensor = torch.empty(0)
        self.origin = id(tensor)
        self.requires_grad = tensor.requires_grad
        try:
            self.is_leaf = tensor.is_leaf
        except RuntimeError:
            # A view made without grad whose base was changed with grad: no graph can hold it.
            self.is_leaf = True
        self.version = version_of(tensor)

    def check(self) -> None:
        """Raise `UnkeptError` if the value is not what it was."""
        if self.refused is not None:
            raise UnkeptError(self.refused)
        if version_of(self.tensor) != self.version:
            raise UnkeptError("an input was modified in place since")
        strided = self.tensor.layout is torch.strided and self.tensor.numel() > 0
        if strided and self.tensor.untyped_storage().nbytes() == 0:
            raise UnkeptError("the memory of an input was freed since")


class Tree:
    """The modules, parameters and buffers below a root, as they were in this step."""

    __slots__ = ("_held", "buffers", "devices", "ids", "is_wrapper", "modules", "own", "parameters")

    def __init__(self, root: nn.Module) -> None:
        self.is_wrapper = is_wrapper(root)
        # By identity: modules may be unhashable, parameters may be shared. One way through the
        # tables, plainly: each outermost call of each step comes here.
        self.ids = {id(root): root}
        self.modules = [root]
        parameters: dict[int, nn.Parameter] = {}
        buffers: dict[int, torch.Tensor] = {}
        for module in self.modules:
            for _, child in module._modules.items():  # a scripted module's table has no values()
                if child is not None and id(child) not in self.ids:
                    self.ids[id(child)] = child
                    self.modules.append(child)
            if module._parameters:
                for parameter in own_parameters(module).values():
                    if parameter is not None:
                        parameters[id(parameter)] = parameter
            if module._buffers:
                for buffer in own_buffers(module):
                    if buffer is not None:
                        buffers[id(buffer)] = buffer
        self._held = self._ids_held()
        self.parameters, self.buffers = list(parameters.values()), list(buffers.values())
        self.devices: set[int] = set()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            held = (*self.parameters, *self.buffers)
            self.devices = {t.device.index for t in held if t.device.type == "cuda"}
        # Those whose plain attributes may change in a call: torch's own layers have none.
        self.own = [m for m in self.modules if not type(m).__module__.startswith("torch.nn.mod")]

    def holds_others(self) -> bool:
        """Whether other tensors are parameters of its modules by now. Hot."""
        return self._ids_held() != self._held

    def _ids_held(self) -> list[int]:
        # A scripted module makes a new tensor at every question.
        tables = [m._parameters for m in self.modules if isinstance(m._parameters, dict)]
        return [id(p) for table in tables for p in table.values()]


def refusal_of(tree: Tree) -> str | None:
    """Why a call of a root with such modules cannot be run again, None if they let it."""
    several = several_ranks()
    for each in tree.modules:
        if isinstance(each, torch.jit.ScriptModule):
            return "a scripted module"
        if type(each).__name__.startswith(("FSDP", "FullySharded")):
            return "sharded parameters"
        if several and isinstance(each, nn.SyncBatchNorm):
            return "SyncBatchNorm talks to other ranks"
    with quiet():  # to ask for the data of a parameter is an operator
        if any(type(p.data) is not torch.Tensor for p in tree.parameters):
            return "parameters of a tensor subclass"
    return None


def several_ranks() -> bool:
    """Whether this process works with others."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


def own_buffers(module: nn.Module) -> Iterable[torch.Tensor | None]:
    """The buffers that a module itself registered. Hot."""
    table: Any = module._buffers
    # A scripted module's table is no dict.
    return table.values() if isinstance(table, dict) else module.buffers(recurse=False)


class Root:
    """What one outermost call had at its entry."""

    __slots__ = (
        "args", "attributes", "autocast", "backward_autocast", "buffers", "cast_cache",
        "closed", "cuda_rng", "dropped", "failed", "given", "grad_enabled", "gradients", "hooked",
        "inference", "kwargs", "may_run_again", "module", "numpy_rng", "parameter_versions", "path",
        "python_rng", "rng", "seq", "training", "tree",
    )  # fmt: skip

    def __init__(self, module: nn.Module, path: str, seq: int, tree: Tree) -> None:
        self.module, self.path, self.seq, self.tree = weakref.ref(module), path, seq, tree
        self.given: Any = None  # the arguments themselves, until the call is over
        self.args: Any = ()
        self.kwargs: Any = {}
        self.dropped: str | None = None
        # Whether a hook of the user's has changed the arguments since they were recorded.
        self.closed = self.failed = self.hooked = False
        # As far as its modules and parameters tell.
        self.may_run_again = False
        # By backward pass: when it came here, and by output name the gradient and its version then.
        self.gradients: dict[int, tuple[int, dict[str, tuple[torch.Tensor, int]]]] = {}
        self.backward_autocast: list[tuple[str, bool, torch.dtype]] = []
        self.rng = state_of(torch.default_generator)
        self.cuda_rng: dict[int, torch.Tensor] = {}
        self.python_rng: Any = None
        self.numpy_rng: Any = None
        self.grad_enabled = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.autocast = autocast_state()
        self.cast_cache = torch.is_autocast_cache_enabled()
        self.parameter_versions = versions_of(tree.parameters)
        self.training = [is_training(m) for m in tree.modules]
        self.buffers: list[tuple[torch.Tensor | None, int]] = []
        self.attributes: list[dict[str, Any]] = []

    def is_as_it_was(self) -> bool:
        """Whether no weight and no input has moved since the call; of one that is dropped, True."""
        if self.dropped is not None:
            return True
        if versions_of(self.tree.parameters) != self.parameter_versions:
            return False
        try:
            for alias in aliases_in((self.args, self.kwargs)):
                alias.check()
        except UnkeptError:
            return False
        return refusal_of(self.tree) is None

    def has_drawn(self) -> bool:
        """Whether torch's random state is another one than at its entry."""
        kept = [(torch.default_generator, self.rng)]
        kept += [(torch.cuda.default_generators[i], rng) for i, rng in self.cuda_rng.items()]
        with quiet():
            return any(
                rng.numel() > 0 and not torch.equal(state_of(generator), rng)
                for generator, rng in kept
            )

    def gradients_until(self, seq: float) -> dict[str, tuple[torch.Tensor, int]]:
        """The gradients of the last backward pass that had come here by then; {} if none had."""
        passes = [grads for at, grads in self.gradients.values() if at <= seq]
        return passes[-1] if passes else {}

    def drop(self, why: str) -> None:
        """Keep nothing of this call but the reason."""
        self.dropped = why
        self.given, self.args, self.kwargs, self.gradients = None, (), {}, {}
        self.buffers, self.attributes = [], []

    def pass_over(self, why: str) -> None:
        """Keep not even the random state: of a step that does not end there are any number."""
        self.drop(why)
        self.rng, self.cuda_rng = torch.empty(0), {}
        self.parameter_versions, self.training = [], []


class Roots:
    """The roots of the step in flight, within bounds."""

    def __init__(self) -> None:
        self._roots: dict[int, Root] = {}
        self._trees: dict[int, Tree] = {}
        self._nbytes = 0
        self._counted: set[int] = set()
        self._moving_buffers: dict[int, bool] = {}
        self._learnt: dict[int, _Learnt] = {}

    def get(self, seq: int) -> Root | None:
        """The root whose call has this number."""
        return self._roots.get(seq)

    def __iter__(self) -> Iterator[Root]:
        return iter(list(self._roots.values()))

    def enter(self, call: OpenCall, module: nn.Module, args: tuple[Any, ...]) -> Root | None:
        """Keep what a call starts from; None for what is no root: wrappers, recomputation. Hot."""
        if _in_backward() != -1 or torch._C._functorch.maybe_current_level() is not None:
            return None
        known = self._trees.get(id(module))
        tree = known or self._trees.setdefault(id(module), Tree(module))
        if tree.is_wrapper:
            return None
        root = Root(module, call.path, call.seq, tree)
        self._roots[call.seq] = root
        if known is not None and known.holds_others():
            # Not kept: they may be parts of a graph, which is nobody's to keep (functional_call).
            root.drop(MOVED[1])
            return root
        if len(self._roots) > MOST_ROOTS:
            root.pass_over(f"more than {MOST_ROOTS} outermost calls in a step")
            return root
        learnt = self._learnt.get(id(module))
        if learnt is None or learnt.module() is not module:
            learnt = self._learnt[id(module)] = _Learnt(module)
            learnt.may_run_again = refusal_of(tree) is None and not several_ranks()
        # A parameter that was not there, or needed no gradient, has no hook yet.
        hooked = [(id(p), p.requires_grad) for p in tree.parameters]
        root.may_run_again = learnt.may_run_again and hooked == learnt.hooked
        learnt.hooked = hooked
        _keep_random_state(root, learnt)
        with quiet():
            root.buffers = [(self._copy_of(b), version_of(b)) for b in tree.buffers]
            root.attributes = [learnt.attributes_of(m) for m in tree.own]
            root.args = keep(args)
        root.given = args
        for alias in aliases_in(root.args):
            self._count(root, alias.tensor)
        return root

    def leave(self, root: Root, args: Any, kwargs: dict[str, Any], failed: bool) -> None:
        """Complete a root at its exit: keyword arguments are known only now. Hot."""
        given, root.given = root.given, None
        root.failed = failed
        try:
            if root.dropped is None:
                self._complete(root, given, args, kwargs)
        finally:
            root.closed = True  # from here on the gate of another thread may let it go

    def _complete(self, root: Root, given: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs or args is not given:
            with quiet():
                root.kwargs = keep(kwargs)
                if args is not given:  # by a hook of the user's: what the forward really got
                    root.args, root.hooked = keep(args), True
            for alias in aliases_in((root.args, root.kwargs)):
                self._count(root, alias.tensor)
            if root.dropped is not None:
                return  # for their memory
        for buffer, (_, version) in zip(root.tree.buffers, root.buffers, strict=True):
            moved = version_of(buffer) != version
            self._moving_buffers[id(buffer)] = moved or self._moving_buffers.get(id(buffer), False)
        module = root.module()
        if module is not None and (learnt := self._learnt[id(module)]).calls < _LEARNING:
            learnt.learn(root)

    def saw_gradient(self, seq: int, name: str, grad: torch.Tensor, now: int) -> None:
        """Keep the gradient that arrives, at `now`, at an output of a root. Hot."""
        root = self._roots.get(seq)
        if root is None or root.dropped is not None or type(grad) is not torch.Tensor:
            return
        root.gradients.setdefault(_in_backward(), (now, {}))[1][name] = (grad, version_of(grad))
        root.backward_autocast = autocast_state()
        self._count(root, grad)

    def release(self, ask: bool = False) -> None:
        """Let everything go: the gate has decided.

        Args:
            ask: whether a replay would have been possible; if not, later calls are not relied on.
        """
        if not self._trees and not self._roots:
            return  # no outermost call since the last time
        for seq, root in list(self._roots.items()):  # other threads enter theirs meanwhile
            if root.closed:
                module = root.module() if ask and root.may_run_again else None
                if module is not None and not root.is_as_it_was():
                    self._learnt[id(module)].may_run_again = False
                root.drop("released")
                self._roots.pop(seq, None)
        self._trees.clear()
        self._counted.clear()
        self._nbytes = 0
        if len(self._moving_buffers) > 100_000:
            self._moving_buffers.clear()
        if len(self._learnt) > MOST_ROOTS:
            alive = [(k, v) for k, v in list(self._learnt.items()) if v.module() is not None]
            self._learnt = dict(alive)

    def _count(self, root: Root, tensor: torch.Tensor) -> None:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return
        try:
            # By storage, as one batch is often given to several calls. Not by address: asking a
            # tensor without memory (a fake one) for that warns.
            key, nbytes = tensor.untyped_storage()._cdata, tensor.nbytes
        except (RuntimeError, NotImplementedError):
            return
        if key not in self._counted:
            self._counted.add(key)
            self._nbytes += nbytes
            if self._nbytes > MOST_BYTES:
                root.drop(f"inputs and output gradients of the step exceed {MOST_BYTES >> 20} MiB")

    def _copy_of(self, buffer: torch.Tensor) -> torch.Tensor | None:
        moves = self._moving_buffers.get(id(buffer), True)
        kept = moves and not is_wrapped(buffer) and buffer.numel() <= _LARGEST_BUFFER
        return buffer.clone() if kept else None


class _Learnt:
    """What the first calls of one root were seen to move."""

    __slots__ = (
        "attributes", "calls", "hooked", "may_run_again", "module", "numpy_moves", "python_moves",
    )  # fmt: skip

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.calls = 0
        self.python_moves = self.numpy_moves = True
        self.may_run_again = False
        self.hooked: list[tuple[int, bool]] = []
        self.attributes: dict[int, set[str]] = {}

    def attributes_of(self, module: nn.Module) -> dict[str, Any]:
        """Keep the attributes of a module that calls change; all of them while that is learnt."""
        values = module.__dict__
        if self.calls < _LEARNING:
            return {k: keep(v, 2) for k, v in values.items() if k not in OWN}
        moving = self.attributes.get(id(module))
        return {k: keep(values[k], 2) for k in moving if k in values} if moving else {}

    def learn(self, root: Root) -> None:
        """Compare what a call left behind with what it started from."""
        first = self.calls == 0
        self.calls += 1
        moved = random.getstate() != root.python_rng
        self.python_moves = moved or (self.python_moves and not first)
        if root.numpy_rng is not None:
            moved = numpy_has_moved(root.numpy_rng)
            self.numpy_moves = moved or (self.numpy_moves and not first)
        for module, kept in zip(root.tree.own, root.attributes, strict=True):
            moving = self.attributes.setdefault(id(module), set())
            now = module.__dict__
            for key, value in kept.items():
                if key not in now or not same(value, now[key]):
                    moving.add(key)
            moving.update(k for k in now if k not in kept and k not in OWN)


def _keep_random_state(root: Root, learnt: _Learnt) -> None:
    learning = learnt.calls < _LEARNING
    if learning or learnt.python_moves:
        root.python_rng = random.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and (learning or learnt.numpy_moves):
        root.numpy_rng = numpy.random.get_state()
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if on_cuda and not torch.cuda.is_current_stream_capturing():
        for device in {torch.cuda.current_device(), *root.tree.devices}:
            root.cuda_rng[device] = state_of(torch.cuda.default_generators[device])


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only hands its arguments on: the root is what it wraps."""
    return unwrapped(module) is not None and type(module).__name__ != "OptimizedModule"


# What every module has; parameters, buffers and children are set aside on their own.
OWN = frozenset(nn.Module().__dict__) | {"_is_hf_initialized"}


def keep(value: Any, depth: int = 6) -> Any:
    """Keep a value as it is now: tensors as aliases, containers rebuilt, the rest by reference."""
    if isinstance(value, torch.Tensor):
        return Alias(value)
    kind = type(value)
    if kind in _PLAIN or depth == 0:
        return value
    if kind is tuple or kind is list:
        return kind(keep(part, depth - 1) for part in value)
    if kind is dict:
        return {key: keep(part, depth - 1) for key, part in value.items()}
    if _is_sequence(kind):
        return tuple.__new__(kind, (keep(part, depth - 1) for part in value))
    if kind is torch.Generator:
        return KeptGenerator(value, state_of(value))
    return value


def _is_sequence(kind: type) -> bool:
    """Whether `keep` rebuilds such: not a class of the user's, which may not have a length."""
    return kind is tuple or kind is list or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def is_constant(value: Any) -> bool:
    """Whether nothing can change a value: numbers, text, and tuples of such, of any class."""
    if not isinstance(value, tuple):
        return type(value) in _PLAIN
    parts = tuple.__iter__(value)  # a class may have no length, or parts of its own
    return not getattr(value, "__dict__", None) and all(map(is_constant, parts))


class KeptGenerator:
    """A generator of the user's and the state that it had."""

    __slots__ = ("generator", "state")

    def __init__(self, generator: torch.Generator, state: torch.Tensor) -> None:
        self.generator, self.state = generator, state


def aliases_in(kept: Any) -> Iterator[Alias]:
    """All aliases in a kept value."""
    if isinstance(kept, Alias):
        yield kept
    elif _is_sequence(type(kept)):
        for part in kept:
            yield from aliases_in(part)
    elif type(kept) is dict:
        for part in kept.values():
            yield from aliases_in(part)


def same(kept: Any, value: Any) -> bool:
    """Whether an attribute still is what was kept of it."""
    if isinstance(kept, Alias):
        return (
            isinstance(value, torch.Tensor)
            and kept.origin == id(value)
            and version_of(value) == kept.version
        )
    if isinstance(kept, KeptGenerator):
        return value is kept.generator and bool(torch.equal(state_of(value), kept.state))
    if type(kept) is not type(value):
        return False
    if _is_sequence(type(kept)):
        return len(kept) == len(value) and all(map(same, kept, value))
    if type(kept) is dict:
        return kept.keys() == value.keys() and all(same(kept[k], value[k]) for k in kept)
    return kept is value or (type(kept) in _PLAIN and kept == value)


def autocast_state() -> list[tuple[str, bool, torch.dtype]]:
    """Autocast as it is now, for each device type; empty while it is off everywhere."""
    if not torch._C._is_any_autocast_enabled():
        return []
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
