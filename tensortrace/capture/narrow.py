"""From a bad module to the op and the line: one outermost call is run again at op level.

At a gate the weights are still what they were, so the call is replayed once from its own inputs,
random state and modes, with its modules' contents swapped for stand-ins. The ops of the replay
become records of the step, marked `replay`, before the checks decide; an action says how sure the
place is. Measured: the parameter gradients of a replay equal the real ones to the bit.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any

import torch
from msgspec import structs
from torch import nn

from tensortrace.capture import ops
from tensortrace.capture.active import here, slot
from tensortrace.capture.aside import Stage, as_it_was, swapped
from tensortrace.capture.drafts import Draft
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.gradients import Parameters
from tensortrace.capture.names import unwrapped
from tensortrace.capture.recorder import Recorder
from tensortrace.capture.roots import Root, Roots, Tree, UnkeptError, refusal_of
from tensortrace.capture.stats import StatsQueue
from tensortrace.capture.tensors import TensorDraft, TensorTable, version_of
from tensortrace.causes.derivatives import derivative_to_blame, first_bad
from tensortrace.checks import FILLS, StepView, completion_order, is_own_backward, plain_op
from tensortrace.records import DERIVATIVE, Call, Tensor

MOST_REPLAYS = 8
# Roots tried for one bad gradient: its maker may be the first op of a later root.
_MOST_ROOTS = 3
# What a replay may take of the log.
_MOST_RECORDS = 20_000


class Narrower:
    """Decide which call to replay, at most once per root and phase and eight times a run."""

    def __init__(self, recorder: Recorder, roots: Roots) -> None:
        self._recorder, self._roots = recorder, roots
        self._done: set[tuple[str, str]] = set()
        self._replays = 0

    def look(self, step: StepView) -> None:
        """Replay what the step asks for; records and the verdict are pended. Called at gates."""
        if not step.bad or step.poisoned or self._replays >= MOST_REPLAYS:
            return
        # What did no harm so far (a mask, a value that is consumed) may do so in a later step.
        damage = step.damage()
        if damage is None:
            return
        forward = self._forward_suspect(step)
        if isinstance(forward, Root):
            self._replay(forward, "forward", step)
        # With a finite loss it may be the backward of that, or of something else, that spoilt the
        # gradients. A scaler's inf is its own to handle, but for that in a gradient that the loss
        # is made of.
        blamed = derivative_to_blame(step)
        if blamed or ((not forward or damage == "gradient") and not step.scaled()):
            first = first_bad(step, blamed)
            for root in self._backward_suspects(step, first)[:_MOST_ROOTS] if first else ():
                if self._replay(root, "backward", step, first):
                    return

    # ---- which root

    def _forward_suspect(self, step: StepView) -> Root | bool:
        """The root of the first fresh call that made what is bad.

        True if an op outside modules explains it, or its root was looked at before or is not kept;
        False if nothing forward is bad, or what autograd.grad returned was so first.
        """
        by_seq = {call.seq: call for call in step.calls}
        for call in completion_order(step.calls[step.fresh :]):
            if call.phase != "forward" or call.recompute:
                continue
            made, got = step.nonfinite(call.outputs), step.hurt(call.inputs)
            if call.op is not None:
                masked = step.nonfinite(call.inputs) or plain_op(call.op) in FILLS
                if made and not masked:
                    return call.op != DERIVATIVE
                continue
            parent = by_seq.get(call.parent) if call.parent is not None else None
            in_parent = got and parent is not None and not step.hurt(parent.inputs)
            if (made and not got) or in_parent:
                root = self._root_of(by_seq, call)
                known = root is None or (root.path, "forward") in self._done
                return True if root is None or known else root
        return False

    def _root_of(self, by_seq: dict[int, Call], call: Call) -> Root | None:
        at: Call | None = call
        while at is not None:
            root = self._roots.get(at.seq)
            if root is not None:
                return root
            at = by_seq.get(at.parent) if at.parent is not None else None
        return None

    def _backward_suspects(self, step: StepView, first: Call) -> list[Root]:
        """The roots that may have made the first bad gradient, the likeliest first."""
        # What arrived at an op was made by a root that took its result. Of what it made itself
        # nothing is to be found, but the line inside a backward of the user's own.
        own = first.op is None or is_own_backward(first)
        if not own and not step.nonfinite(first.inputs):
            return []
        by_seq = {call.seq: call for call in step.calls}
        owner = by_seq.get(first.forward) if first.forward is not None else None
        if owner is not None:
            made_in = self._root_of(by_seq, owner)
        else:  # that of a parameter, and nothing came before it
            made_in = self._first_root_with(first.module or "")
        oldest = made_in.seq if made_in is not None else -1
        clean = [root for root in self._roots
                 if oldest <= root.seq < first.seq and self._finite(root, step, first)]  # fmt: skip
        # What arrived was made by those that took what it is the gradient of, and what no call that
        # was seen took, by the latest.
        took = {root.seq for call in _takers(step, first, owner)
                if (root := self._root_of(by_seq, call)) is not None}  # fmt: skip
        return sorted(clean, key=lambda root: (root.seq not in took, -root.seq))

    def _first_root_with(self, path: str) -> Root | None:
        inside = (root for root in self._roots
                  if not root.path or f"{path}.".startswith(f"{root.path}."))  # fmt: skip
        return min(inside, key=lambda root: root.seq, default=None)

    def _finite(self, root: Root, step: StepView, first: Call) -> bool:
        """Whether the gradients that had arrived at a root by then are known and finite."""
        if not root.gradients_until(first.seq) or (root.path, "backward") in self._done:
            return False
        arrived = [c for c in step.calls if c.phase == "backward" and c.forward == root.seq
                   and c.op is None and c.inputs and c.seq <= first.seq]  # fmt: skip
        return bool(arrived) and not any(step.nonfinite(c.inputs) for c in arrived)

    # ---- the replay

    def _replay(self, root: Root, phase: str, step: StepView, first: Call | None = None) -> bool:
        """Run a root again, and backward as far as that had come; True if an op was found."""
        self._done.add((root.path, phase))
        self._replays += 1
        # Each root is replayed once: what comes later has to show in its own calls.
        self._recorder.may_rest = False
        started = time.perf_counter_ns()
        replay = Replay(self._recorder, root, math.inf if first is None else first.seq)
        try:
            why = _refusal(root, phase)
            if why is None:
                replay.run(phase)
            if replay.recorder.failed is not None:
                raise replay.recorder.failed
        except UnkeptError as error:
            why = str(error)
        finally:
            elapsed = time.perf_counter_ns() - started
        detail: dict[str, Any] = {"phase": phase, "forward": root.seq, "host_ns": elapsed}
        if why is None:
            detail.update(self._hand_over(replay, root, phase, step))
        else:
            detail["placed"] = why
        self._recorder.verdict(root, detail)
        return detail.get("op") is not None

    def _hand_over(self, replay: Replay, root: Root, phase: str, step: StepView) -> dict[str, Any]:
        """Pend the records of the replay; returns what the action says of it."""
        replay.queue.resolve()
        calls = [record for draft in replay.drafts
                 if isinstance(record := draft.record(), Call)]  # fmt: skip
        calls.sort(key=lambda call: call.seq)
        # A stand-in has the id of what it stands for, and is described there.
        tensors = step.tensors | {t.id: t for call in calls for t in call.tensors}
        found = next((c for c in calls if c.op is not None and c.phase == phase
                      and _made_bad(c, tensors)), None)  # fmt: skip
        if found is not None and found.phase == "backward":
            found = _at_its_op(found, calls, tensors)
        until = found if phase == "forward" else None
        recorder = self._recorder
        differs = _first_difference(
            step, root, calls, tensors, until, thinned=recorder.sampling, rested=recorder.resting
        )
        originals = _originals(step, root, calls)
        lines = {call.seq: call.location for call in step.calls}
        asked = self._recorder.sources.locate_frame(sys._getframe())
        for call in calls:
            if call.op is not None:
                parent = originals.get(call.parent, root.seq)
                # Without a line of the user's inside the module the nearest one is that which the
                # replay runs under, not that of the call which it repeats.
                location = lines.get(parent) if call.location == asked else call.location
                self._recorder.pend_replayed(structs.replace(call, location=location), parent)
        if found is not None:
            placed = "exact" if differs is None else "close"
            return {"placed": placed, "op": found.op, "seq": found.seq, "differs": differs}
        if replay.error is not None and not root.failed:
            why = f"the replay raised {type(replay.error).__name__}"
        elif differs is not None:
            why = f"did not reproduce: differs from {differs or 'the root'} on"
        else:
            why = "no op inside makes what is not finite"
        return {"placed": why, "differs": differs}


class Replay:
    """One replay: the same hooks report to a recorder of its own.

    Args:
        until: the seq of the first bad backward call; of several passes that one is repeated.
    """

    def __init__(self, live: Recorder, root: Root, until: float = math.inf) -> None:
        self.root, self.until = root, until
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
                self.recorder.use(stage)
                with torch._C._EnableTorchFunction():
                    here.stack, here.busy, slot.recorder = [], 0, self.recorder
                    ops.mode_on()
                    try:
                        output = module(*stage.args, **stage.kwargs)
                        if phase == "backward" and not stage.refused:
                            self._backward(output, stage)
                    except UnkeptError:
                        raise
                    except Exception as error:
                        self.error = error
                    finally:
                        ops.mode_off()
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


class ReplayRecorder(Recorder):
    """What the hooks report to during a replay: nothing of the loop, no gates, a list of drafts."""

    def __init__(self, live: Recorder, queue: StatsQueue) -> None:
        # Not Recorder's: a replay has no journal, and begins no step.
        self.live = live
        self.queue = queue
        self.names, self.sources, self.serial = live.names, live.sources, time.monotonic_ns()
        self.step, self.update = live.step, live.update
        self.tensors = self.table = ReplayTable(queue, live.tensors)
        self.parameters = Parameters()
        self.on = {**dict.fromkeys(live.on, True), "loop": False, "optimizers": False}
        self.op_level = True
        self.roots = None
        self.stepping = None
        self.calls_of_step = {}
        self.to_recompute = {}
        self.on_cuda = self.clipped = self.backward_seen = False
        self.full = True
        self.sampling = False
        self.device_times = None
        self.replaying = True
        self.stage: Stage | None = None
        self.taken: list[Draft] = []
        self.failed: Exception | None = None

    def use(self, stage: Stage) -> None:
        """Know the stand-ins of the replay."""
        self.stage = self.table.stage = stage

    def next_seq(self) -> int:
        """Numbers go on where the step's own are."""
        return self.live.next_seq()

    def turn_of(self, module: nn.Module, seen: int) -> int:
        """No call of a replay is passed over."""
        return seen

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
        self.on[part] = False
        self.failed = self.failed or error

    def owns_thread(self) -> bool:
        """A replay runs where it is asked for."""
        return True

    def wants(self, path: str) -> bool:
        """A replay looks at every module."""
        return True

    def outermost_call(self, module: nn.Module) -> None:
        """No gate and no step begins in a replay."""

    def op_called(self) -> None:
        """As `outermost_call`."""

    def module_called(self, module: nn.Module, path: str) -> None:
        """The modules are described already."""

    def take_aliases(self) -> None:
        """Left to the live recorder."""

    def loss_seen(self, losses: Any, location: Any) -> None:
        """No loss of the loop's."""

    def backward_finished(self) -> None:
        """No turn of the loop's."""

    def raise_if_stopped(self) -> None:
        """Nothing is decided here."""


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
                # Without grad a view of a leaf is a leaf too.
                origin = tensor._base if tensor._is_view() else tensor
                self.met_foreign_leaf |= all(origin is not leaf for leaf in stage.leaves)
            address = stage.origins.get(id(tensor))
            known = self._live.id_at(address) if address is not None else None
            if known is not None and not tensor._version:
                self.adopt(tensor, known)
        return super().identify(tensor, measure)


