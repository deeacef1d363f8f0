"""The one place that finds tensors in whatever a module takes or returns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tensortrace.signal_handlers import is_of_handler
from tensortrace.text import shorten

_DEEPEST = 8
_WIDEST = 10_000
_LEAVES = (str, bytes, int, float, bool, complex, type(None), torch.nn.Module)
# What most arguments are: known by type alone, without the way through a class's bases.
_ATOMS = frozenset({str, bytes, int, float, bool, complex, type(None)})


def tensors_in(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """List the tensors in a value with the path to each, such as ``output[0]['hidden'][1]``.

    Tuples (named tuples, structseqs and other subclasses), lists, mappings, dataclasses and plain
    objects that hold tensors as attributes are opened. Nothing of the user's is called except
    ``Mapping.items``; a container that raises while it is read is left closed.
    """
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if type(value) is tuple and len(value) == 1 and isinstance(value[0], torch.Tensor):
        return [(f"{name}[0]", value[0])]  # what most modules are given
    found: list[tuple[str, torch.Tensor]] = []
    if type(value) is tuple:  # the arguments of an op, of which hardly any needs a closer look
        for i, part in enumerate(value):
            if isinstance(part, torch.Tensor):
                found.append((f"{name}[{i}]", part))
            elif type(part) not in _ATOMS:
                _collect(part, f"{name}[{i}]", found, _DEEPEST - 1, {id(value)})
        return found
    _collect(value, name, found, _DEEPEST, set())
    return found


def _collect(
    value: Any, name: str, found: list[tuple[str, torch.Tensor]], depth: int, open_: set[int]
) -> None:
    if isinstance(value, torch.Tensor):
        found.append((name, value))
        return
    kind = type(value)
    if kind in _ATOMS:
        return
    if isinstance(value, _LEAVES) or depth == 0 or len(found) >= _WIDEST or id(value) in open_:
        return
    open_.add(id(value))
    try:
        if kind is tuple or kind is list:
            for i, part in enumerate(value):
                if isinstance(part, torch.Tensor):
                    found.append((f"{name}[{i}]", part))
                else:
                    _collect(part, f"{name}[{i}]", found, depth - 1, open_)
            return
        for label, part in _parts(value, depth):
            _collect(part, name + shorten(label), found, depth - 1, open_)
    except Exception as error:
        if is_of_handler(error):
            raise
        return  # a container of the user's that cannot be read: what was found so far stands
    finally:
        open_.discard(id(value))


def _parts(value: Any, depth: int) -> Iterator[tuple[str, Any]]:  # noqa: PLR0912 one per kind
    # The base class methods: a subclass may have redefined iteration with side effects.
    if isinstance(value, tuple):
        for i, part in enumerate(tuple.__iter__(value)):
            yield f"[{i}]", part
    elif isinstance(value, list):
        for i, part in enumerate(list.__iter__(value)):
            yield f"[{i}]", part
    elif isinstance(value, dict):
        for key, part in list(dict.items(value)):
            yield f"[{key!r}]", part
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            with contextlib.suppress(AttributeError):  # a field that was never set
                yield f".{field.name}", object.__getattribute__(value, field.name)
    elif isinstance(value, Mapping):
        for key, part in list(value.items()):
            yield f"[{key!r}]", part
    elif depth > _DEEPEST - 2:
        for key, part in list(getattr(value, "__dict__", {}).items()):
            if isinstance(part, torch.Tensor):
                yield f".{key}", part
