"""One outermost call run again at op level, on stand-ins, under a recorder of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.active import here, slot
from tensortrace.capture.drafts import Draft
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.loop.steps import StepRules
from tensortrace.capture.names import unwrapped
from tensortrace.capture.ops import function_mode
from tensortrace.capture.receiver import Receiver
from tensortrace.capture.replay.aside import Stage, as_it_was, swapped
from tensortrace.capture.roots import Root, UnkeptError
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.capture.tensors import TensorDraft, TensorTable, version_of
from tensortrace.signal_handlers import is_of_handler

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder

# What a replay may take of the log.
_MOST_RECORDS = 20_000


class Replay:
    """One replay: the same hooks report to a recorder of its own.

    Args:
        inputs: names and ids of what the call was given.
        until: the seq of the first bad backward call; of several passes that one is repeated.
    """

    def __init__(
        self,
        live: Recorder,
        root: Root,
        inputs: Sequence[tuple[str, int]],
        until: float = math.inf,
    ) -> None:
        self.root, self.inputs, self.until = root, inputs, until
        self.queue = StatsQueue("full", live.queue.devices)
        self.queue.locates = True
        self.recorder = ReplayRecorder(live, self.queue)
        self.error: Exception | None = None

    @property
    def drafts(self) -> list[Draft]:
        """What the hooks reported."""
        return self.recorder.taken

    def run(self, phase: str) -> None:
        """Run the call, and its backward if that is asked for.

        Raises:
            UnkeptError: the call cannot be run again, or not without touching the user's program.
        """
        module = self.root.module()
        assert module is not None
        while (inner := unwrapped(module)) is not None:
            module = inner
        live, stack, busy = slot.recorder, here.stack, here.busy
        try:
            with swapped(self.root, module) as stage, as_it_was(self.root):
                stage.know_given(self.inputs)
                self.recorder.use(stage)
                with torch._C._EnableTorchFunction():
                    here.stack, here.busy, slot.recorder = [], 0, self.recorder
                    function_mode.mode_on()
                    try:
                        output = module(*stage.args, **stage.kwargs)
                        if phase == "backward" and not stage.refused:
                            self._backward(output, stage)
                    except UnkeptError:
                        raise
                    except Exception as error:
                        if is_of_handler(error):
                            raise
                        self.error = error
                    finally:
                        function_mode.mode_off()
                        here.stack, here.busy, slot.recorder = stack, busy, live
                # The forward may have caught it.
                if stage.refused:
                    raise UnkeptError(stage.refused)
        finally:
            here.stack, here.busy, slot.recorder = stack, busy, live
            self.recorder.parameters.remove()
            self.recorder.live.tensors.continue_from(self.recorder.table)

    def _backward(self, output: Any, stage: Stage) -> None:
        listed = output if isinstance(output, (tuple, list)) else (output,)
        named = dict(tensors_in(listed, "output"))
        arrived = self.root.gradients_until(self.until)
        if not arrived:
            raise UnkeptError("no gradient of its output was seen")
        pairs = [(named[name], grad) for name, (grad, _) in arrived.items() if name in named]
        outputs = tuple(tensor for tensor, _ in pairs if tensor.requires_grad)
        grads = tuple(grad.clone() for tensor, grad in pairs if tensor.requires_grad)
        if not outputs:
            raise UnkeptError("no output of the replay requires a gradient")
        # With inputs given nothing accumulates, and no path to a leaf of the user's is run.
        # Reentrant checkpointing forbids inputs: then every leaf must be a stand-in.
        inputs: tuple[torch.Tensor, ...] = tuple(stage.leaves)
        if any("CheckpointFunction" in name for name in _node_names(outputs)):
            if self.recorder.table.met_foreign_leaf:
                raise UnkeptError("a reentrant checkpoint with tensors from outside the module")
            inputs = ()
        with contextlib.ExitStack() as stack:
            # Backward mostly runs outside autocast, whatever the forward did.
            for device, enabled, dtype in self.root.backward_autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            # Not torch.autograd.grad: a function mode handles that with itself off, and what a
            # checkpoint recomputes would not be seen.
            torch.autograd.graph._engine_run_backward(
                outputs, grads, False, False, inputs, allow_unreachable=True,
                accumulate_grad=not inputs,
            )  # fmt: skip


class ReplayRecorder(Receiver):
    """What the hooks report to during a replay: nothing of the loop, no gates, a list of drafts."""

    def __init__(self, live: Recorder, queue: StatsQueue) -> None:
        self.table = ReplayTable(queue, live.tensors)
        super().__init__(
            queue=queue,
            names=live.names,
            sources=live.sources,
            tensors=self.table,
            places=live.places,
            rules=StepRules(live.optimizers, live.sources),
            op_level=True,
            thins_ops=False,
            shows_compiled=live.shows_compiled,
        )
        self.replaying = True
        self.live = live
        self.step, self.update = live.step, live.update
        self.stage: Stage | None = None
        self.taken: list[Draft] = []
        self.failed: Exception | None = None

    def use(self, stage: Stage) -> None:
        """Know the stand-ins of the replay."""
        self.stage = self.table.stage = stage

    def next_seq(self) -> int:
        """Numbers go on where the step's own are."""
        return self.live.next_seq()

    def pend(self, draft: Draft) -> None:
        """Keep a draft, within the bound of a replay."""
        if len(self.taken) < _MOST_RECORDS:
            self.taken.append(draft)

    def guard(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op is about to run: remember the generator that it draws from, spare the weights."""
        if self.stage is not None:
            self.stage.guard(name, args, kwargs)

    def fault(self, part: str, error: Exception) -> None:
        """A failure of ours ends the replay, not the tracing."""
        if is_of_handler(error):
            raise error
        self.on[part] = False
        self.failed = self.failed or error

    def live_of(self, serial: int) -> Receiver | None:
        """Other threads go on meanwhile, in calls that the run in flight knows."""
        return super().live_of(serial) or self.live.live_of(serial)


class ReplayTable(TensorTable):
    """Numbers the tensors of a replay; a stand-in has the id of what it stands for."""

    def __init__(self, queue: StatsQueue, live: TensorTable) -> None:
        super().__init__(queue)
        self._live = live
        self.stage: Stage | None = None
        self.met_foreign_leaf = False
        self.continue_from(live)

    def identify(
        self, tensor: torch.Tensor, measure: bool = True
    ) -> tuple[int, TensorDraft | None]:
        """As `TensorTable.identify`; notes leaves that are no stand-ins."""
        stage = self.stage
        if stage is not None:
            if tensor.is_leaf and tensor.requires_grad:
                # Without grad a view of a leaf is a leaf too, and so is one of what is none.
                origin = tensor if tensor._base is None else tensor._base
                self.met_foreign_leaf |= origin.is_leaf and all(
                    origin is not leaf for leaf in stage.leaves
                )
            known = stage.given.get(id(tensor))
            if known is None and (address := stage.origins.get(id(tensor))) is not None:
                known = self._live.id_at(address)
            if known is not None and not version_of(tensor):
                self.adopt(tensor, known)
        return super().identify(tensor, measure)


def _node_names(outputs: tuple[torch.Tensor, ...]) -> set[str]:
    seen: set[Any] = set()
    names: set[str] = set()
    todo: list[Any] = [tensor.grad_fn for tensor in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        todo.extend(parent for parent, _ in node.next_functions)
    return names
