"""Whether a state dict that is loaded holds copies, or the very tensors that it is loaded into."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from tensortrace.capture.tensors import version_of
from tensortrace.capture.unwrap import is_wrapped

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder


class _Taken:
    """What was known when state_dict() returned: steps by optimizer, how often all was written."""

    __slots__ = ("module", "reloaded", "steps", "versions")

    def __init__(self, module: nn.Module, steps: list[int], versions: int) -> None:
        self.module, self.steps, self.versions = weakref.ref(module), steps, versions
        self.reloaded = False


class States:
    """Follows the state dicts that a program keeps; keeps none alive, nor a tensor of one."""

    def __init__(self) -> None:
        # By the first tensor, which is made by state_dict() and stays the same in a dict of another
        # order, a copy of the dict, or what a filter leaves of it.
        self._taken: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def taken(self, recorder: Recorder, module: nn.Module, state: Any) -> None:
        """Note that state_dict() of a module has returned this."""
        first = next(_tensors_of(state), None) if isinstance(state, dict) else None
        if first is not None:
            self._taken[first] = _Taken(module, recorder.optimizers.steps(), _versions_of(state))

    def own(self, recorder: Recorder, module: nn.Module, state: Any) -> dict[str, Any]:
        """Describe, as a state is about to be loaded, what of it is the module's own.

        Returns:
            Nothing if none is. Else ``own``, how many tensors are, and of a state that state_dict()
            was seen to return, ``updates``, the steps since of an optimizer that holds some, and
            ``reloaded``, whether another was loaded since; neither if nobody has written them.
        """
        if not isinstance(state, dict):  # it may read each tensor from a file, whenever asked
            return {}
        held = {name: tensor for name, tensor in _held_by(module) if name in state}
        own = sum(_place(state[name]) == _place(held[name]) is not None for name in held)
        if own < len(held):
            for taken in list(self._taken.data.values()):  # other threads take theirs meanwhile
                taken.reloaded = taken.reloaded or taken.module() is module
        if not own:
            return {}
        taken = next((self._taken[t] for t in _tensors_of(state) if t in self._taken), None)
        return {"own": own, **(_since(recorder, module, state, taken) if taken else {})}


def _since(
    recorder: Recorder, module: nn.Module, state: dict[str, Any], taken: _Taken
) -> dict[str, Any]:
    reached = set(recorder.carried.reached(list(module.parameters())))
    met = [(index, one) for index, one in recorder.optimizers.met() if index in reached]
    # One met since has taken all its steps since; one made anew counts from 0 again.
    steps, before = recorder.optimizers.steps(), dict(enumerate(taken.steps))
    updates = max([0, *(steps[index] - before.get(index, 0) for index, _ in met)])
    # A fused kernel leaves the version of what it writes as it was.
    fused = any(group.get("fused") for _, one in met for group in one.param_groups)
    if taken.versions == _versions_of(state) and not (updates and fused):
        return {"updates": 0, "reloaded": False}
    if not updates and not taken.reloaded:
        return {}  # the loop has written into its place what is to be loaded
    return {"updates": updates, "reloaded": taken.reloaded}


def _tensors_of(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    return (value for value in state.values() if isinstance(value, torch.Tensor))


def _versions_of(state: dict[str, Any]) -> int:
    return sum(map(version_of, _tensors_of(state)))


def _held_by(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of a module by the names that load_state_dict looks for; a tied one has two."""
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _held_by(child, f"{prefix}{name}.")


def _place(value: Any) -> tuple[int, torch.device, torch.Size] | None:
    """Where the elements of a tensor lie; None of what has no memory, or none of its own."""
    if not isinstance(value, torch.Tensor) or is_wrapped(value):
        return None
    try:
        pointer = value.data_ptr() if value.layout is torch.strided else 0
        return (pointer, value.device, value.shape) if pointer else None
    except RuntimeError:
        return None  # fake, lazy, nested, of functorch
