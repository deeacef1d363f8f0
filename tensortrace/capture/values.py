"""Words for the values of variables, with the tensors in them, and stamps that tell them apart.

Nothing of the user's is called but the ``__repr__`` of his own classes, and that no more once it
was slow. Tensors and modules are never asked for theirs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, TypeAlias

import torch
from torch import nn

from tensortrace.capture.tensors import TensorDraft, version_of
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
_OWN_REPR = {list.__repr__, tuple.__repr__, dict.__repr__, set.__repr__, frozenset.__repr__}
_DEEPEST = 4
_MOST_NODES = 400
_MOST_TYPES = 1000
# A repr that takes longer is not asked for again.
_SLOW_NS = 5_000_000
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")

Custom: TypeAlias = tuple[tuple[Callable[[Any], bool], Callable[[Any], str]], ...]
# Pieces of a text: words, and tensors whose own words are made when their statistics are known.
Pieces: TypeAlias = list[str | TensorDraft]
Describe: TypeAlias = Callable[[torch.Tensor], tuple[int, TensorDraft]]


class Kind(IntEnum):
    """How values of a class are looked at."""

    TENSOR, LIST, DICT, SET, FIELDS, OBJECT, REPR, ARRAY, CLOSED = range(9)


class Held:
    """What is kept of a value that is not plain; it keeps no tensor alive."""

    __slots__ = ("address", "opaque", "ref", "refs", "stamp", "version", "words")

    def __init__(self, address: int) -> None:
        self.address = address
        # Of a tensor.
        self.ref: weakref.ref[Any] | None = None
        self.version = 0
        # Of what is the same as long as it is the same object.
        self.opaque = False
        # Of a container: equal as long as its text would be, and the tensors in it.
        self.stamp: Any = None
        self.refs: list[weakref.ref[torch.Tensor]] = []
        # As it was last put into words.
        self.words: Words | None = None


class Words:
    """A text in the making, and the tensors in it as their place in the value and their id."""

    __slots__ = ("limit", "pieces", "tensors", "text")

    def __init__(self, limit: int | None) -> None:
        self.pieces: Pieces = []
        self.tensors: list[tuple[str, int]] = []
        self.limit = limit
        self.text: str | None = None

    def say(self, tell: Callable[[TensorDraft], str]) -> str:
        """The text, once statistics are known; tensors do not count for its limit."""
        if self.text is None:
            told = [piece if isinstance(piece, str) else tell(piece) for piece in self.pieces]
            text = "".join(told)
            if self.limit is not None:
                free = sum(
                    len(words)
                    for words, piece in zip(told, self.pieces, strict=True)
                    if not isinstance(piece, str)
                )
                text = cut(text, self.limit + free)
            self.text, self.pieces = text, []
        return self.text


def cut(text: str, limit: int) -> str:
    """Leave the middle of a text out, as PySnooper does."""
    if len(text) <= limit:
        return text
    left = (limit - 3) // 2
    return f"{text[:left]}...{text[left + 3 - limit :]}"


class Reader:
    """Looks at values.

    Args:
        limit: how many characters a text may have, which is why containers are only looked at at
            both ends; None for no limit.
        custom: pairs of a condition and what makes a text of such a value.
        normalize: whether addresses are left out of texts.
        name_module: the path of a module, if it is known.
    """

    def __init__(
        self,
        limit: int | None,
        custom: Custom = (),
        normalize: bool = False,
        name_module: Callable[[nn.Module], str | None] = lambda module: None,
    ) -> None:
        self.limit, self.custom, self.normalize = limit, custom, normalize
        self.span = 1000 if limit is None else max(8, limit // 6 + 1)
        self._name_module = name_module
        self._kinds: dict[type, Kind] = {}
        self._slow: set[type] = set()

    def kind(self, cls: type) -> Kind:
        """How values of a class are looked at. Hot."""
        kind = self._kinds.get(cls)
        if kind is None:
            if len(self._kinds) > _MOST_TYPES:
                self._kinds.clear()
            kind = self._kinds[cls] = _kind_of(cls)
        return kind

    # ---- telling apart

    def hold(self, value: Any) -> Held:
        """Keep of a value what tells it from another one later. Hot."""
        held = Held(id(value))
        kind = self.kind(type(value))
        if kind is Kind.TENSOR:
            held.version = version_of(value)
            try:
                held.ref = weakref.ref(value)
            except TypeError:
                held.address = -1  # a subclass without weak references is new each time
        elif kind in (Kind.CLOSED, Kind.ARRAY):
            held.opaque = True
        else:
            held.stamp = self._stamp(value, held.refs, [_MOST_NODES], _DEEPEST)
        return held

    def is_same(self, held: Held, value: Any) -> bool:
        """Whether a value is what was held, and unchanged. Hot."""
        if held.address != id(value):
            return False
        if held.ref is not None:
            return held.ref() is value and held.version == version_of(value)  # type: ignore[arg-type]
        if held.opaque:
            return True
        if any(ref() is None for ref in held.refs):
            return False
        return bool(held.stamp == self._stamp(value, [], [_MOST_NODES], _DEEPEST))

    def _stamp(self, value: Any, refs: Any, left: list[int], depth: int) -> Any:
        kind = self.kind(type(value))
        left[0] -= 1
        if kind is Kind.TENSOR:
            try:
                refs.append(weakref.ref(value))
            except TypeError:
                return (object(), 0)  # a subclass without weak references is new each time
            return (id(value), version_of(value))
        if self.custom and self._custom(value) is not None:
            return self._plain(value)
        if kind is Kind.REPR:
            return self._plain(value)
        if kind in (Kind.CLOSED, Kind.ARRAY) or depth == 0 or left[0] <= 0:
            return id(value)
        parts: list[Any] = []
        for key, part in _opened(value, kind, self.span):
            parts.append(key)
            plain = type(part) in ATOMS
            parts.append(part if plain else self._stamp(part, refs, left, depth - 1))
        if kind is Kind.OBJECT and not parts:
            return id(value)
        if kind in (Kind.LIST, Kind.DICT, Kind.SET):
            parts.append(len(value))
        return parts

    # ---- words

    def words(self, value: Any, describe: Describe) -> Words:
        """Put a value into words; each tensor in it is described."""
        words = Words(self.limit)
        try:
            self._tell(value, words, describe, left=[_MOST_NODES])
        except Exception as error:  # a container of the user's that cannot be read
            words.pieces = [f"<{_name(type(value))} that cannot be read: {type(error).__name__}>"]
            words.tensors = []
        return words

    def _tell(
        self, value: Any, words: Words, describe: Describe, *, place: str = "",
        depth: int = _DEEPEST, left: list[int],
    ) -> None:  # fmt: skip
        pieces = words.pieces
        left[0] -= 1
        if isinstance(value, torch.Tensor) and self._custom(value) is None:
            number, draft = describe(value)
            pieces.append(draft)
            words.tensors.append((place, number))
            return
        kind = self.kind(type(value)) if type(value) not in ATOMS else Kind.REPR
        closed = kind in (Kind.REPR, Kind.CLOSED, Kind.ARRAY) or depth == 0 or left[0] <= 0
        if closed or self._custom(value) is not None:
            pieces.append(self._plain(value))
            return
        before, met = len(pieces), len(words.tensors)
        opening, closing = _brackets(value, kind)
        pieces.append(opening)
        end, skipped = None, len(value) - 2 * self.span if kind in (Kind.LIST, Kind.DICT) else 0
        for i, (key, part) in enumerate(_opened(value, kind, self.span)):
            if i:
                pieces.append(", " if skipped <= 0 or i != self.span else ", ..., ")
            label, inner = _label(value, kind, key)
            pieces.append(label if kind is not Kind.DICT else f"{self._plain(key)}: ")
            self._tell(part, words, describe, place=place + inner, depth=depth - 1, left=left)
            end = i
        one = end == 0 and type(value) is tuple
        pieces.append(f",{closing}" if one else closing)
        own = getattr(type(value), "__repr__", None)
        if len(words.tensors) == met and own not in _OWN_REPR:
            # Without tensors in it the user's own words are the better ones.
            pieces[before:] = [self._plain(value)]

    def _custom(self, value: Any) -> Callable[[Any], str] | None:
        for condition, action in self.custom:
            if condition(value):
                return action
        return None

    def _plain(self, value: Any) -> str:
        """The text of a value in which no tensor is looked for; it has one line."""
        cls = type(value)
        action = self._custom(value) if self.custom else None
        if action is None:
            if cls is str or cls is bytes:
                return _string(value, self.limit)
            if _is_of_torch(value, cls):
                return self._torch_text(value)
            if self.kind(cls) is Kind.ARRAY:
                return f"ndarray<{tuple(value.shape)}, {value.dtype}>"
            if cls in self._slow:
                return f"<{_name(cls)}>"
        started = time.perf_counter_ns()
        try:
            text = str((action or repr)(value))
        except Exception as error:
            text = f"<{_name(cls)} whose repr raised {type(error).__name__}>"
        if time.perf_counter_ns() - started > _SLOW_NS:
            self._slow.add(cls)
        text = text.replace("\r", "").replace("\n", "")
        if self.normalize:
            text = _ADDRESS.sub("", text)
        return text if self.limit is None else cut(text, max(self.limit, 5))

    def _torch_text(self, value: Any) -> str:
        path = self._name_module(value) if isinstance(value, nn.Module) else None
        name = _name(type(value))
        return f"<{name} {path}>" if path else f"<{name}>"


def _is_of_torch(value: Any, cls: type) -> bool:
    if isinstance(value, (torch.Tensor, nn.Module)):
        return True
    torchs = cls.__module__.startswith("torch.")
    return torchs and cls not in ATOMS and not isinstance(value, type)


def _kind_of(cls: type) -> Kind:
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
    if dataclasses.is_dataclass(cls):
        return Kind.FIELDS
    if cls.__module__ == "numpy" and cls.__name__ == "ndarray":
        return Kind.ARRAY
    if cls.__module__.startswith("torch."):
        return Kind.CLOSED
    own: Any = getattr(cls, "__repr__", None)
    return Kind.OBJECT if own is object.__repr__ else Kind.REPR


def _opened(value: Any, kind: Kind, span: int) -> Iterator[tuple[Any, Any]]:
    """The parts of a container with their keys; of a long one those at both ends. Hot."""
    # The base class's methods: a subclass may have redefined iteration with side effects.
    if kind is Kind.LIST:
        base: Any = next(b for b in (list, tuple, deque) if isinstance(value, b))
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
        base = set if isinstance(value, set) else frozenset
        yield from enumerate(itertools.islice(base.__iter__(value), 2 * span))
    elif kind is Kind.FIELDS:
        for field in dataclasses.fields(value):
            try:
                yield field.name, object.__getattribute__(value, field.name)
            except AttributeError:
                continue  # never set
    elif kind is Kind.OBJECT:
        for key, part in list(getattr(value, "__dict__", {}).items())[: 2 * span]:
            if isinstance(part, torch.Tensor):
                yield key, part


def _brackets(value: Any, kind: Kind) -> tuple[str, str]:
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
    name = _name(cls)
    if kind is Kind.DICT:
        return f"{name}({{", "})"
    if kind is Kind.SET:
        return f"{name}({{", "})"
    if isinstance(value, deque):
        return f"{name}([", "])"
    return f"{name}(", ")"


def _label(value: Any, kind: Kind, key: Any) -> tuple[str, str]:
    """What stands before a part, and its place in the value."""
    if kind is Kind.LIST:
        names = getattr(type(value), "_fields", None)
        if names is None and type(value).__module__ == "torch.return_types":
            names = getattr(type(value), "__match_args__", None)
        if isinstance(names, tuple) and key < len(names):
            return f"{names[key]}=", f".{names[key]}"
        return "", f"[{key}]"
    if kind is Kind.DICT:
        return "", f"[{_string(key, 60) if isinstance(key, str) else f'{key!r:.60}'}]"
    if kind is Kind.SET:
        return "", f"[{key}]"
    return f"{key}=", f".{key}"


def _string(value: str | bytes, limit: int | None) -> str:
    if limit is not None and len(value) > 2 * limit:
        return f"{value[:limit]!r}...{value[-limit:]!r}"
    return repr(value)


def _name(cls: type) -> str:
    return shorten(cls.__name__, 200)
