"""What decides the order in which a loader gives its samples."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tensortrace.capture.generators import state_of
from tensortrace.capture.unwrap import quiet
from tensortrace.signal_handlers import let_through

# Those that draw from a generator. A class derived from one may seed it otherwise.
_DRAWING = frozenset({RandomSampler, SubsetRandomSampler, WeightedRandomSampler})
_PLAIN = frozenset({bool, int, float, str})
# A Subset of a Subset of one; more only where one holds itself.
_MOST_PARTS = 8


class _Met:
    """A sampler: its number, what the dataset held when it began last, and how often that changed.

    What is held is known by its address, so nothing of it is kept alive.
    """

    __slots__ = ("changes", "held", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.changes = 0
        self.held: dict[str, Any] = {}


class Orders:
    """Tells samplers apart; keeps none alive."""

    def __init__(self) -> None:
        self._met: weakref.WeakKeyDictionary[Any, _Met] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def order_of(self, loader: DataLoader[Any]) -> dict[str, str | int]:
        """Say what decides the order of the epoch that is about to begin.

        Asked once an epoch. It reads the 5 kB of a generator's state, and indices and weights as
        the sampler itself will: in a hundredth of the time that loading so many samples takes.

        Returns:
            ``order``: a hash of the sampler's number, of the state of its generator or of the epoch
            of a `DistributedSampler`, of what is drawn from, and of how often an attribute of the
            dataset was replaced; the class of the ``sampler`` and its number, ``sampler_index``.
            Nothing of what does not shuffle, and of other samplers.
        """
        sampler: Any = loader.sampler
        if type(sampler) is not DistributedSampler and type(sampler) not in _DRAWING:
            return {}
        try:
            # A dataset of the user's may be unable to say its length: the loader will tell him.
            decides = _decides(sampler, len(sampler))
            held = _held(loader.dataset)
        except Exception as error:
            let_through(error)
            return {}
        if decides is None:
            return {}
        met = self._met.get(sampler)
        if met is None:
            met = self._met[sampler] = _Met(next(self._count))
        if held != met.held:
            # Another shard in the same dataset: the same indices are of other samples.
            met.held, met.changes = held, met.changes + 1
        told = decides + b"%d %d" % (met.number, met.changes)
        order = hashlib.blake2b(told, digest_size=8).hexdigest()
        return {"order": order, "sampler": type(sampler).__name__, "sampler_index": met.number}


def _decides(sampler: Any, length: int) -> bytes | None:
    if type(sampler) is DistributedSampler:
        told = sampler.seed, sampler.epoch, length
        return repr(told).encode() if sampler.shuffle else None
    with quiet():
        generator = sampler.generator
        state = state_of(torch.default_generator if generator is None else generator)
        drawn = [_told(getattr(sampler, name, ())) for name in ("indices", "weights")]
        return bytes(state.cpu().numpy().tobytes()) + repr((length, drawn)).encode()


def _told(values: Any) -> int:
    return hash(tuple(values.tolist() if hasattr(values, "tolist") else values))


def _held(dataset: Any) -> dict[str, Any]:
    """The attributes of a dataset and of those that it is a part of: numbers and text as such."""
    held: dict[str, Any] = {}
    parts = [("", dataset)]
    for path, part in parts:
        for name, value in getattr(part, "__dict__", {}).items():
            held[path + name] = value if type(value) in _PLAIN else id(value)
            if isinstance(value, Dataset) and len(parts) < _MOST_PARTS:
                parts.append((f"{path}{name}.", value))
    return held
