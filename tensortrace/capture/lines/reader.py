"""Words for the values of variables, with the tensors in them, and stamps that tell them apart.

Nothing of the user's is called but the ``__repr__`` of his own classes, and that no more once it
was slow, or drew random numbers. Tensors and modules are never asked for theirs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from tensortrace.capture.generators import RandomStates
from tensortrace.capture.lines.values import (
    ATOMS,
    Kind,
    brackets,
    home,
    kind_of,
    label,
    length,
    name_of,
    opened,
    string_text,
)
from tensortrace.capture.tensors import TensorDraft, version_of
from tensortrace.signal_handlers import let_through
from tensortrace.text import without_address

_OWN_REPR = {list.__repr__, tuple.__repr__, dict.__repr__, set.__repr__, frozenset.__repr__}
_UNOPENED = (Kind.REPR, Kind.CLOSED, Kind.ARRAY)
_LONG = (Kind.LIST, Kind.DICT)
_LONGEST_MEMBER = 60
_DEEPEST = 8
_MOST_NODES = 400
_MOST_TYPES = 1000
# A repr that has taken longer twice is not asked for again.
_SLOW_NS = 5_000_000
# After so many it is known whether the repr of a class draws random numbers.
_LEARNING = 3

Custom: TypeAlias = tuple[tuple[Callable[[Any], bool], Callable[[Any], str]], ...]
# Pieces of a text: words, and tensors whose own words are made when their statistics are known.
Pieces: TypeAlias = list[str | TensorDraft]
Describe: TypeAlias = Callable[[torch.Tensor], tuple[int, TensorDraft]]


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
    """A text in the making, and the tensors in it as their place in the value and their id.

    `others` are the members without tensors, as their place and their text.
    """

    __slots__ = ("limit", "others", "pieces", "tensors", "text")

    def __init__(self, limit: int | None) -> None:
        self.pieces: Pieces = []
        self.tensors: list[tuple[str, int]] = []
        self.others: list[tuple[str, str]] = []
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
        self._suspect: set[type] = set()
        self._times_asked: dict[type, int] = {}
        # How many values were met that must not be asked for their own words.
        self._spared = 0

    def kind(self, cls: type) -> Kind:
        """How values of a class are looked at. Hot."""
        kind = self._kinds.get(cls)
        if kind is None:
            if len(self._kinds) > _MOST_TYPES:
                self._kinds.clear()
            try:
                kind = kind_of(cls)
            except Exception as error:
                let_through(error)
                kind = Kind.CLOSED  # a metaclass of the user's
            self._kinds[cls] = kind
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
            try:
                held.stamp = self._stamp(value, held.refs, [_MOST_NODES], _DEEPEST)
            except Exception as error:
                let_through(error)
                held.opaque = True  # it changes while it is read, or cannot be
        return held

    def is_same(self, held: Held, value: Any) -> bool:
        """Whether a value is what was held, and unchanged. Hot."""
        if held.address != id(value):
            return False
        if held.ref is not None:
            return held.ref() is value and held.version == version_of(value)  # type: ignore[arg-type]
        if held.opaque or type(value) in self._slow:
            return True
        if any(ref() is None for ref in held.refs):
            return False
        try:
            return bool(held.stamp == self._stamp(value, [], [_MOST_NODES], _DEEPEST))
        except Exception as error:
            let_through(error)
            return True

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
        for key, part in opened(value, kind, self.span):
            # Other keys have an `==` of the user's.
            parts.append(key if type(key) in ATOMS else id(key))
            plain = type(part) in ATOMS
            parts.append(part if plain else self._stamp(part, refs, left, depth - 1))
        if kind is Kind.OBJECT and not parts:
            return id(value)
        if kind in (Kind.LIST, Kind.DICT, Kind.SET):
            parts.append(length(value))
        return parts

    # ---- words

    def words(self, value: Any, describe: Describe) -> Words:
        """Put a value into words; each tensor in it is described."""
        words = Words(self.limit)
        if type(value) in ATOMS and not self.custom:
            text = self._plain(value)
            words.text = text if self.limit is None else cut(text, self.limit)
            return words
        try:
            self._tell(value, words, describe, left=[_MOST_NODES])
        except Exception as error:  # a container of the user's that cannot be read
            let_through(error)
            words.pieces = [f"<{name_of(type(value))} that cannot be read: {type(error).__name__}>"]
            words.tensors, words.others = [], []
        return words

    def _tell(
        self, value: Any, words: Words, describe: Describe, *, place: str = "",
        depth: int = _DEEPEST, left: list[int],
    ) -> None:  # fmt: skip
        pieces = words.pieces
        left[0] -= 1
        kind = self.kind(type(value))
        if kind is Kind.TENSOR and self._custom(value) is None:
            number, draft = describe(value)
            pieces.append(draft)
            words.tensors.append((place, number))
            return
        if kind in _UNOPENED or self._custom(value) is not None:
            pieces.append(self._plain(value))
            return
        if depth == 0 or left[0] <= 0:
            self._spared += 1
            pieces.append(f"<{name_of(type(value))}>")
            return
        before, met, spared = len(pieces), len(words.tensors), self._spared
        opening, closing = brackets(value, kind)
        pieces.append(opening)
        end, skipped = None, length(value) - 2 * self.span if kind in _LONG else 0
        for i, (key, part) in enumerate(opened(value, kind, self.span)):
            if i:
                pieces.append(", " if skipped <= 0 or i != self.span else ", ..., ")
            text = self._plain(key) if kind is Kind.DICT else ""
            before_it, inner = label(value, kind, key, text)
            pieces.append(before_it)
            held, told, at = len(words.tensors), len(words.others), len(pieces)
            self._tell(part, words, describe, place=place + inner, depth=depth - 1, left=left)
            if len(words.tensors) == held:
                text = "".join(piece for piece in pieces[at:] if isinstance(piece, str))
                words.others[told:] = [(place + inner, cut(text, _LONGEST_MEMBER))]
            end = i
        one = end == 0 and type(value) is tuple
        pieces.append(f",{closing}" if one else closing)
        own = getattr(type(value), "__repr__", None)
        plain = len(words.tensors) == met and self._spared == spared and skipped <= 0
        if plain and own not in _OWN_REPR:
            # Without tensors or modules in it the user's own words are the better ones.
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
                return string_text(value, self.limit)
            if _is_of_torch(value, cls):
                return self._torch_text(value)
            if self.kind(cls) is Kind.ARRAY:
                return f"ndarray<{tuple(value.shape)}, {value.dtype}>"
            if cls in self._slow:
                return f"<{name_of(cls)}>"
        started = time.perf_counter_ns()
        try:
            text = self._asked(value, cls, action or repr)
        except (Exception, SystemExit) as error:
            let_through(error)
            text = f"<{name_of(cls)} whose repr raised {type(error).__name__}>"
        if time.perf_counter_ns() - started > _SLOW_NS and cls not in ATOMS:
            # Once may have been the machine's doing.
            (self._slow if cls in self._suspect else self._suspect).add(cls)
        text = text.replace("\r", "").replace("\n", "")
        if self.normalize:
            text = without_address(text)
        return text if self.limit is None else cut(text, max(self.limit, 5))

    def _asked(self, value: Any, cls: type, action: Callable[[Any], str]) -> str:
        """What the program's own code says of a value: one that draws is asked once, and undone."""
        times = self._times_asked.get(cls, 0)
        if cls in ATOMS or times >= _LEARNING:
            return str(action(value))
        if len(self._times_asked) > _MOST_TYPES:
            self._times_asked.clear()
        self._times_asked[cls] = times + 1
        states = RandomStates()
        try:
            return str(action(value))
        finally:
            if states.put_back():
                self._slow.add(cls)

    def _torch_text(self, value: Any) -> str:
        self._spared += 1
        path = self._name_module(value) if issubclass(type(value), nn.Module) else None
        name = name_of(type(value))
        return f"<{name} {path}>" if path else f"<{name}>"


def _is_of_torch(value: Any, cls: type) -> bool:
    if issubclass(cls, (torch.Tensor, nn.Module)):
        return True
    torchs = home(cls).startswith("torch.")
    return torchs and cls not in ATOMS and not issubclass(cls, type)
