"""What values are made of: kinds of classes, the parts of containers, their brackets and labels.

A value is asked for its type alone: `isinstance` may ask its class for more.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from tensortrace.text import shorten

# Kept as they are; an equal value of the same class is the same value.
ATOMS = frozenset({
    int, float, str, bool, complex, bytes, type(None), type(...), torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format, range, slice,
})  # fmt: skip
_CLOSED = (
    nn.Module, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, type, torch.Generator,
)  # fmt: skip


_CONTAINERS = (list, tuple, deque, dict, set, frozenset)


class Kind(IntEnum):
    """How values of a class are looked at."""

    TENSOR, LIST, DICT, SET, FIELDS, OBJECT, REPR, ARRAY, CLOSED = range(9)


def kind_of(cls: type) -> Kind:
    """How values of a class are looked at."""
    if issubclass(cls, torch.Tensor):
        return Kind.TENSOR
    if issubclass(cls, _CLOSED):
        return Kind.CLOSED
    if issubclass(cls, (list, tuple, deque)):
        return Kind.LIST
    if issubclass(cls, dict):
        return Kind.DICT
    if issubclass(cls, (set, frozenset)):
        return Kind.SET
    # `is_dataclass` would ask a metaclass of the user's.
    if any("__dataclass_fields__" in vars(base) for base in cls.__mro__):
        return Kind.FIELDS
    if home(cls) == "numpy" and cls.__name__ == "ndarray":
        return Kind.ARRAY
    if home(cls).startswith("torch."):
        return Kind.CLOSED
    own: Any = getattr(cls, "__repr__", None)
    return Kind.OBJECT if own is object.__repr__ else Kind.REPR


def length(value: Any) -> int:
    """How many parts a list, dict, set or a subclass of one has, without a method of its own."""
    base: Any = next(b for b in _CONTAINERS if issubclass(type(value), b))
    return base.__len__(value)  # type: ignore[no-any-return]


def opened(value: Any, kind: Kind, span: int) -> Iterator[tuple[Any, Any]]:
    """The parts of a container with their keys; of a long one those at both ends. Hot."""
    # The base class's methods: a subclass may have redefined iteration with side effects.
    if kind is Kind.LIST:
        base: Any = next(b for b in (list, tuple, deque) if issubclass(type(value), b))
        n = base.__len__(value)
        if n <= 2 * span:
            yield from enumerate(base.__iter__(value))
            return
        for i in itertools.chain(range(span), range(n - span, n)):
            yield i, base.__getitem__(value, i)
    elif kind is Kind.DICT:
        if dict.__len__(value) <= 2 * span:
            yield from dict.items(value)
            return
        yield from itertools.islice(dict.items(value), span)
        yield from [*itertools.islice(reversed(dict.items(value)), span)][::-1]
    elif kind is Kind.SET:
        base = set if issubclass(type(value), set) else frozenset
        yield from enumerate(itertools.islice(base.__iter__(value), 2 * span))
    elif kind is Kind.FIELDS:
        for field in dataclasses.fields(type(value)):
            try:
                yield field.name, object.__getattribute__(value, field.name)
            except AttributeError:
                continue  # never set
    elif kind is Kind.OBJECT:
        for key, part in list(_attributes(value).items())[: 2 * span]:
            if issubclass(type(part), torch.Tensor):
                yield key, part


def _attributes(value: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}  # slots
    return found if type(found) is dict else {}


def brackets(value: Any, kind: Kind) -> tuple[str, str]:
    """What stands around the parts of a container."""
    cls = type(value)
    own: Any = cls.__repr__
    if cls is list or (kind is Kind.LIST and own is list.__repr__):
        return "[", "]"
    if cls is tuple:
        return "(", ")"
    if cls is dict:
        return "{", "}"
    if cls is set:
        return ("{", "}") if value else ("set(", ")")
    name = name_of(cls)
    if kind is Kind.DICT:
        return f"{name}({{", "})"
    if kind is Kind.SET:
        return f"{name}({{", "})"
    if issubclass(cls, deque):
        longest = deque.__dict__["maxlen"].__get__(value)
        return f"{name}([", ("])" if longest is None else f"], maxlen={longest})")
    return f"{name}(", ")"


def label(value: Any, kind: Kind, key: Any, text: str) -> tuple[str, str]:
    """What stands before a part, and its place in the value; `text` is that of a dict's key."""
    if kind is Kind.LIST:
        names = getattr(type(value), "_fields", None)
        if names is None and home(type(value)) == "torch.return_types":
            names = getattr(type(value), "__match_args__", None)
        if isinstance(names, tuple) and key < len(names):
            return f"{names[key]}=", f".{names[key]}"
        return "", f"[{key}]"
    if kind is Kind.DICT:
        return f"{text}: ", f"[{string_text(key, 60) if isinstance(key, str) else text[:60]}]"
    if kind is Kind.SET:
        return "", f"[{key}]"
    return f"{key}=", f".{key}"


def string_text(value: str | bytes, limit: int | None) -> str:
    """The repr of a string, of a very long one that of both ends."""
    if limit is not None and len(value) > 2 * limit:
        return f"{value[:limit]!r}...{value[-limit:]!r}"
    return repr(value)


def home(cls: type) -> str:
    """The name of the module that a class says it is from."""
    name = getattr(cls, "__module__", "")
    return name if isinstance(name, str) else ""


def name_of(cls: type) -> str:
    """The name of a class, of a length that fits in a text."""
    return shorten(cls.__name__, 200)