def _refusal(root: Root, phase: str) -> str | None:
    """Why a call cannot be run again, None if it can."""
    module = root.module()
    if root.dropped is not None:
        return root.dropped
    if module is None:
        return "the module is gone"
    if not root.closed:
        return "the call never returned"
    if phase == "backward":
        if root.failed:
            return "the forward call raised"
        if not root.grad_enabled:
            return "it ran without grad"
        if any(g._version != v for by in root.gradients.values() for g, v in by.values()):
            return "the output gradient was modified in place since"
    why = refusal_of(root.tree)
    if why is not None:
        return why
    if [version_of(p) for p in root.tree.parameters] != root.parameter_versions:
        return "parameters changed since"
    # As torch.func.functional_call does for the time of a call.
    if any(a is not b for a, b in zip(Tree(module).parameters, root.tree.parameters, strict=False)):
        return "parameters were replaced since"
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    return "a CUDA graph is being captured" if capturing else None


def _takers(step: StepView, first: Call, owner: Call | None) -> list[Call]:
    """The forward calls that took what the gradient that arrived at a call is of."""
    bad = step.nonfinite(first.inputs)
    if not bad or owner is None:
        return []
    names = {name for name, id in first.inputs if id == bad[0].id}
    given = {id for name, id in owner.outputs if name in names}
    if bad[0].grad_of is not None:
        given.add(bad[0].grad_of)
    return [c for c in step.forward() if any(id in given for _, id in c.inputs)]


