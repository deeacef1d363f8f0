"""Where a step ends as far as DataLoaders say: at their next batch, while an iteration goes on.

One batch that is fetched and used again and again (to see whether a model can learn it), or batches
that are kept in a list, have no fetch between two turns. There the calls of modules tell.
"""

from __future__ import annotations

import dis
import weakref
from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensortrace.capture.flatten import tensors_in

if TYPE_CHECKING:
    from tensortrace.capture.loop.optimizers import Optimizers

_FOR, _LONG = dis.opmap["FOR_ITER"], dis.EXTENDED_ARG


class Loaders:
    """The iterations that have begun and not ended, and what was called and moved in this step.

    `seen` says whether a batch came from any; no iteration is kept alive.
    """

    def __init__(self) -> None:
        self.seen = False
        # Whether more batches are known to be asked for.
        self._open: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        # Where batches were asked for: code, and instruction.
        self._places: set[tuple[CodeType, int]] = set()
        # How many steps are left of an iteration that has ended ahead of them.
        self._ahead = 0
        # Modules called outside every other, by id, those of them that were called with grad, and
        # the optimizers that have stepped.
        self._called: set[int] = set()
        self._trained: dict[int, weakref.ref[nn.Module]] = {}
        self._moved_by: set[int] = set()

    def begin_step(self) -> None:
        """Forget what the step before has done."""
        self._called.clear()
        self._trained.clear()
        self._moved_by.clear()
        self._ahead = max(self._ahead - 1, 0)

    def fetched(self, batches: Any, frame: FrameType) -> None:
        """An iteration has handed out a batch to the code of a frame."""
        self.seen = True
        self._ahead = 0
        goes_on = self._open.get(batches)
        place = frame.f_code, frame.f_lasti
        # A generator that asks for a second batch at another place hands out the first meanwhile.
        is_ahead = goes_on is not None and bool(frame.f_code.co_flags & CO_GENERATOR)
        if not goes_on:
            self._open[batches] = place in self._places or is_ahead or _is_loop(frame)
        self._places.add(place)

    def ended(self, batches: Any, frame: FrameType, holds_call: bool) -> None:
        """An iteration has no more batches for the code of a frame.

        Args:
            holds_call: whether the step in flight has begun. Then a generator that fetches ahead
                has the last batch still to hand out.
        """
        self._open.pop(batches, None)
        is_ahead = frame.f_code.co_flags & CO_GENERATOR and not _is_loop(frame)
        self._ahead = 2 if holds_call and is_ahead else 0

    def called(self, module: nn.Module) -> None:
        """A module is called outside every other."""
        if not self.seen:
            return  # the optimizers tell
        self._called.add(id(module))
        if torch.is_grad_enabled():
            self._trained[id(module)] = weakref.ref(module)

    def stepped(self, index: int) -> None:
        """An optimizer has stepped, or was skipped by a scaler."""
        self._moved_by.add(index)

    def steps_again(self, index: int) -> bool:
        """Whether an optimizer begins its second step over a batch that is kept."""
        return index in self._moved_by and self._is_kept()

    def begins_again(
        self, module: nn.Module, args: tuple[Any, ...], optimizers: Optimizers
    ) -> bool:
        """Whether a call outside every other begins another turn over a batch that is kept.

        So does a call of a module that was called in this step, once optimizers have moved all that
        were called with grad; not one that is given what the same turn has made (to a
        discriminator, after its own update).
        """
        if id(module) not in self._called or not self._moved_by or not self._is_kept():
            return False
        if any(_is_made(tensor) for _, tensor in tensors_in(args, "input")):
            return False
        trained = [known for ref in self._trained.values() if (known := ref()) is not None]
        if torch.is_grad_enabled():
            trained.append(module)
        return all(optimizers.have_moved(each, self._moved_by) for each in trained)

    def _is_kept(self) -> bool:
        """Whether batches came and none is to follow: none is asked for by a `for`, or again."""
        return self.seen and not self._ahead and not any(self._open.values())


def _is_made(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a graph. What a view has is left alone: to ask may build a node."""
    return tensor.requires_grad and (tensor._is_view() or not tensor.is_leaf)


def _is_loop(frame: FrameType) -> bool:
    """Whether what a frame is at is the head of a `for`."""
    code, i = frame.f_code.co_code, frame.f_lasti
    while code[i] == _LONG:  # Python 3.10 says where what belongs to an instruction begins
        i += 2
    return code[i] == _FOR
