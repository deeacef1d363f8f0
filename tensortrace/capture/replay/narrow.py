"""From a bad module to the op and the line: one outermost call is run again at op level.

At a gate the weights are still what they were, so the call is replayed once from its own inputs,
random state and modes, with its modules' contents swapped for stand-ins. The ops of the replay
become records of the step, marked `replay`, before the checks decide; an action says how sure the
place is. Measured: the parameter gradients of a replay equal the real ones to the bit.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from msgspec import structs

from tensortrace.capture.recorder import Recorder
from tensortrace.capture.replay.rerun import Replay
from tensortrace.capture.roots import Root, Roots, Tree, UnkeptError, refusal_of
from tensortrace.capture.tensors import version_of
from tensortrace.capture.user_hooks import (
    MOST,
    changing,
    forward_hooks_of,
    hooks_of,
    parameter_hooks_of,
    where_defined,
)
from tensortrace.causes.derivatives import (
    backward_pass,
    derivative_to_blame,
    first_bad,
    leaked,
    spoilt_derivatives,
    upstream,
)
from tensortrace.checks import FILLS, MOVED, StepView, completion_order, is_own_backward, plain_op
from tensortrace.records import DERIVATIVE, Call, Location, Tensor
from tensortrace.text import shorten

MOST_REPLAYS = 8
# Of them for the same, met again after steps in which it was not there.
_MOST_AGAIN = 3
# Roots tried for one bad gradient: its maker may be the first op of a later root.
_MOST_ROOTS = 3


@dataclass(slots=True)
class _Asked:
    """How often a root was replayed for the same, in which step last, and when that was met.

    What is bad again after a step in which it was fine may have another cause, at another line.
    """

    times: int = 0
    replayed: int = -1
    met: int = -1
    met_before: int = -1

    def meet(self, step: int) -> bool:
        """Note that it is met in a step; whether there is nothing to ask then."""
        if self.met != step:
            self.met_before, self.met = self.met, step
        stays = self.met_before >= step - 1
        return stays or self.replayed == step or self.times >= _MOST_AGAIN


class Narrower:
    """Decide which call to replay: once for what stays bad, at most eight times a run."""

    def __init__(self, recorder: Recorder, roots: Roots) -> None:
        self._recorder, self._roots = recorder, roots
        # The path of a root, the phase, what was asked (what made or met the first bad value), and
        # whether that had done harm: it is asked again when it first does.
        self._asked: dict[tuple[str, str, object, bool], _Asked] = {}
        self._harmful = True
        # The first two of those that were run again at this gate.
        self._done: set[tuple[str, str]] = set()
        self._replays = 0

    def look(self, step: StepView) -> None:
        """Replay what the step asks for; records and the verdict are pended. Called at gates."""
        if step.poisoned or self._replays >= MOST_REPLAYS:
            return
        self._done.clear()
        self._harmful = True
        raised = step.raised_on_values()
        root = self._roots.get(raised.seq) if raised is not None else None
        if root is not None and not self._knows(root, "forward", "raised"):
            self._replay(root, "forward", step, what="raised")
        if not step.bad and not step.spoilt:
            return
        # What did no harm so far (a mask, a value that is consumed) may do so in a later step.
        damage, derivative = step.damage(), None
        if damage is None:
            # Of a parameter that no module owns the gradient is known with the optimizer's step.
            # What autograd.grad returned may be data of the next call, when this one is let go.
            derivative = next(spoilt_derivatives(step, step.calls[step.fresh :]), None)
            bad = step.spoilt or any(step.nonfinite(c.outputs) for c in step.calls
                                     if c.phase == "backward")  # fmt: skip
            if step.scaled() or not (bad or derivative):
                return
            damage, self._harmful = "gradient", False
        explained, suspect = self._forward_suspect(step, damage)
        if suspect is not None:
            root, what = suspect
            self._replay(root, "forward", step, what=what)
        elif not explained and damage == "loss" and leaked(step):
            self._look_for_leak(step)
        # With a finite loss it may be the backward of that, or of something else, that spoilt the
        # gradients. A scaler's inf is its own to handle, but for that in a gradient that the loss
        # is made of.
        blamed = derivative_to_blame(step) or derivative
        if blamed or ((not explained or damage == "gradient") and not step.scaled()):
            first = first_bad(step, blamed)
            suspects = self._backward_suspects(step, first) if first else []
            if first is None and (blamed is not None or step.spoilt):
                # No module and no op outside has seen it: inside a root, at a leaf that went in.
                first = next(reversed(backward_pass(step, blamed)), None)
                suspects = [r for r in self._roots if first and self._finite(r, step, first)]
            for root in suspects[:_MOST_ROOTS]:
                if self._replay(root, "backward", step, first, _what(first)):
                    return

    def _look_for_leak(self, step: StepView) -> None:
        """Replay calls until one makes inside what left no module by way of its outputs."""
        roots = [root for root in self._roots if not self._knows(root, "forward", "leak")]
        for root in roots[:_MOST_ROOTS]:
            if self._replay(root, "forward", step, what="leak"):
                return
            # What is looked for here in vain is no reason not to look for something else later.
            self._replays -= 1

    # ---- which root

    def _forward_suspect(
        self, step: StepView, damage: str
    ) -> tuple[bool, tuple[Root, object] | None]:
        """Look for the first fresh call that made what is bad.

        Returns:
            Whether something forward explains it: not if nothing there is bad, or what
            autograd.grad returned was so first. And the root to replay with what to ask it: None
            too if an op outside modules explains it, or if the root was looked at before or is not
            kept. Of what is not found behind the loss (a mask, weights that a module is given) a
            later module may be the reason.
        """
        by_seq = step.by_seq()
        losses = (a.tensor for a in step.actions if a.action == "loss" and a.tensor is not None)
        reached = upstream(step, losses)[0] if damage == "loss" else None
        explained = False
        for call in completion_order(step.calls[step.fresh :]):
            if call.phase != "forward" or call.recompute:
                continue
            made, got = step.nonfinite(call.outputs), step.hurt(call.inputs)
            if call.op is not None:
                masked = step.nonfinite(call.inputs) or plain_op(call.op) in FILLS
                if made and not masked:
                    if call.op == DERIVATIVE:
                        return explained, None
                    if reached is None or any(tensor.id in reached for tensor in made):
                        return True, None
                    explained = True
                continue
            parent = by_seq.get(call.parent) if call.parent is not None else None
            in_parent = got and parent is not None and not step.hurt(parent.inputs)
            if (made and not got) or in_parent:
                root = self._root_of(by_seq, call)
                what = call.module, bool(in_parent)
                if root is None or self._knows(root, "forward", what):
                    return True, None
                return True, (root, what)
        return explained, None

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
        by_seq = step.by_seq()
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
        suspects = sorted(clean, key=lambda root: (root.seq not in took, -root.seq))
        # What a module returns it may have used itself: then the gradient that arrives there has
        # come from inside, too, by way of what arrived at its other outputs.
        if made_in is not None and made_in not in clean:
            suspects += [made_in] if any(self._arrived(made_in, step, first)) else []
        return suspects

    def _first_root_with(self, path: str) -> Root | None:
        inside = (root for root in self._roots
                  if not root.path or f"{path}.".startswith(f"{root.path}."))  # fmt: skip
        return min(inside, key=lambda root: root.seq, default=None)

    def _finite(self, root: Root, step: StepView, first: Call) -> bool:
        """Whether the gradients that had arrived at a root by then are known and finite."""
        arrived = self._arrived(root, step, first)
        return bool(arrived) and all(arrived)

    def _arrived(self, root: Root, step: StepView, first: Call) -> list[bool]:
        """Of each gradient that had arrived at a root by then, whether it is finite.

        None of a root that was replayed, or of which they are not kept.
        """
        if not root.gradients_until(first.seq) or self._knows(root, "backward", _what(first)):
            return []
        return [not step.nonfinite(c.inputs) for c in step.calls if c.phase == "backward"
                and c.forward == root.seq and c.op is None and c.inputs
                and c.seq <= first.seq]  # fmt: skip

    def _knows(self, root: Root, phase: str, what: object) -> bool:
        """Whether a root was run again for this before, or at this gate for anything."""
        asked = self._asked.get((root.path, phase, what, self._harmful))
        known = asked is not None and asked.meet(self._recorder.step)
        return known or (root.path, phase) in self._done

    # ---- the replay

    def _replay(
        self,
        root: Root,
        phase: str,
        step: StepView,
        first: Call | None = None,
        what: object = None,
    ) -> bool:
        """Run a root again, and backward as far as that had come; True if an op was found."""
        self._done.add((root.path, phase))
        asked = self._asked.setdefault((root.path, phase, what, self._harmful), _Asked())
        asked.times, asked.replayed = asked.times + 1, self._recorder.step
        asked.met = self._recorder.step
        self._replays += 1
        # No step rests from here on: another cause has to show in calls that are recorded.
        self._recorder.may_rest = False
        started = time.perf_counter_ns()
        call = step.by_seq().get(root.seq)
        given = call.inputs if call is not None and not root.hooked else []
        replay = Replay(self._recorder, root, given, math.inf if first is None else first.seq)
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
            detail.update(self._hand_over(replay, root, phase, step, first))
        else:
            detail["placed"] = why
        self._recorder.verdict(root, detail)
        return detail.get("op") is not None

    def _hand_over(
        self, replay: Replay, root: Root, phase: str, step: StepView, first: Call | None
    ) -> dict[str, Any]:
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
        # The records of module calls go no further: what they were the first to meet is described
        # by the op that takes it.
        met = {t.id: t for call in calls if call.op is None for t in call.tensors}
        for call in calls:
            if call.op is not None:
                parent = originals.get(call.parent, root.seq)
                taken = [met.pop(i) for _, i in call.inputs if i in met]
                # Without a line of the user's inside the module the nearest one is that which the
                # replay runs under, not that of the call which it repeats.
                location = lines.get(parent) if call.location == asked else call.location
                told = [*taken, *call.tensors]
                made = structs.replace(call, location=location, tensors=told)
                self._recorder.pend_replayed(made, parent)
        if found is not None:
            placed = "exact" if differs is None else "close"
            return {"placed": placed, "op": found.op, "seq": found.seq, "differs": differs}
        hooks: list[Location] = []
        if replay.error is not None and not root.failed:
            why = f"the replay raised {type(replay.error).__name__}"
        elif differs is not None:
            why = f"did not reproduce: differs from {differs or 'the root'} on"
        else:
            why = "no op inside makes what is not finite"
            if phase == "backward":
                theirs = [*hooks_of(root.tree)]
                if first is None or not step.nonfinite(first.inputs):  # it was a parameter's
                    theirs += parameter_hooks_of(root.tree)
                known = where_defined(changing(theirs), recorder.sources)
                put = [*recorder.now.hooks, *replay.recorder.now.hooks]
                hooks = [*dict.fromkeys([*put, *known])][:MOST]
        buffers = self._buffers_met(root, replay, tensors)
        more: dict[str, Any] = {"hooks": msgspec.to_builtins(hooks), "buffers": buffers}
        more["forward_hooks"] = forward_hooks_of(root.tree, recorder.names, recorder.sources)
        if phase == "forward":
            more["hooked"] = root.hooked
        return {"placed": why, "differs": differs, **{k: v for k, v in more.items() if v}}

    def _buffers_met(
        self, root: Root, replay: Replay, tensors: dict[int, Tensor]
    ) -> dict[str, str]:
        """The names of the buffers that a replay took, by tensor id: nobody else can name them."""
        table, stage = replay.recorder.table, replay.recorder.stage
        found: dict[str, str] = {}
        if stage is None:
            return found
        for module in root.tree.modules:
            path = self._recorder.names.known(module)
            for name, buffer in dict(module._buffers).items():
                number = table.id_at(id(stage.memo.get(id(buffer)))) if buffer is not None else None
                while number is not None:  # it may have been written to since it was taken
                    found[str(number)] = shorten(f"{path}.{name}" if path else name)
                    number = tensors[number].previous if number in tensors else None
        return found


def _what(first: Call | None) -> object:
    """What is asked of the calls around a first bad gradient."""
    return first and (first.module, first.op, first.location)


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
        if any(version_of(g) != v for _, by in root.gradients.values() for g, v in by.values()):
            return "the output gradient was modified in place since"
    why = refusal_of(root.tree)
    if why is not None:
        return why
    if [version_of(p) for p in root.tree.parameters] != root.parameter_versions:
        return MOVED[0]
    # As torch.func.functional_call does for the time of a call.
    if [*map(id, Tree(module).parameters)] != [*map(id, root.tree.parameters)]:
        return MOVED[1]
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

    What ran since the backward call before it ran inside of it, or was recomputed for it: so did
    the calls of a pass that it began itself. The last op that made something bad made the gradient,
    and is followed back to the one that began. In `calls` the one that is returned takes the place
    of `found`.
    """
    if not is_own_backward(found):
        return found

    def bad(names: list[tuple[str, int]]) -> set[int]:
        return {i for _, i in names if i in tensors and tensors[i].nonfinite}

    at = next(i for i, call in enumerate(calls) if call is found)
    begins, nested = -1, False
    for i, call in enumerate(calls[:at]):
        if call.phase == "forward":
            nested = call.op == DERIVATIVE
        elif not nested:
            begins = i
    blamed: Call | None = None
    wanted: set[int] = set()
    for call in reversed(calls[begins + 1 : at]):
        made = bad(call.outputs)
        if call.op is not None and made and (blamed is None or wanted & made):
            blamed, wanted = call, bad(call.inputs)
            views = (tensors[i].view_of for i in wanted)  # `v.T @ x`
            wanted |= {i for i in views if i is not None}
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
    by_seq = step.by_seq()
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