def _made_bad(call: Call, tensors: dict[int, Tensor]) -> bool:
    """The rule of an origin: bad comes out, nothing bad went in; -inf alone going in is a mask."""
    if plain_op(call.op).startswith("empty"):
        return False
    ins = [tensors[i] for _, i in call.inputs if i in tensors]
    outs = [tensors[i] for _, i in call.outputs if i in tensors]
    if any(t.nan or t.posinf for t in ins):
        return False
    if any(t.nan or t.posinf for t in outs):
        return True
    fresh = any(t.neginf for t in outs) and not any(t.neginf for t in ins)
    return fresh and (call.phase == "backward" or plain_op(call.op) not in FILLS)


def _at_its_op(found: Call, calls: list[Call], tensors: dict[int, Tensor]) -> Call:
    """Move the backward of a function of the user's own to the line of the op that is to blame.

    What ran since the backward call before it ran inside of it, or was recomputed for it. The last
    op that made something bad made the gradient, and is followed back to the one that began. In
    `calls` the one that is returned takes the place of `found`.
    """
    if not is_own_backward(found):
        return found

    def bad(names: list[tuple[str, int]]) -> set[int]:
        return {i for _, i in names if i in tensors and tensors[i].nonfinite}

    at = next(i for i, call in enumerate(calls) if call is found)
    begins = max((i for i in range(at) if calls[i].phase == "backward"), default=-1)
    blamed: Call | None = None
    wanted: set[int] = set()
    for call in reversed(calls[begins + 1 : at]):
        made = bad(call.outputs)
        if call.op is not None and made and (blamed is None or wanted & made):
            blamed, wanted = call, bad(call.inputs)
            if not wanted:
                break
    if blamed is not None:
        calls[at] = found = structs.replace(found, location=blamed.location)
    return found


