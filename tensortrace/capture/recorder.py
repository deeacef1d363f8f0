"""The live half of a run: it counts steps, and decides at the gate.

Hooks turn what they see into drafts, whose statistics are still on their device. At a gate one
transfer brings the statistics over, drafts become records, and the journal takes them: there the
checks run, while the weights are still what they were.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs
from torch import nn

from tensortrace.capture.active import Ours, here, slot
from tensortrace.capture.cuda_time import DeviceTimes
from tensortrace.capture.described import Descriptions, count_compiled
from tensortrace.capture.drafts import CALLS, ActionDraft, Draft, ParamDraft, Ready, StepMark
from tensortrace.capture.journal import Journal
from tensortrace.capture.lines.drafts import LineDraft
from tensortrace.capture.loop.carried import Carried
from tensortrace.capture.loop.losses import record_losses
from tensortrace.capture.loop.optimizers import Optimizers
from tensortrace.capture.loop.steps import StepRules
from tensortrace.capture.loss_graph import LossGraphs
from tensortrace.capture.names import ModuleNames
from tensortrace.capture.ops import function_mode
from tensortrace.capture.ops.places import Places
from tensortrace.capture.outbox import Outbox
from tensortrace.capture.receiver import PARTS, InFlight, Receiver, ThisStep
from tensortrace.capture.rest import inside_root, is_at_rest, is_open, leaks
from tensortrace.capture.roots import Root, Roots
from tensortrace.capture.source import SourceLines
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.capture.tensors import TensorDraft, TensorTable
from tensortrace.capture.turns import is_taken
from tensortrace.capture.wanted import Wanted
from tensortrace.checks import StepView
from tensortrace.engine import HELD
from tensortrace.errors import TraceStoppedError
from tensortrace.records import (
    Action,
    Call,
    Finding,
    Location,
    Module,
)
from tensortrace.signal_handlers import is_of_handler
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.lines.tracer import LineTracer
    from tensortrace.capture.modules import OpenCall
    from tensortrace.exception_text import Said

# A step is handed on in parts of this many records, so that nothing is held without bound: as many
# as the checks hold.
RECORDS_PER_PART = HELD
_MODULE_CALL = nn.Module._call_impl.__code__


class Recorder(Receiver):
    """Counts steps and updates, numbers what happens, and hands records to the journal.

    Args:
        journal: takes the finished records.
        queue: computes statistics.
        names: the module paths.
        sources: finds the user's lines.
        wanted: glob patterns of the module paths to record; None records all.
        op_level: whether ops inside modules are recorded too.
        narrow: whether outermost calls are kept, so that one can be run again at op level.
        shows_compiled: whether compiled modules run uncompiled here, so that all is seen.
        should_stop: whether a finding stops the program.
        warn: told once of each thing that goes wrong in the tracer itself.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        queue: StatsQueue,
        names: ModuleNames,
        sources: SourceLines,
        wanted: Iterable[str] | None,
        op_level: bool,
        narrow: bool,
        shows_compiled: bool,
        should_stop: Callable[[Finding], bool],
        warn: Callable[[str], None],
    ) -> None:
        self.optimizers = Optimizers()
        super().__init__(
            queue=queue,
            names=names,
            sources=sources,
            tensors=TensorTable(queue),
            places=Places(sources),
            rules=StepRules(self.optimizers, sources),
            op_level=op_level,
            thins_ops=not op_level,
            shows_compiled=shows_compiled,
        )
        self.journal = journal
        self.carried = Carried(self.optimizers)
        self.graphs = LossGraphs()
        self.wanted = Wanted(wanted)
        self.roots = Roots() if narrow and not op_level else None
        self._should_stop = should_stop
        self.warn = warn
        self._lock = threading.RLock()
        self._pending: list[Draft | StepMark] = []
        self._outbox = Outbox(journal, sources)
        self._threads: dict[int, int] = {}
        self._thread = threading.get_ident()
        self._told_threads = False
        self._times = DeviceTimes()
        self._troubled = False
        self._modules = Descriptions(names, sources)
        self.compiled_modules = 0
        self._stop: Finding | None = None
        # What the last exception is known again by, and how long its traceback was.
        self.explained: tuple[tuple[Any, ...], int] = ((), 0)
        self.look: Callable[[StepView], None] | None = None
        # Until a replay is needed, since a root is replayed once, or until a module hands out what
        # it does not return.
        self.may_rest = True
        self.resting = False
        self.lines: LineTracer | None = None
        # Whether calls came since the last gate, and whether the step in flight has had one.
        self._undecided = self._gated = False
        self._begin_step()

    def pend(self, draft: Draft) -> None:
        """Take a draft; it becomes a record at the next gate."""
        if self._threads:
            with self._lock:
                if not self._still_fits(draft):
                    return
                self._pending.append(draft)
        else:
            self._pending.append(draft)
        if type(draft) in CALLS:
            self._undecided = True
        if len(self._pending) >= RECORDS_PER_PART:
            self.hand_on()
            self.journal.part()

    def _still_fits(self, draft: Draft) -> bool:
        """Whether a draft belongs to the step in flight, which another thread may have ended since.

        An action is moved there, without the tensor that it names. A call or a parameter is passed
        over: its tensors have the ids of the other step.
        """
        if draft.step == self.step:
            return True
        if type(draft) in CALLS or isinstance(draft, ParamDraft):
            self.passed_over += 1
            return False
        if isinstance(draft, ActionDraft):
            draft.fields["tensor"] = None
        draft.step, draft.seq = self.step, self.next_seq()
        if isinstance(draft, Ready):
            draft.finished = structs.replace(draft.finished, step=draft.step)
        return True

    def note_threads(self) -> None:
        """Say once that several threads train: what one does comes between what another does."""
        if not self._told_threads and slot.several_train():
            self._told_threads = True
            self.action("threads", detail={"threads": len(slot.training)})

    def own_thread(self, ident: int) -> None:
        """Make a thread the one whose loop is followed."""
        self._thread = ident

    def owns_thread(self) -> bool:
        """Whether this is the thread that entered the trace."""
        return threading.get_ident() == self._thread

    def thread_number(self) -> int:
        """0 for the thread that entered the trace, 1 and up for others as they are met.

        Each is met before the first that it reports: from then on no thread adds to a step that
        another has ended (`pend`).
        """
        ident = threading.get_ident()
        if ident == self._thread:
            return 0
        return self._threads.setdefault(ident, len(self._threads) + 1)

    def wants(self, path: str) -> bool:
        """Whether the calls of a module are recorded. Hot."""
        return self.wanted.has(path)

    def passes_over(self, module: nn.Module, around: OpenCall) -> bool:
        """Whether a thin step leaves out this call of a module inside another. Hot.

        One that is called over and over (a cell unrolled over time) is looked at as often as a line
        of a loop. A NaN between two looks is met at the next one or in the loss, and a replay finds
        its op all the same. A step at rest leaves out every call inside one that can be replayed.
        """
        if around.serial != self.serial:
            return False  # it is looked at, and dropped
        if self.resting:
            inside = around.inside
            if inside is None:
                inside = around.inside = inside_root(self, around.root)
            if id(module) in inside:
                self.passed_over += 1
                return True
        turns = self.now.turns
        turn = turns.get(id(module), 0)
        turns[id(module)] = turn + 1
        if is_taken(turn):
            return False
        # Of a module that calls itself every call is seen: its exits could not be told apart.
        if is_open(module):
            return False
        self.passed_over += 1
        return True

    def met_among(self, modules: dict[int, nn.Module]) -> frozenset[int]:
        """Those of some modules, by id, that were entered and looked at. Hot."""
        return self._modules.known_among(modules)

    def turn_of(self, module: nn.Module, seen: int) -> int:
        """How many calls of a module came before this one, of which some may be passed over."""
        return self.now.turns.get(id(module), seen + 1) - 1

    def outermost_call(self, module: nn.Module) -> None:
        """A module is about to be called outside every other: maybe a gate, maybe a new step."""
        owns = self.thread_number() == 0
        if not owns and torch.is_grad_enabled():
            slot.called.add(threading.get_ident())
        if owns and not self.optimizer_running():
            if self.now.backward_seen:
                self.gate()
            if self.rules.ends_at_call(module):
                self.close_step()
        if owns:
            self.rules.begins_turn()
        self.rules.called(module)

    def op_called(self) -> None:
        """An op is about to be called outside modules: a program without modules has steps too."""
        if self.rules.ends_at_op() and self.owns_thread() and not self.optimizer_running():
            self.close_step()
            self.rules.holds_call = True

    def graph_begins(self) -> None:
        """An op makes a node after an update: so steps end that are written by hand."""
        if self.owns_thread():
            self.close_step()
            self.rules.holds_call = True

    def closure_given(self) -> None:
        """An optimizer is about to step with a closure: all of a turn may happen inside it."""
        self._turn_begins(self.rules.ends_at_closure())

    def schedule_begins(self) -> None:
        """A schedule of micro-batches is about to go through a turn, with a backward or without."""
        self._turn_begins(self.rules.ends_at_schedule())

    def _turn_begins(self, ends: bool) -> None:
        if ends:
            self.close_step()
        self.rules.begins_turn()
        self.rules.holds_call = True

    def fetched(self, batches: object, host_ns: int, frame: FrameType) -> None:
        """A DataLoader has handed out a batch: the step before it is over."""
        if self.rules.fetched(batches, frame):
            self.close_step()
        self.action("fetch", frame=frame, detail={"host_ns": host_ns})

    def module_called(self, module: nn.Module, path: str) -> None:
        """Describe a module at its first call and when it changes. Hot."""
        record, first = self._modules.look(module, path, self.step)
        if first and not self.shows_compiled:
            count = count_compiled(module)
            if count:
                self.compiled_modules += count
                of = shorten(type(module).__name__)
                self.action("compiled", of=of, detail={"modules": count})
        if record is not None:
            self.may_drop = self.may_drop or record.drops is not None
            self.pend(Ready(self.step, self.next_seq(), record))

    def take_aliases(self) -> None:
        """Write down better paths that were learnt."""
        for path, better in self.names.take_aliases():
            record = Module(step=self.step, path=path, cls="", alias=better)
            self.pend(Ready(self.step, self.next_seq(), record))

    def loss_seen(self, losses: list[tuple[str, torch.Tensor]], location: Location | None) -> None:
        """Backward is about to run on these tensors."""
        if self.now.loss_scaled:
            self.now.loss_scaled = False  # what entered the scaler is the loss; this is a multiple
            return
        record_losses(self, losses, location)

    def backward_finished(self, freed: bool, derivative: bool) -> None:
        """A call of backward() has returned, and has freed its graph unless that is still used.

        Args:
            freed: whether it has.
            derivative: whether it was torch.autograd.grad.
        """
        self.now.backward_seen = True
        owns = self.owns_thread()
        self.rules.backward_finished(derivative, self.update, owns)
        if not derivative and self.carried.awaits_end():
            with Ours(self, "gradients"):
                self.carried.backward_ended()
        if freed and owns:
            self.rules.graph_freed()

    def scaler_begins(self) -> None:
        """A GradScaler is about to decide whether its optimizer steps."""
        if self.now.backward_seen:
            self.gate()

    def failed_module(self, traceback: TracebackType | None) -> str | None:
        """The innermost module that an exception came through, KeyboardInterrupt included."""
        path = None
        while traceback is not None:
            frame = traceback.tb_frame
            if frame.f_code is _MODULE_CALL:
                path = self.names.known(frame.f_locals["self"])
            traceback = traceback.tb_next
        return path

    def fault(self, part: str, error: Exception) -> None:
        """Our own failure: one warning, a line in the log, and that part of the tracing stops.

        What is the program's is raised in it: what `stop_on` asked for, and what a signal handler
        raises while our code runs.
        """
        if isinstance(error, TraceStoppedError) or is_of_handler(error):
            raise error
        if not self.on.get(part, False):
            return
        self.on[part] = False
        if part == "modules":
            # Nobody takes it off at a module's entry any more, and it turns fused paths off.
            function_mode.mode_off()
        text = "".join(traceback.format_exception(error))[-8000:]
        detail = {"where": part, "error": repr(error)[:500], "traceback": text}
        with self._lock:
            seq = self.next_seq()
            record = Action(step=self.step, seq=seq, action="tracer_error", detail=detail)
            self._pending.append(Ready(self.step, seq, record))
        self.warn(
            f"tracing of {part} stopped after an error of tensortrace's own; your program goes on "
            f"unchanged, the traceback is in the log: {error!r:.300}"
        )

    def _begin_step(self) -> None:
        self.full = self.journal.full if self.step == 0 else self.journal.will_be_full(self.step)
        self.queue.lean = self.queue.light or not self.full
        self.queue.counts = not self.queue.lean
        self.sampling = not self.full and not self.op_level
        self.resting = self.sampling and is_at_rest(self)
        self.now = ThisStep()
        self.passed_over = 0
        self.on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.device_times = self._times if self.on_cuda and self.full else None
        self.seq = self.plain = 0
        self._started_ns = time.perf_counter_ns()
        self.tensors.begin_step(self.step)
        self.parameters.forget_gradients()
        self._undecided = self._gated = False
        if self.roots is not None:
            self.roots.release()
        self.rules.begin_step()
        if self.lines is not None:
            self.lines.step_began()

    def close_step(self) -> None:
        """End the step in flight and begin the next."""
        if self.lines is not None and self.full:
            self.lines.step_ends()
        # On CUDA what came after the step's own gate travels with the next one: one sync a gate.
        travels = self.on_cuda and self._gated
        if not travels:
            self.narrow()
        with self._lock:
            elapsed = time.perf_counter_ns() - self._started_ns
            mark = StepMark(
                self.step, self.next_seq(), self.update, elapsed, self.passed_over, self.resting
            )
            self._pending.append(mark)
            try:
                if not travels:
                    self.hand_on()
            finally:  # a signal handler may raise meanwhile
                self.step += 1
                self._begin_step()

    def narrow(self, raised: Said | None = None, lone: Sequence[TensorDraft] = ()) -> None:
        """Hand on what is known and replay the call that the checks would ask about.

        Args:
            raised: what the exception says that ends the run.
            lone: gradients that an optimizer is about to take, of tensors that no module has.
        """
        if self.roots is None:
            return
        if self.may_rest and self.journal.needs_finished() and leaks(self._pending):
            self.may_rest = False
        asked = self._undecided and (raised is not None or not self._can_wait())
        if self.look is not None and self.on["narrow"] and asked:
            self.hand_on()
            spoilt = any(not grad.is_finite() for grad in lone)
            if spoilt:
                self.journal.attend()
            view = self.journal.engine.step_in_flight
            if view is not None and view.number == self.step:
                view.raised, view.spoilt = raised, spoilt
                try:
                    self.look(view)
                except Exception as error:
                    self.fault("narrow", error)
        self.roots.release(ask=self.may_rest and self.journal.needs_finished())

    def verdict(self, root: Root, detail: dict[str, Any]) -> None:
        """Say what a replay came to."""
        self.action("replay", of=root.path, detail=detail)

    def pend_replayed(self, call: Call, parent: int) -> None:
        """Take a record that a replay made."""
        call = structs.replace(call, replay=True, parent=parent)
        self._pending.append(Ready(self.step, call.seq, call))

    def gate(self) -> None:
        """Decide, before the program goes on, at a place where no optimizer steps."""
        self.narrow()
        self.action("gate")
        self.decide()

    def decide(self) -> None:
        """Hand on all that is known; the checks decide at the optimizer or gate record in it."""
        self.now.backward_seen = self._undecided = False
        self._gated = True
        if self.on["gate"] and not self._can_wait():
            self.hand_on()

    def _can_wait(self) -> bool:
        """Whether no check would speak before the step ends: all in a thin step is finite. Hot."""
        if self.queue.alarmed or self.lines is not None or self.on_cuda:
            return False
        return not self.journal.needs_finished()

    def gate_safely(self) -> None:
        """A gate from user code, where nothing of ours may raise."""
        with Ours(self, "gate"):
            self.gate()

    def hand_on(self) -> None:
        """Turn drafts into records and give them to the journal."""
        with self._lock:
            pending, self._pending = self._pending, []
            before = len(self.journal.findings)
            try:
                self._hand_on(pending)
            except BaseException as error:
                if not isinstance(error, Exception) or is_of_handler(error):
                    # What was handed on is handed on in part. A step that has not ended ends later.
                    marks = [item for item in pending if isinstance(item, StepMark)]
                    self._pending = [
                        *(mark for mark in marks if mark.step >= self.journal.number),
                        *self._pending,
                    ]
                    raise
                # Here, so that the step goes on to its end and no hook is taken for the culprit.
                self.fault("gate", error)
                self._pending += [again for item in pending if (again := self._kept(item))]
            for finding in self.journal.findings[before:]:
                # The user's own exception stops the program already, or is caught for it to go on.
                if self._stop is None and self._wants_to_stop(finding) and finding.code != "TT801":
                    self._stop = finding
            if self.journal.stopped:
                self.on = dict.fromkeys(PARTS, False)
                function_mode.mode_off()

    def _kept(self, item: Draft | StepMark) -> Ready | None:
        """An error of the tracer's own that did not reach the log, for the next time."""
        if not isinstance(item, Ready) or not isinstance(item.finished, Action):
            return None
        seq = self.next_seq()
        record = structs.replace(item.finished, step=self.step, seq=seq)
        return Ready(self.step, seq, record)

    def _hand_on(self, pending: list[Draft | StepMark]) -> None:
        self.tensors.forget_waiting()
        self.queue.resolve()
        self._times.read()
        self._note_kernels()
        self._outbox.send(pending, self.lines)

    def _note_kernels(self) -> None:
        """Say which kernels for devices were compiled meanwhile, and whether they work."""
        prepared, trouble = self.queue.news()
        for dtype, host_ns in prepared:
            self.action("kernel", detail={"dtype": dtype, "host_ns": host_ns})
        if trouble is not None and not self._troubled:
            self._troubled = True
            self.warn(
                "statistics of CUDA tensors are measured by operators of torch, twenty launches "
                f"instead of one: Triton failed with {trouble}"
            )

    def _wants_to_stop(self, finding: Finding) -> bool:
        # It may open a debugger.
        here.go_on()
        try:
            return self._should_stop(finding)
        except Exception as error:
            if is_of_handler(error):
                raise
            self.warn(f"stop_on= raised {error!r:.300}; it is asked again at the next finding")
            return False
        finally:
            here.rest()

    def raise_if_stopped(self) -> None:
        """Raise what `stop_on` asked for, in the thread whose loop is followed. Hot."""
        if self._stop is not None and self.owns_thread():
            finding, self._stop = self._stop, None
            raise TraceStoppedError(finding)

    def settle(self, may_replay: bool = True) -> None:
        """Close the step in flight, if anything happened in it, and hand on everything."""
        if not may_replay and self.roots is not None:
            self.roots.release()
        if self.rules.holds_call or (self.step == 0 and self.seq):
            self.close_step()
        self.hand_on()

    def holds_more_than_lines(self) -> bool:
        """Whether anything happened in the step in flight but that lines were executed."""
        if self.lines is None or self.rules.holds_call or self._gated:
            return bool(self.seq)
        return any(
            item.step == self.step and not isinstance(item, (LineDraft, StepMark))
            for item in self._pending
        )

    def last_step(self) -> int:
        """The last step that has a record: what comes after a closed step may be a few ops."""
        return self.step if self.seq else max(self.step - 1, 0)

    def release(self) -> None:
        """Let go of every hook on tensors, and of the tensors."""
        self.parameters.remove()
        self.tensors.let_all_go()
        self._in_flight = InFlight()
        if slot.recorder is self:
            slot.recorder = None
