"""Which variables of a frame a source line has changed."""

from __future__ import annotations

import re
import types
import weakref
from collections.abc import Iterable, Mapping
from inspect import CO_OPTIMIZED
from typing import Any

import torch

from tensortrace.capture.lines.reader import Held, Reader
from tensortrace.capture.lines.values import ATOMS
from tensortrace.capture.tensors import version_of

# What was there before a variable that is new.
NEW = object()
# At module level everything that the file defines is a variable.
_DEFINITIONS = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
# Python changes these by itself.
_PYTHONS = frozenset({
    "__annotations__", "__builtins__", "__conditional_annotations__", "__module__", "__qualname__",
    "__firstlineno__", "__static_attributes__", "__classcell__", "__classdict__",
    "__classdictcell__",
})  # fmt: skip
# What IPython keeps among the variables of the cells: inputs, outputs, and what it offers.
_IPYTHONS = re.compile(r"In|Out|get_ipython|exit|quit|_{1,3}|_i{1,3}|_i?\d+|_[iod]h|_exit_code")

Change = tuple[str, Any, Any]


class Variables:
    """The variables of one frame as they last were.

    Args:
        reader: looks at values.
        code: of the frame; None for expressions.
    """

    __slots__ = (
        "_found", "_is_body", "_order", "_reader", "_skips_definitions", "has_containers", "known",
    )  # fmt: skip

    def __init__(self, reader: Reader, code: types.CodeType | None) -> None:
        self._reader = reader
        # Of a file or a class.
        self._is_body = code is not None and not code.co_flags & CO_OPTIMIZED
        self._skips_definitions = self._is_body and is_file(code)
        names: tuple[str, ...] = ()
        if code is not None:
            names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        self._order: dict[str, int] = {}
        for i, name in enumerate(names):
            self._order.setdefault(name, i)
        self.known: dict[str, Any] = {}
        # Whether one of them may change without being stored: a list, an object.
        self.has_containers = False
        # Names such as `__file__` or `_ih` that were there before, and are no news while they stay.
        self._found: dict[str, Any] | None = None

    def look(self, found: Mapping[str, Any]) -> list[Change]:
        """The variables that are not what they were: name, value, what was known of it. Hot."""
        known, reader = self.known, self._reader
        if self._is_body:
            found = self._without_found(found)
        changes: list[Change] = []
        self.has_containers = False
        for name, value in found.items():
            old = known.get(name, NEW)
            if old is value:
                continue
            if type(old) is Held:
                # Most of what a function holds are tensors: asked here, without a call.
                ref = old.ref
                if ref is not None and value is not None and ref() is value:
                    try:
                        version = value._version  # type: ignore[union-attr] # no None
                    except RuntimeError:
                        version = 0
                    if old.version == version:
                        continue
                elif reader.is_same(old, value):
                    self.has_containers |= ref is None and not old.opaque
                    continue
            self._take(name, value, old, changes)
        if len(known) > len(found) or (self._skips_definitions and changes):
            self.known = {name: kept for name, kept in known.items() if name in found}
        if len(changes) > 1:
            changes.sort(key=self._place)
        return changes

    def look_at(self, found: Mapping[str, Any], names: Iterable[str]) -> list[Change]:
        """The same of some variables of a function only, which were stored. Hot."""
        known = self.known
        changes: list[Change] = []
        for name in names:
            value = found.get(name, NEW)
            old = known.get(name, NEW)
            if old is value or value is NEW:
                continue
            if type(old) is Held and self._reader.is_same(old, value):
                continue
            self._take(name, value, old, changes)
        if len(changes) > 1:
            changes.sort(key=self._place)
        return changes

    def _take(self, name: str, value: Any, old: Any, changes: list[Change]) -> None:
        """Remember a value that is another object than before, or has changed. Hot."""
        kind = type(value)
        if kind in ATOMS:
            self.known[name] = value
            if type(old) is kind and (old == value or (kind is float and _are_nan(old, value))):
                return
            changes.append((name, value, old))
            return
        if kind is torch.Tensor and type(old) is Held and old.ref is not None:
            # What it was is told by its words only.
            old.address, old.version, old.ref = id(value), version_of(value), weakref.ref(value)
            changes.append((name, value, old))
            return
        if self._skips(name, value):
            return
        held = self.known[name] = self._reader.hold(value)
        self.has_containers |= held.ref is None and not held.opaque
        if type(old) is Held:
            held.words = old.words
        changes.append((name, value, old))

    def _without_found(self, found: Any) -> dict[str, Any]:
        """Of a file or a class, what the user's code has put there."""
        if not issubclass(type(found), dict):
            return {}  # a metaclass of the user's has a mapping of its own
        names: dict[str, Any] = dict(dict.items(found))
        if self._found is None:
            is_cell = "get_ipython" in names and "_ih" in names
            self._found = {name: value for name, value in names.items() if _is_special(name)
                           or (is_cell and _IPYTHONS.fullmatch(name))}  # fmt: skip
        there = self._found
        return {
            name: value
            for name, value in names.items()
            if name not in _PYTHONS and (name not in there or there[name] is not value)
        }

    def _skips(self, name: str, value: Any) -> bool:
        if self._skips_definitions:
            return issubclass(type(value), _DEFINITIONS)
        return name.startswith(".")

    def _place(self, change: Change) -> int:
        return self._order.get(change[0], len(self._order))


def is_file(code: types.CodeType | None) -> bool:
    """Whether code is that of a whole file, and not of a class."""
    return code is not None and code.co_name == "<module>"


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _are_nan(x: float, y: float) -> bool:
    return x != x and y != y  # noqa: PLR0124 NaN
