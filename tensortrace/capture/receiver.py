"""What every hook reports to: in a run its `Recorder`, in a replay the `ReplayRecorder`.

A receiver numbers what hooks report and knows what a hook may ask. Of the loop, its threads and its
steps, it is told as well, and does nothing about it: that is the recorder's part.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensortrace.capture.drafts import ActionDraft, Draft
from tensortrace.capture.gradients import Parameters
from tensortrace.capture.loop.optimizers import StepInFlight
from tensortrace.capture.loop.steps import StepRules
from tensortrace.capture.names import ModuleNames
from tensortrace.capture.ops.function_mode import leave_module
from tensortrace.capture.ops.places import Places
from tensortrace.capture.source import SourceLines
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.capture.tensors import TensorTable
from tensortrace.capture.user_hooks import MOST, changing, where_defined
from tensortrace.records import ActionName, Location

if TYPE_CHECKING:
    from tensortrace.capture.cuda_time import DeviceTimes
    from tensortrace.capture.modules import OpenCall
    from tensortrace.capture.roots import Roots

PARTS = (
    "modules", "gradients", "ops", "optimizers", "loop", "gate", "narrow", "exceptions", "lines",
)  # fmt: skip


@dataclass(slots=True)
class ThisStep:
    """What hooks remember of the step in flight, and of no other.

    Attributes:
        backward_seen: whether a gradient came, or a backward has ended, since the last gate.
        clipped: whether gradients were clipped by their norm.
        clip_spoilt: whether one of those norms is known not to be finite.
        loss_scaled: whether the next loss is a multiple of the one that entered a scaler.
        calls: the seqs of all forward calls, by path and class, since a wrapper shares the path of
            what it wraps.
        to_recompute: likewise (seq, nth) of those that no checkpoint has recomputed yet.
        hooks: where the hooks are defined that were put on tensors.
        turns: how often each module was called, by id, in a step that passes calls over.
    """

    backward_seen: bool = False
    clipped: bool = False
    clip_spoilt: bool = False
    loss_scaled: bool = False
    calls: dict[tuple[str, type], list[int]] = field(default_factory=dict)
    to_recompute: dict[tuple[str, type], list[tuple[int, int]]] = field(default_factory=dict)
    hooks: list[Location] = field(default_factory=list)
    turns: dict[int, int] = field(default_factory=dict)


class InFlight(threading.local):
    """The optimizer step that each thread is inside of."""

    step: StepInFlight | None = None


class Receiver:
    """Numbers what happens in a step, and keeps what hooks have to know of each other.

    Args:
        queue: computes statistics.
        names: the module paths.
        sources: finds the user's lines.
        tensors: numbers the tensors.
        places: where ops outside modules are called.
        rules: what the loop has done in this step.
        op_level: whether ops inside modules are recorded too.
        thins_ops: whether ops outside modules are recorded thinly in loops.
        shows_compiled: whether compiled modules run uncompiled here, so that all is seen.
    """

    def __init__(
        self,
        *,
        queue: StatsQueue,
        names: ModuleNames,
        sources: SourceLines,
        tensors: TensorTable,
        places: Places,
        rules: StepRules,
        op_level: bool,
        thins_ops: bool,
        shows_compiled: bool,
    ) -> None:
        self.queue, self.names, self.sources, self.tensors = queue, names, sources, tensors
        self.places, self.rules = places, rules
        self.op_level, self.thins_ops, self.shows_compiled = op_level, thins_ops, shows_compiled
        self.replaying = False
        # Tells the hooks of this receiver from those that an earlier one left on a graph.
        self.serial = time.monotonic_ns()
        self.on = dict.fromkeys(PARTS, True)
        self.parameters = Parameters()
        # The outermost calls that are kept to be run again; None where none is.
        self.roots: Roots | None = None
        # Whether a module was met whose dropout eval() does not reach, as its text says.
        self.may_drop = False
        self.step = self.update = self.seq = 0
        # How many of the numbers of this step ops have that write nothing.
        self.plain = 0
        self._in_flight = InFlight()
        # Of the step in flight:
        self.now = ThisStep()
        self.full = True
        self.sampling = False
        self.passed_over = 0
        self.device_times: DeviceTimes | None = None
        self.on_cuda = False

    def next_seq(self) -> int:
        """The next number in the order of this step."""
        seq = self.seq
        self.seq = seq + 1
        return seq

    def pend(self, draft: Draft) -> None:
        """Take a draft; it becomes a record later."""
        raise NotImplementedError

    def fault(self, part: str, error: Exception) -> None:
        """Our own failure: that part of the tracing stops, and the program goes on."""
        raise NotImplementedError

    def action(
        self,
        name: ActionName,
        *,
        frame: FrameType | None = None,
        location: Location | None = None,
        of: str | None = None,
        optimizer: int | None = None,
        detail: dict[str, Any] | None = None,
        tensor: int | None = None,
    ) -> ActionDraft:
        """Record something that the loop did."""
        self.thread_number()  # it may be a thread's first report
        if frame is not None:
            location = self.sources.locate_frame(frame)
        fields: dict[str, Any] = {
            "update": self.update,
            "action": name,
            "of": of,
            "optimizer": optimizer,
            "location": location,
            "detail": detail or {},
            "tensor": tensor,
        }
        draft = ActionDraft(self.step, self.next_seq(), fields)
        self.pend(draft)
        return draft

    def hook_given(self, tensor: Any, hook: Any) -> None:
        """A hook of the user's is about to be put on a tensor; a parameter is asked for its own."""
        hooks = self.now.hooks
        if len(hooks) < MOST and not isinstance(tensor, nn.Parameter):
            met = where_defined(changing([hook]), self.sources)
            hooks += [location for location in met if location not in hooks]

    def optimizer_running(self) -> bool:
        """Whether an optimizer is inside its step; one that raised there is not any more."""
        stepping = self.stepping
        if stepping is None:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is stepping.frame:
                return True
            frame = frame.f_back
        leave_module(stepping.mode)
        self.stepping = None
        return False

    @property
    def stepping(self) -> StepInFlight | None:
        """The optimizer step that this thread is inside of."""
        return self._in_flight.step

    @stepping.setter
    def stepping(self, step: StepInFlight | None) -> None:
        self._in_flight.step = step

    def live_of(self, serial: int) -> Receiver | None:
        """The receiver with a serial, if that is at work here."""
        return self if self.serial == serial else None

    def guard(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op is about to run; only a replay minds what it is given."""

    def wants(self, path: str) -> bool:
        """Whether the calls of a module are recorded. Hot."""
        return True

    def passes_over(self, module: nn.Module, around: OpenCall) -> bool:
        """Whether a call of a module inside another is left out. Hot."""
        return False

    def turn_of(self, module: nn.Module, seen: int) -> int:
        """How many calls of a module came before this one, of which some may be passed over."""
        return seen

    def owns_thread(self) -> bool:
        """Whether this is the thread that entered the trace."""
        return True

    def thread_number(self) -> int:
        """0 for the thread that entered the trace, 1 and up for others as they are met."""
        return 0

    def note_threads(self) -> None:
        """Several threads may be training."""

    def outermost_call(self, module: nn.Module) -> None:
        """A module is about to be called outside every other."""

    def module_called(self, module: nn.Module, path: str) -> None:
        """A module is called whose calls are recorded. Hot."""

    def take_aliases(self) -> None:
        """Better paths may have been learnt."""

    def op_called(self) -> None:
        """An op is about to be called outside modules."""

    def graph_begins(self) -> None:
        """An op makes a node after weights were written by hand."""

    def loss_seen(self, losses: list[tuple[str, torch.Tensor]], location: Location | None) -> None:
        """Backward is about to run on these tensors."""

    def backward_finished(self, freed: bool, derivative: bool) -> None:
        """A call of backward() has returned, and has freed its graph unless that is still used.

        Args:
            freed: whether it has.
            derivative: whether it was torch.autograd.grad.
        """

    def raise_if_stopped(self) -> None:
        """Raise what `stop_on` asked for, in the thread whose loop is followed. Hot."""
