"""Where a step ends: one turn of the user's loop, by the first rule that applies.

1. `t.step()`, once used, and each return of a decorated function or item that it yields.
2. The next batch of a DataLoader; of batches that are kept, `loaders.py` tells.
3. Without a loader, the next outermost call after an optimizer step, a scaler's skip or a finished
   backward; with grad off the second one of the same module.
4. Without modules, the next op after an optimizer step; where updates are written by hand, the next
   graph that is begun after a write.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from torch import nn

from tensortrace.capture.loop.loaders import Loaders
from tensortrace.capture.loop.optimizers import Optimizers


class StepRules:
    """What the loop has done in the step in flight, and whether what it does next ends that.

    All is asked and told in the thread whose loop is followed, but for what says otherwise. A step
    that holds nothing does not end.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self.loaders = Loaders()
        self._optimizers = optimizers
        # Rule 1: whether `t.step()` was used, and whether a function is decorated.
        self.manual = self.decorates = False
        self._module_seen = False
        # Of the step in flight: modules, by id, that were called outermost with grad off; whether
        # it holds anything, and what else happened.
        self._without_grad: set[int] = set()
        self.holds_call = self.stepped = False
        self._backward_done = self._loader_done = False
        # Of updates by hand: whether a write is awaited, and whether the next graph ends the step.
        self.awaits_write = self.ends_at_graph = False

    def begin_step(self) -> None:
        """Forget what the step before has done."""
        self.loaders.begin_step()
        self._without_grad.clear()
        self.holds_call = self.stepped = False
        self._backward_done = self._loader_done = False
        self.awaits_write = self.ends_at_graph = False

    def ends_at_call(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the step is over where a module is about to be called outside every other."""
        if not self.holds_call:
            return False
        if self._loader_done and not self.manual:
            return True
        if not self._is_counted_otherwise():
            again = not torch.is_grad_enabled() and id(module) in self._without_grad
            return self.stepped or self._backward_done or again
        if self.manual or self.decorates or not self.stepped:
            return False
        return self.loaders.begins_again(module, args, self._optimizers)

    def called(self, module: nn.Module) -> None:
        """A module is called outside every other, in any thread."""
        if not torch.is_grad_enabled():
            self._without_grad.add(id(module))
        self.holds_call = self._module_seen = True

    def ends_at_op(self) -> bool:
        """Whether the step is over where an op is about to be called outside modules. Hot."""
        return self.stepped and not self._module_seen and not self._is_counted_otherwise()

    def ends_at_closure(self, index: int) -> bool:
        """Whether it is where an optimizer steps with a closure: a whole turn may be in that."""
        if not self._is_counted_otherwise():
            return self.stepped
        return not (self.manual or self.decorates) and self.loaders.steps_again(index)

    def fetched(self, batches: object, frame: FrameType) -> bool:
        """A DataLoader has handed out a batch to the code of a frame: is the step before over?"""
        self.loaders.fetched(batches, frame)
        return self.holds_call and not self.manual

    def loader_ended(self, batches: object, frame: FrameType) -> None:
        """A DataLoader has no more batches: what is called next is another turn.

        One that fetches a batch ahead (of accelerate, of a Trainer) has a turn left by then.
        """
        self.loaders.ended(batches, frame, self.holds_call)
        self._loader_done = self.holds_call

    def optimizer_stepped(self, index: int) -> None:
        """An optimizer has stepped, or was skipped by a scaler."""
        self.stepped = True
        self.loaders.stepped(index)

    def backward_finished(self, derivative: bool, update: int) -> None:
        """A call of backward(), or of torch.autograd.grad, has returned, in any thread.

        Args:
            derivative: whether it was torch.autograd.grad.
            update: how many optimizer steps came before.
        """
        self.holds_call = True
        is_part = derivative and self._optimizers.count_derivative(update)
        self._backward_done = self._backward_done or not is_part

    def graph_freed(self) -> None:
        """A backward has freed its graph: if weights are written now, that is an update by hand."""
        by_hand = not self._module_seen and not self._optimizers.has_met()
        if by_hand and not self._is_counted_otherwise():
            self.awaits_write = True

    def _is_counted_otherwise(self) -> bool:
        """Whether something better than the optimizer says where a step ends."""
        return self.manual or self.decorates or self.loaders.seen
