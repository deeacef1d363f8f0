"""What decides the order in which a loader gives its samples."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tensortrace.capture.unwrap import quiet

# Those that draw from a generator. A class derived from one may seed it otherwise.
_DRAWING = frozenset({RandomSampler, SubsetRandomSampler, WeightedRandomSampler})


# So many of a sampler's indices or weights tell whether they were replaced.
_GLANCED = 256


class Orders:
    """Tells samplers apart; keeps none alive."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def order_of(self, loader: DataLoader[Any]) -> dict[str, str]:
        """Say what decides the order of the epoch that is about to begin.

        Asked once an epoch: to hash the state of a generator takes 10 us.

        Returns:
            ``order``: a hash of the sampler's number, of the state of its generator or of the epoch
            of a `DistributedSampler`, and of what is drawn from; and the class of the ``sampler``.
            Nothing of what does not shuffle, and of other samplers.
        """
        sampler = loader.sampler
        try:
            decides = _decides(sampler)
        except Exception:
            return {}  # a dataset that cannot say its length yet: the loader will say so
        if decides is None:
            return {}
        # Another sampler may be of other data.
        number = self._numbers.get(sampler)
        if number is None:
            number = self._numbers[sampler] = next(self._count)
        order = hashlib.blake2b(decides + b"%d" % number, digest_size=8).hexdigest()
        return {"order": order, "sampler": type(sampler).__name__}


def _decides(sampler: Any) -> bytes | None:
    if type(sampler) is DistributedSampler:
        told = sampler.seed, sampler.epoch, len(sampler)
        return repr(told).encode() if sampler.shuffle else None
    if type(sampler) not in _DRAWING:
        return None
    with quiet():
        generator = sampler.generator
        state = torch.get_rng_state() if generator is None else generator.get_state()
        drawn = [_glance(getattr(sampler, name, ())) for name in ("indices", "weights")]
        return bytes(state.cpu().numpy().tobytes()) + repr((len(sampler), drawn)).encode()


def _glance(values: Any) -> list[Any]:
    some = values[:: max(1, len(values) // _GLANCED)]
    return some.tolist() if isinstance(some, torch.Tensor) else list(some)
