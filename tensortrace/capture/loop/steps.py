"""Where a step ends: one turn of the user's loop, by the first rule that applies.

1. `t.step()`, once used, and each return of a decorated function or item that it yields.
2. The next batch of a DataLoader, while the loop goes on that asks for batches (`loaders.py`).
3. Elsewhere the next outermost call after an optimizer step, a scaler's skip or a finished
   backward, with grad off after one of the same module, with grad on after an evaluation; if it
   begins another turn of the loop, for a generator and its discriminator have several updates in
   one, and a fixed point or a game has many calls without grad before its backward.
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
from tensortrace.capture.loop.loaders import Loaders
from tensortrace.capture.loop.optimizers import Optimizers
from tensortrace.capture.loop.rounds import Frames, Rounds
from tensortrace.capture.source import SourceLines

# Over one batch. A loop that asks for no more, and whose updates are all in loops inside it, would
# be one step for ever.
_MOST_UPDATES = 1000
# In one loop: a turn of some networks with a loss each.
_MOST_BACKWARDS = 8


class StepRules:
    """What the loop has done in the step in flight, and whether what it does next ends that.

    All is asked and told in the thread whose loop is followed, but for what says otherwise. A step
    that holds nothing does not end.
    """

    def __init__(self, optimizers: Optimizers, sources: SourceLines) -> None:
        self._rounds = Rounds(self._is_own)
        self.loaders = Loaders(self._rounds)
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
        # Where backward was called, in whatever step: by the way to it, the last one last.
        self._backwards: dict[tuple[tuple[int, int], ...], Frames] = {}
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

        What goes round before it is a loop inside the turn: it looks for a fixed point, plays a
        game, goes on from what a model has learnt. In eval mode it judges, but for a teacher that
        is asked between a forward and its backward.
        """
        done = self.stepped or self._backward_done
        awaited = self._has_graph and not done
        if not awaited and not torch.is_grad_enabled() and not is_training(module):
            return False
        places = list(self._backwards.values())
        if done:
            del places[-1:]  # it is that of this step
        frame = sys._getframe(2)
        return any(self._comes_to(frame, place) for place in places)

    def _comes_to(self, frame: FrameType | None, backward: Frames) -> bool:
        """Whether the turn comes to a backward for sure, from a loop inside it that has none."""
        parting, at, inside = self._parting(frame, backward)
        if parting is None:
            return False
        code, now, rounds = parting.f_code, parting.f_lasti, self._rounds
        last, then = self._last.get(id(parting), (None, 0))
        if last is not code:
            return False
        # In the same call of a function as before it goes on, if nothing was learnt meanwhile.
        goes_on = rounds.call(code, now) == rounds.call(code, then) and inside and not self._learnt
        if not (goes_on or rounds.stays(code, then, now, at)):
            return False
        around = rounds.of(code, now)
        loops = [(code, around)] if around is not None and at not in around else []
        for each in inside:
            around = rounds.of(each.f_code, each.f_lasti)
            loops += [(each.f_code, around)] if around is not None else []
        trained = [place for frames in self._backwards.values() for place in frames.values()]
        if not loops or any(c is code and i in loop for code, loop in loops for c, i in trained):
            return False
        return rounds.comes_to(code, now, at)

    def _parting(
        self, frame: FrameType | None, backward: Frames
    ) -> tuple[FrameType | None, int, list[FrameType]]:
        """Where the way to what is called now parts from the one to an earlier backward.

        Returns:
            The innermost frame of both, None unless the innermost loop round that backward goes
            round this call, too; where in it the backward was called; the frames inside it.
        """
        places, inside = list(backward.items()), []
        below = list(itertools.takewhile(lambda place: not self._goes_round(*place[1]), places))
        if len(below) == len(places):
            return None, 0, []
        number, (code, at) = places[len(below)]
        while frame is not None and (id(frame) != number or frame.f_code is not code):
            if self._sources.is_user(frame.f_code):
                inside.append(frame)
            frame = frame.f_back
        if frame is None or frame.f_lasti not in (self._rounds.of(code, at) or ()):
            return None, 0, []
        call = self._rounds.call
        while below and inside and call(code, frame.f_lasti) == call(code, at):
            code, at = below.pop()[1]
            frame = inside.pop()
            if frame.f_code is not code:
                return None, 0, []
        return frame, at, inside

    def _goes_round(self, code: CodeType, at: int) -> bool:
        return self._is_own(code) and self._rounds.of(code, at) is not None

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
            self._remember(self._rounds.frames(sys._getframe(1), self._sources.is_user))

    def _remember(self, backward: Frames) -> None:
        """Remember where a backward was called, of a few."""
        way = tuple((id(code), at) for code, at in backward.values())
        self._backwards.pop(way, None)
        if len(self._backwards) >= _MOST_BACKWARDS:
            del self._backwards[next(iter(self._backwards))]
        self._backwards[way] = backward

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
