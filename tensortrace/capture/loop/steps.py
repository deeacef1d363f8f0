"""Where a step ends: one turn of the user's loop, by the first rule that applies.

1. `t.step()`, once used, and each return of a decorated function or item that it yields.
2. The next batch of a DataLoader, while the loop goes on that asks for batches (`loaders.py`).
3. Elsewhere the next outermost call after an optimizer step, a scaler's skip or a finished
   backward, with grad off after one of the same module, with grad on after an evaluation; if it
   begins another turn of the loop, for a generator and its discriminator have several updates in
   one, and loops inside it before a backward (`backwards.py`).
4. Without modules, the next op after an optimizer step; where updates are written by hand, the next
   graph that is begun after a write.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import torch
from torch import nn

from tensortrace.capture.gradients import is_training
from tensortrace.capture.loop.backwards import Backwards
from tensortrace.capture.loop.loaders import Loaders
from tensortrace.capture.loop.optimizers import Optimizers
from tensortrace.capture.loop.rounds import Frames, Rounds
from tensortrace.capture.source import SourceLines

# Over one batch. A loop that asks for no more, and whose updates are all in loops inside it, would
# be one step for ever.
_MOST_UPDATES = 1000


class StepRules:
    """What the loop has done in the step in flight, and whether what it does next ends that.

    All is asked and told in the thread whose loop is followed, but for what says otherwise. A step
    that holds nothing does not end.
    """

    def __init__(self, optimizers: Optimizers, sources: SourceLines) -> None:
        self._rounds = Rounds(self._is_own)
        self.loaders = Loaders(self._rounds)
        self._backwards = Backwards(self._rounds, sources)
        self._optimizers, self._sources = optimizers, sources
        # Rule 1: whether `t.step()` was used, and whether a function is decorated.
        self.manual = self.decorates = False
        self._ends = True  # unless what is called now is of one turn whatever it is
        # Which optimizers have stepped since a module was called last; whether the loop does
        # without modules, or has turned without one.
        self._moved: set[int] = set()
        self._module_seen, self._without_modules = False, True
        # Of the step in flight: where the user's code called the first and the last module outside
        # every other; modules, by id, that were called so with grad off; whether one was with grad
        # on, whether it holds anything, and what else happened.
        self._first: Frames | None = None
        self._last: Frames = {}
        self._without_grad: set[int] = set()
        self._updates = 0
        self._has_graph = self.holds_call = self.stepped = False
        self._backward_done = self._loader_done = False
        # Whether steps without grad have followed each other since the last call with grad.
        self._judges = False
        # Whether a backward has ended or an optimizer has stepped since a module was called last.
        self._learnt = False
        # Of updates by hand: whether a write is awaited, and whether the next graph ends the step.
        self.awaits_write = self.ends_at_graph = False

    def enter(self, frame: FrameType | None) -> None:
        """A trace begins in a frame of the user's: no loop round that is of its turns."""
        self._rounds.enter(frame)

    def begin_step(self) -> None:
        """Forget what the step before has done."""
        self._first, self._last = None, {}
        self._without_grad.clear()
        self._updates = 0
        self._has_graph = self.holds_call = self.stepped = False
        self._backward_done = self._loader_done = False
        self.awaits_write = self.ends_at_graph = False

    def ends_at_call(self, module: nn.Module) -> bool:
        """Whether the step is over where a module is about to be called outside every other."""
        if not self.holds_call or self.manual or not self._ends:
            return False
        if self._loader_done:
            return True
        if self.stepped or self._backward_done:
            return self._is_next_turn() and not self._is_yet_to_train(module)
        if torch.is_grad_enabled():
            return self._has_judged()
        again = id(module) in self._without_grad and self._is_next_turn()
        ends = again and not self._is_yet_to_train(module)
        self._judges = self._judges or ends
        return ends

    def _is_yet_to_train(self, module: nn.Module) -> bool:
        """Whether a backward of this turn is still to come, as those of the last turns tell.

        Without grad in eval mode the loop that goes round before it judges, unless a teacher is
        asked there, between a forward and its backward.
        """
        done = self.stepped or self._backward_done
        awaited = self._has_graph and not done
        if not awaited and not torch.is_grad_enabled() and not is_training(module):
            return False
        return self._backwards.lie_ahead(
            sys._getframe(2), self._last, done=done, learnt=self._learnt
        )

    def _has_judged(self) -> bool:
        """Whether the step holds an evaluation alone, and the loop has turned since or was left.

        What a turn looks up without grad (a teacher, a target, what a policy does) it learns from
        further on.
        """
        frame = sys._getframe(2)
        if self._has_graph or self.decorates or self.loaders.asking(frame) is not None:
            return False
        if self._judges and self._has_left(frame, self._last):
            return True
        met, turned = self._look_back(frame)
        return met is not None and turned

    def ends_at_closure(self) -> bool:
        """Whether it is where an optimizer steps with a closure: a whole turn may be in that."""
        return self.stepped and not self.manual and self._is_next_turn()

    def ends_at_schedule(self) -> bool:
        """Whether it is where a schedule begins, which goes through a whole turn by itself."""
        return self.holds_call and not self.manual and self._is_next_turn()

    @contextmanager
    def one_turn(self) -> Iterator[None]:
        """All that is called inside is of one turn: the micro-batches of a pipeline's schedule."""
        ends, self._ends = self._ends, False
        try:
            yield
        finally:
            self._ends = ends

    def begins_turn(self) -> None:
        """What may begin a turn is called here: a module outside every other, or a closure."""
        self._last = self._rounds.frames(sys._getframe(1), self._sources.is_user)
        if self._first is None:
            self._first = self._last

    def called(self, module: nn.Module) -> None:
        """A module is called outside every other, in any thread."""
        if torch.is_grad_enabled():
            self._has_graph, self._judges = True, False
        else:
            self._without_grad.add(id(module))
        self._moved.clear()
        self._learnt = False
        self.holds_call, self._module_seen, self._without_modules = True, True, False

    def ends_at_op(self) -> bool:
        """Whether the step is over where an op is about to be called outside modules. Hot."""
        return self.stepped and self._without_modules and not self._is_counted_otherwise()

    def fetched(self, batches: object, frame: FrameType) -> bool:
        """A DataLoader has handed out a batch to the code of a frame: is the step before over?"""
        self.loaders.fetched(batches, frame)
        return self.holds_call and not self.manual

    def loader_ended(self) -> None:
        """A DataLoader has no more batches: what is called next is another turn.

        One that fetches a batch ahead (of accelerate, of a Trainer) has a turn left by then.
        """
        self._loader_done = self.holds_call

    def optimizer_stepped(self, index: int) -> None:
        """An optimizer has stepped, or was skipped by a scaler."""
        self.stepped = self._learnt = True
        self._updates += 1
        if index in self._moved:
            self._without_modules = True
        self._moved.add(index)

    def backward_finished(self, derivative: bool, update: int, followed: bool) -> None:
        """A call of backward(), or of torch.autograd.grad, has returned, in any thread.

        Args:
            derivative: whether it was torch.autograd.grad.
            update: how many optimizer steps came before.
            followed: whether it is the thread whose loop is followed.
        """
        self.holds_call = True
        is_part = derivative and self._optimizers.count_derivative(update)
        self._backward_done = self._backward_done or not is_part
        if not is_part:
            self._learnt = True
        if followed and not is_part:
            self._backwards.remember(sys._getframe(1))

    def graph_freed(self) -> None:
        """A backward has freed its graph: if weights are written now, that is an update by hand."""
        by_hand = not self._module_seen and not self._optimizers.has_met()
        if by_hand and not self._is_counted_otherwise():
            self.awaits_write = True

    def _is_counted_otherwise(self) -> bool:
        """Whether something better than the optimizer says where a step ends."""
        return self.manual or self.decorates or self.loaders.asking(sys._getframe(2)) is not None

    def _is_next_turn(self) -> bool:
        """Whether the loop has turned since the last call, or was left since the first.

        In a loop that asks for batches the next batch says so, whatever loops are inside.
        """
        if self.decorates:
            return False
        frame = sys._getframe(2)
        met, turned = self._look_back(frame)
        asking = self.loaders.asking(frame)
        if asking is not None and self._updates < _MOST_UPDATES:
            # It may have enough of them at some time.
            at = asking.frame
            without = turned and met is at and not asking.always
            return without and self._rounds.of(at.f_code, at.f_lasti) == asking.around
        return turned or self._has_left(frame, self._first or {})

    def _look_back(self, frame: FrameType | None) -> tuple[FrameType | None, bool]:
        """The innermost frame that is further on than at the last call, or whose loop has turned.

        A package that has been called to do a turn, or many, is asked whether it is further on in
        the same turn of its own loop; whether a loop has turned, the program's own code says.

        Returns:
            It, and whether its loop has: what it calls now does not follow within a turn. Without a
            loop in it, it is another frame in the place of one that is gone. True without one.
        """
        rounds = self._rounds
        while frame is not None:
            code, at = self._last.get(id(frame), (None, 0))
            if code is frame.f_code:
                here, own = frame.f_lasti, self._is_own(code)
                if rounds.is_ahead(code, at, here) and (
                    own or rounds.of(code, at) == rounds.of(code, here)
                ):
                    return frame, False
                if own and rounds.of(code, here) is not None:
                    return frame, True
            frame = frame.f_back
        return None, True

    def _has_left(self, frame: FrameType, then: Frames) -> bool:
        """Whether the innermost loop round an earlier call was left, or there was none.

        It is the program's own loop, or without one that of a package which its code has called;
        not that of one which has called its code.
        """
        places = then.items()
        own = [place for place in places if self._is_own(place[1][0])]
        called = itertools.takewhile(lambda place: not self._is_own(place[1][0]), places)
        for number, (code, at) in (*own, *called):
            around = self._rounds.of(code, at)
            if around is not None:
                now = _on_stack(frame, number, code)
                return now is None or now.f_lasti not in around
        return True

    def _is_own(self, code: CodeType) -> bool:
        return self._sources.is_user(code) and self._sources.is_own(code)


def _on_stack(frame: FrameType | None, number: int, code: CodeType) -> FrameType | None:
    """The frame of a number among one and those that called it."""
    while frame is not None:
        if id(frame) == number and frame.f_code is code:
            return frame
        frame = frame.f_back
    return None
