"""Where a step ends as far as DataLoaders say: at their next batch, while an iteration goes on.

One batch that is fetched and used again and again (to see whether a model can learn it), or batches
that are kept in a list, have no fetch between two turns. There the calls of modules tell.
"""

from __future__ import annotations

import dis
import weakref
from types import FrameType
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
        # By identity; and whether more batches are known to be asked for.
        self._open: dict[int, tuple[weakref.ref[Any], bool]] = {}
        # Modules called outside every other, by id, and the optimizers that have stepped.
        self._called: set[int] = set()
        self._moved_by: set[int] = set()

    def begin_step(self) -> None:
        """Forget what the step before has done."""
        self._called.clear()
        self._moved_by.clear()

    def fetched(self, batches: Any, frame: FrameType) -> None:
        """An iteration has handed out a batch to the code of a frame."""
        self.seen = True
        ref, goes_on = self._open.get(id(batches), (None, False))
        again = ref is not None and ref() is batches
        if not (again and goes_on):
            self._open[id(batches)] = weakref.ref(batches), again or _is_loop(frame)

    def ended(self, batches: Any) -> None:
        """An iteration has no more batches."""
        self._open.pop(id(batches), None)

    def called(self, module: nn.Module) -> None:
        """A module is called outside every other."""
        self._called.add(id(module))

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

        So does a call of a module that was called in this step, once optimizers have moved all its
        parameters that are trained; not one that is given what the same turn has made (to a
        discriminator, after its own update).
        """
        if id(module) not in self._called or not self._moved_by or not self._is_kept():
            return False
        if any(tensor.requires_grad for _, tensor in tensors_in(args, "input")):
            return False
        return not torch.is_grad_enabled() or optimizers.hold(module, self._moved_by)

    def _is_kept(self) -> bool:
        """Whether batches came and none is to follow: none is asked for by a `for`, or again."""
        self._open = {key: (ref, more) for key, (ref, more) in self._open.items() if ref()}
        return self.seen and not any(more for _, more in self._open.values())


def _is_loop(frame: FrameType) -> bool:
    """Whether what a frame is at is the head of a `for`."""
    code, i = frame.f_code.co_code, frame.f_lasti
    while code[i] == _LONG:  # Python 3.10 says where what belongs to an instruction begins
        i += 2
    return code[i] == _FOR
