"""Module paths: fixed at first use, as `named_modules()` would give them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tensortrace.capture.gradients import own_parameters
from tensortrace.capture.repeated import repeated
from tensortrace.text import shorten

# Attributes by which wrappers hold what they wrap (DataParallel and DDP, compile, FSDP1,
# checkpoint_wrapper): they are no part of a user's path.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = frozenset({"DataParallel", "DistributedDataParallel"})


class ModuleNames:
    """Give every module a path and keep it; keyed by identity, since a module may be unhashable.

    Args:
        model: the module whose paths are the plain ones, if the user named it.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._paths: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._rooted = model is not None
        self._classes: dict[str, list[weakref.ref[nn.Module]]] = {}
        self._walked: dict[int, int] = {}
        # Paths of modules that ran inside another and that its root does not hold.
        self.unregistered: set[str] = set()
        # By the path of what its container holds several times running: how often.
        self.places: dict[str, int] = {}
        self._aliases: dict[str, str] = {}
        self._fresh_aliases: list[tuple[str, str]] = []
        # Owners of parameters by identity, as of when so many modules were known.
        self._owners: dict[int, tuple[weakref.ref[nn.Module], str, str]] = {}
        self._owners_as_of = 0
        if model is not None:
            self._name_tree(model, "")

    def known(self, module: nn.Module) -> str | None:
        """The path of a module that has one. Hot."""
        entry = self._paths.get(id(module))
        return entry[1] if entry is not None and entry[0]() is module else None

    def owner_of(self, parameter: torch.Tensor) -> tuple[str, str] | None:
        """(module path, local name) of a parameter that any module with a path holds.

        For those that no hook names: frozen ones, and those of modules that are never called.
        """
        found = self._owner(parameter)
        if found is None and len(self._paths) != self._owners_as_of:
            self._owners_as_of = len(self._paths)
            self._owners.clear()
            for ref, path in list(self._paths.values()):
                module = ref()
                if module is not None:
                    for name, own in own_parameters(module).items():
                        self._owners.setdefault(id(own), (ref, path, name))
            found = self._owner(parameter)
        return found

    def _owner(self, parameter: torch.Tensor) -> tuple[str, str] | None:
        ref, path, name = self._owners.get(id(parameter), (None, "", ""))
        module = ref() if ref is not None else None
        if module is None or own_parameters(module).get(name) is not parameter:
            return None
        return path, name

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the modules that have a path, with its full name."""
        for ref, path in list(self._paths.values()):
            module = ref()
            if module is not None:
                for name, own in own_parameters(module).items():
                    if own is not None:
                        yield f"{path}.{name}" if path else name, own

    def name_outermost(self, module: nn.Module) -> str:
        """Name a module that was called outside every other module, and all that it holds."""
        if not self._rooted:
            self._rooted = True
            self._name_tree(module, "")
            return ""
        path = self._path_of_wrapped(module)
        if path is None:
            path = self._numbered(shorten(type(module).__name__), module)
        self._name_tree(module, path)
        return self.known(module) or path

    def _path_of_wrapped(self, module: nn.Module) -> str | None:
        """The path of what a wrapper (DDP, a compiled module) holds, if that ran before."""
        while (inner := unwrapped(module)) is not None:
            path = self.known(inner)
            if path is not None:
                return path
            module = inner
        return None

    def take_aliases(self) -> list[tuple[str, str]]:
        """(path, better path) pairs learnt since the last call."""
        fresh, self._fresh_aliases = self._fresh_aliases, []
        return fresh

    def name_inside(self, module: nn.Module, root: nn.Module, parent_path: str, step: int) -> str:
        """Name a module called inside another: added to the root since, or not registered."""
        if self._walked.get(id(root)) != step:
            # Once a step at most: a program that makes modules in forward would walk at every call.
            self._walked[id(root)] = step
            path = self._in_tree(module, root)
            if path is not None:
                return path
        cls = shorten(type(module).__name__)
        path = self._numbered(f"{parent_path}.{cls}" if parent_path else cls, module)
        if path not in self.unregistered:
            # Before it is said for the first time: it may be new since the walk of this step.
            known = self._in_tree(module, root)
            if known is not None:
                return known
            self.unregistered.add(path)
        self._name_tree(module, path)
        return self.known(module) or path

    def _in_tree(self, module: nn.Module, root: nn.Module) -> str | None:
        """Name all that a root holds by now; the path of a module, if it is among that."""
        root_path = self.known(root)
        if root_path is not None:
            self._name_tree(root, root_path)
        return self.known(module)

    def _numbered(self, path: str, module: nn.Module) -> str:
        """Add ``#2`` if another living module has this path."""
        holders = self._classes.setdefault(path, [])
        for i, ref in enumerate(holders):
            if ref() is None:
                holders[i] = weakref.ref(module)
                return path if i == 0 else f"{path}#{i + 1}"
        holders.append(weakref.ref(module))
        return path if len(holders) == 1 else f"{path}#{len(holders)}"

    def _name_tree(self, root: nn.Module, root_path: str) -> None:
        for path, module in walk(root, root_path):
            known = self.known(module)
            if known is None:
                self._paths[id(module)] = (weakref.ref(module, self._dropper(id(module))), path)
                for name, times in repeated(module, root):
                    self.places[shorten(f"{path}.{name}" if path else name)] = times
            elif known != path and known not in self._aliases:
                self._aliases[known] = path
                self._fresh_aliases.append((known, path))

    def _dropper(self, key: int) -> _Dropper:
        return _Dropper(self._paths, key)


class _Dropper:
    """Forget a dead module's path. Holds the table only, so that it keeps nothing else alive."""

    __slots__ = ("key", "paths")

    def __init__(self, paths: dict[int, tuple[weakref.ref[nn.Module], str]], key: int) -> None:
        self.paths, self.key = paths, key

    def __call__(self, ref: weakref.ref[nn.Module]) -> None:
        entry = self.paths.get(self.key)
        if entry is not None and entry[0] is ref:
            del self.paths[self.key]


def unwrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None if the module is no wrapper."""
    # A scripted module's table is no dict, and scripted modules wrap nothing.
    table: Any = module._modules
    if not isinstance(table, dict):
        return None
    for cls in type(module).__mro__:  # any() takes twice as long
        if cls.__name__ in _PARALLEL:
            return table.get("module")
    if _WRAPPERS.isdisjoint(table):
        return None
    return next((table[name] for name in _WRAPPERS if name in table), None)


def walk(root: nn.Module, root_path: str) -> Iterator[tuple[str, nn.Module]]:
    """Visit each module of a tree once, in registration order, wrappers stripped from paths."""
    seen: set[int] = set()
    stack = [(root_path, root)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        inner = unwrapped(module)
        for name, child in reversed(list(module._modules.items())):
            if child is None:
                continue
            if child is inner:
                stack.append((path, child))
            else:
                stack.append((shorten(f"{path}.{name}" if path else name), child))
