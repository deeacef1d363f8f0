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

        Asked once an epoch, and it reads no more than the 5 kB of a generator's state.

        Returns:
            ``order``: a hash of the sampler's number, of the state of its generator or of the epoch
            of a `DistributedSampler`, and of what is drawn from; and the class of the ``sampler``.
            Nothing of what does not shuffle, and of other samplers.
        """
        sampler: Any = loader.sampler
        if type(sampler) is not DistributedSampler and type(sampler) not in _DRAWING:
            return {}
        try:
            length = len(sampler)
        except Exception:
            return {}  # a dataset of the user's that cannot say its own: the loader will tell him
        decides = _decides(sampler, length)
        if decides is None:
            return {}
        # Another sampler may be of other data.
        number = self._numbers.get(sampler)
        if number is None:
            number = self._numbers[sampler] = next(self._count)
        order = hashlib.blake2b(decides + b"%d" % number, digest_size=8).hexdigest()
        return {"order": order, "sampler": type(sampler).__name__}


def _decides(sampler: Any, length: int) -> bytes | None:
    if type(sampler) is DistributedSampler:
        told = sampler.seed, sampler.epoch, length
        return repr(told).encode() if sampler.shuffle else None
    with quiet():
        generator = sampler.generator
        state = torch.get_rng_state() if generator is None else generator.get_state()
        drawn = [_glance(getattr(sampler, name, ())) for name in ("indices", "weights")]
        return bytes(state.cpu().numpy().tobytes()) + repr((length, drawn)).encode()


def _glance(values: Any) -> list[Any]:
    some = values[:: max(1, -(-len(values) // _GLANCED))]
    return some.tolist() if isinstance(some, torch.Tensor) else list(some)