def _originals(step: StepView, root: Root, calls: list[Call]) -> dict[int | None, int]:
    """Which call of the step each module call of the replay repeats.

    By path, in order. Where the step passed calls over, by their number too: those of the root's
    earlier calls in the step come before, as many of each module as this one makes.
    """
    by_path: dict[str | None, list[Call]] = {}
    inside, turn = {root.seq}, 0
    for call in sorted(step.calls, key=lambda c: c.seq):
        if call.phase != "forward" or call.op is not None or call.recompute:
            continue
        if call.seq == root.seq:
            turn = call.nth
        if call.parent in inside or call.seq == root.seq:
            inside.add(call.seq)
            by_path.setdefault(call.module, []).append(call)
    again: dict[str | None, list[int]] = {}
    for call in calls:
        if call.op is None and call.phase == "forward" and not call.recompute:
            again.setdefault(call.module, []).append(call.seq)
    found: dict[int | None, int] = {}
    for path, seqs in again.items():
        then = by_path.get(path, [])
        if len(then) < len(seqs):
            first = turn * len(seqs)
            numbered = {call.nth - first: call.seq for call in then}
            found.update((seq, numbered[n]) for n, seq in enumerate(seqs) if n in numbered)
        else:
            found.update((seq, call.seq) for seq, call in zip(seqs, then, strict=False))
    return found


def _first_difference(
    step: StepView, root: Root, calls: list[Call], tensors: dict[int, Tensor], until: Call | None,
    *, thinned: bool, rested: bool,
) -> str | None:  # fmt: skip
    """The first module whose outputs in the replay are not what they were; None if all are.

    Minimum and maximum are the fingerprint: exact, and independent of the order of reduction. A
    `thinned` step has passed calls over, with which nothing can be compared; one that `rested` all
    but the root, whose outputs have to stand for what came before the op.
    """
    originals = _originals(step, root, calls)
    by_seq = {call.seq: call for call in step.calls}
    for call in sorted(calls, key=lambda c: c.seq):
        if call.op is not None or call.phase != "forward" or call.recompute:
            continue
        if until is not None and call.seq > until.seq:
            break
        original = by_seq.get(originals.get(call.seq, -1))
        if original is None and thinned:
            continue
        if original is None:
            return call.module or ""
        if until is not None and not rested and call.seq in _ancestors(calls, until):
            continue  # still open when the op ran
        then = [step.tensors.get(i) for _, i in original.outputs]
        now = [tensors.get(i) for _, i in call.outputs]
        if len(then) != len(now) or not all(map(_same, then, now)):
            return call.module or ""
    return None


def _ancestors(calls: list[Call], call: Call) -> set[int]:
    by_seq = {c.seq: c for c in calls}
    found: set[int] = set()
    parent = call.parent
    while parent is not None and parent not in found:
        found.add(parent)
        parent = by_seq[parent].parent if parent in by_seq else None
    return found


def _same(then: Tensor | None, now: Tensor | None) -> bool:
    """Whether a replay made what was made then, as far as its statistics tell."""
    if then is None or now is None:
        return then is now
    if _counts(then) != _counts(now):
        return False
    if then.min is None and then.norm is not None and now.norm is not None:
        # Of a large tensor a thin step knows the norm, to six digits.
        return math.isclose(then.norm, now.norm, rel_tol=1e-6)
    return (then.min, then.max) == (now.min, now.max)


def _counts(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.nan, tensor.posinf, tensor.neginf


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
