"""Whether a loader gives its samples in the order of the time before."""

from __future__ import annotations

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


class Orders:
    """What decided the order in which each sampler was read last; keeps no sampler alive."""

    def __init__(self) -> None:
        self._met: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()

    def begins(self, loader: DataLoader[Any]) -> dict[str, Any]:
        """Note that a loader is about to be read. Once an epoch: hashing a state takes 20 us.

        Returns:
            ``same_order``: how often running its sampler has begun from the same state of its
            generator, or in the same epoch of a `DistributedSampler`, and the class of the
            ``sampler``. Nothing the first time, and of what does not shuffle.
        """
        sampler = loader.sampler
        state = _decides(sampler)
        if state is None:
            return {}
        last, times = self._met.get(sampler, (None, 0))
        times = times + 1 if state == last else 1
        self._met[sampler] = state, times
        return {"same_order": times, "sampler": type(sampler).__name__} if times > 1 else {}


def _decides(sampler: Any) -> int | None:
    """A hash of what the order depends on; None of other samplers, and of those in order."""
    if type(sampler) is DistributedSampler:
        return hash((sampler.seed, sampler.epoch)) if sampler.shuffle else None
    if type(sampler) not in _DRAWING:
        return None
    with quiet():
        generator = sampler.generator
        state = torch.get_rng_state() if generator is None else generator.get_state()
        return hash(state.cpu().numpy().tobytes())
