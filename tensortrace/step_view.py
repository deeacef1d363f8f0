"""A step as checks look at it: its records so far, and what is asked of them again and again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from tensortrace.exception_text import Said, said_by
from tensortrace.masks import bad_data
from tensortrace.records import (
    DERIVATIVE,
    Action,
    Call,
    Finding,
    Location,
    Module,
    Optimizer,
    Param,
    Phase,
    Scalar,
    Step,
    Tensor,
)
from tensortrace.text import is_installed

# What a replay says that was given up because the weights are others by now.
MOVED = ("parameters changed since", "parameters were replaced since")

Column = Literal["param_grad_rms", "output_rms", "update_ratio"]

# So many of the last steps with an update are known.
UPDATED = 9

# So many ops before an exception are those of the code that raised it: a comparison, `all`, what
# reads a value or shows it.
_LAST = 3


@dataclass(slots=True)
class StepView:
    """A step as far as it has come: what a check may look at.

    Lists are in log order. Of a step that is not looked at closely (`Engine.looks_at`), `calls` and
    `params` are empty while all in it is finite. If a gate has shown more than 20,000 calls, they
    are dropped, and of a longer list than that the oldest.

    Attributes:
        number: which step, from 0.
        update: how many optimizer steps came before its latest record, but for skipped ones.
        calls: of modules and ops, forward and backward, but no replayed ones.
        fresh: the place in `calls` of the first that no earlier gate of the step has shown.
        replayed: the ops of calls that were run again, to find the one to blame.
        params: parameters as their optimizers stepped, one record for each and step.
        actions: what the loop did that is no call.
        optimizers: the optimizer steps, skipped ones too.
        tensors: of the step, by id; those of replayed ops too.
        bad: ids of those with a NaN or infinite element, but for replayed ops.
        summary: the step line; None until the step closes.
        modules: of the whole run so far, by path: the last record of each.
        findings: of the whole run so far.
        causes: the findings made, or met again, in this step.
        poisoned: the id of the finding after which an optimizer wrote parameters that are not
            finite, so that all that is not since then follows from it; None if there is none.
        losses: those of `actions` that are one.
        taken: those of `optimizers` that no scaler has skipped.
        before: the line of the step before; None in the first.
        trained: the numbers of the last earlier steps with an update by an optimizer, nine at most.
        skipped: the number of the last earlier step of which a scaler left one out; -1 if there is
            none.
        healthy: that of the last earlier one whose losses are finite; -1 if there is none.
        world_size: how many ranks the run has.
        raised: what the exception says that ends the run, while its action is still to come; None
            otherwise, and over a saved log.
        spoilt: whether an optimizer is about to take a gradient that is not finite, of a tensor
            that no module has; False over a saved log.
        has: what `Check.of` may ask for.
        evaluated: paths of the modules that in this step went from training to eval mode.
        required: by path of a module that changed in this step, the own parameters that required
            gradients before.
        shared: what checks keep of the run together, by name.
    """

    number: int
    update: int = 0
    calls: list[Call] = field(default_factory=list)
    fresh: int = 0
    replayed: list[Call] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)
    summary: Step | None = None
    modules: Mapping[str, Module] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    causes: list[Finding] = field(default_factory=list)
    poisoned: str | None = None
    losses: list[Action] = field(default_factory=list)
    taken: list[Optimizer] = field(default_factory=list)
    before: Step | None = None
    trained: Sequence[int] = ()
    skipped: int = -1
    healthy: int = -1
    world_size: int = 1
    raised: Said | None = None
    spoilt: bool = False
    has: frozenset[str] = frozenset()
    evaluated: set[str] = field(default_factory=set)
    required: dict[str, set[str]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    _forward: list[Call] = field(default_factory=list)
    _sorted: tuple[int, int] = (0, 0)
    _children: dict[int, list[Call]] = field(default_factory=dict)
    _gathered: tuple[int, int] = (0, 0)
    _by_seq: dict[int, Call] = field(default_factory=dict)
    _numbered: tuple[int, int] = (0, 0)
    _happened: list[Action | Optimizer] = field(default_factory=list)
    _as_of: tuple[int, ...] = ()
    _data: set[int] = field(default_factory=set)
    _judged: tuple[int, int] = (0, 0)
    _profiles: dict[Column, list[tuple[str, float]]] = field(default_factory=dict)
    _spans: dict[Column, tuple[float, float]] = field(default_factory=dict)

    @property
    def updated(self) -> int:
        """The last earlier step with an update by an optimizer, -1 if there was none."""
        return self.trained[-1] if self.trained else -1

    def blamed(self) -> str | None:
        """Name the finding that a non-finite value of this step follows from, if one is known."""
        if self.poisoned:
            return self.poisoned
        return next((f.id for f in self.causes if is_damage(f)), None)

    def narrowed(self, seq: int | None, phase: Phase) -> tuple[str | None, Call | None]:
        """Tell what a replay came to: how sure the place is, and the op to blame if it is known.

        Args:
            seq: a forward call inside the replayed one; None takes any replay of the phase.
            phase: what was replayed.
        """
        up = {seq}
        by_seq = self.by_seq()
        while seq is not None:
            seq = by_seq[seq].parent if seq in by_seq else None
            up.add(seq)
        placed = None
        for action in self.actions:
            detail = action.detail
            if action.action != "replay" or detail.get("phase") != phase:
                continue
            if (None in up and len(up) == 1) or detail.get("forward") in up:
                placed = detail.get("placed")
                op = next((c for c in self.replayed if c.seq == detail.get("seq")), None)
                if op is not None:
                    return placed, op
        return placed, None

    def happened(self) -> list[Action | Optimizer]:
        """List actions and optimizer steps in the order in which they happened. Hot.

        Returns:
            A list that is asked for again, and not to be changed.
        """
        actions, optimizers = self.actions, self.optimizers
        # Several checks ask at each gate; of a very long step the oldest are dropped.
        now = (len(actions), actions[-1].seq if actions else -1,
               len(optimizers), optimizers[-1].seq if optimizers else -1)  # fmt: skip
        if now != self._as_of:
            both: list[Action | Optimizer] = [*actions, *optimizers]
            self._happened, self._as_of = sorted(both, key=lambda record: record.seq), now
        return self._happened

    def forward(self) -> list[Call]:
        """List the forward calls so far in the order in which they began. Hot."""
        now = self._so_far()
        if now != self._sorted:
            # Records come so but for a call that spans a gate.
            forward = [call for call in self.calls if call.phase == "forward"]
            self._forward, self._sorted = sorted(forward, key=lambda call: call.seq), now
        return self._forward

    def by_seq(self) -> dict[int, Call]:
        """Map the calls so far, those of a replay aside, by their seq.

        Returns:
            A dict that is asked for again, and not to be changed.
        """
        now = self._so_far()
        if now != self._numbered:
            self._by_seq, self._numbered = {call.seq: call for call in self.calls}, now
        return self._by_seq

    def _so_far(self) -> tuple[int, int]:
        """What tells that calls have come, or were dropped, since something was made of them."""
        return len(self.calls), self.calls[-1].seq if self.calls else 0

    def passed_over(self, path: str | None) -> bool:
        """Whether no forward call of a module was seen, so that a replay alone can know of one."""
        return not any(c.op is None and c.module == path for c in self.forward())

    def was_passed_over(self, code: str, path: str | None) -> bool:
        """Whether a check has told already of a module whose calls that step had passed over.

        A step that sees them knows the same fault by other calls.
        """
        return any(f.code == code and f.module == path and f.evidence.get("passed_over")
                   for f in self.findings)  # fmt: skip

    def module_of(self, call: Call) -> Module | None:
        """The module whose own call it is; None for an op."""
        return None if call.op is not None else self.modules.get(call.module or "")

    def cls_of(self, path: str | None) -> str:
        """The class of a module; "" for what is none or not known."""
        module = self.modules.get(path) if path is not None else None
        return module.cls if module is not None else ""

    def kind_of(self, call: Call) -> str:
        """What was called: the op, or the class of the module."""
        return call.op or self.cls_of(call.module)

    def trains(self, path: str) -> bool:
        """Whether a module runs in training mode, or did before it was evaluated in this step."""
        module = self.modules.get(path)
        return module is not None and (module.training or path in self.evaluated)

    def trainable(self, path: str | None, dims: int = 0) -> list[str]:
        """Name in full the own parameters of a module that require gradients, as declared.

        Args:
            path: of the module; none for what is no module or not known.
            dims: how many dims a parameter has at least.
        """
        module = self.modules.get(path) if path is not None else None
        prefix = f"{path}." if path else ""
        parameters = module.parameters if module is not None else ()
        return [prefix + p.name for p in parameters if p.requires_grad and len(p.shape) >= dims]

    def learned(self, path: str) -> list[str]:
        """Name in full what `trainable` does, and what did before it was frozen in this step."""
        module, required = self.modules.get(path), self.required.get(path, ())
        prefix = f"{path}." if path else ""
        parameters = module.parameters if module is not None else ()
        return [prefix + p.name for p in parameters if p.requires_grad or p.name in required]

    def learns(self, path: str) -> bool:
        """Whether a module, or one inside it, has parameters that require gradients."""
        return any((not path or f"{each}.".startswith(f"{path}.")) and self.trainable(each)
                   for each in self.modules)  # fmt: skip

    def caller(self, seq: int | None) -> Location | None:
        """The line, in no installed package, that had the outermost call around a call run.

        None where no such line is known.
        """
        by_seq = {call.seq: call for call in (*self.calls, *self.replayed)}
        outer = None
        while seq is not None and seq in by_seq:
            outer = by_seq[seq]
            seq = outer.forward if outer.parent is None else outer.parent
        location = outer.location if outer is not None else None
        if location is None or not is_installed(location.file):
            return location
        return location.caller

    def inside(self, root: Call) -> list[Call]:
        """List the module calls that ran inside a forward call, itself first.

        A turn may have thousands of outermost calls, each of which is asked for: of all calls only
        those inside are looked at.
        """
        now = self._so_far()
        if now != self._gathered:
            self._children, self._gathered = {}, now
            for call in self.forward():
                if call.op is None and call.parent is not None:
                    self._children.setdefault(call.parent, []).append(call)
        inside, seqs = [root], set[int]()
        for call in inside:
            if call.seq not in seqs:  # a log may say anything
                seqs.add(call.seq)
                children = self._children.get(call.seq, ())
                inside += [child for child in children if child.seq > call.seq]
        return sorted(inside, key=lambda call: call.seq)

    def scaled(self) -> bool:
        """Tell whether a GradScaler watches the gradients of this step and skips if it must."""
        return any(a.action in ("scale", "unscale") for a in self.actions)

    def norm_of(self, optimizer: Optimizer) -> Scalar | None:
        """The norm of the gradients that an optimizer stepped with, or that they were clipped by.

        A thin step does not measure clipped gradients again.
        """
        if optimizer.grad_norm is not None:
            return optimizer.grad_norm
        clips = [a for a in self.actions if a.action == "clip" and a.seq < optimizer.seq
                 and a.optimizer in (None, optimizer.index)]  # fmt: skip
        return clips[-1].detail.get("total_norm") if clips else None

    def had_bad_gradient(self, param: Param) -> bool:
        """Whether a parameter's gradient was not finite at the optimizer step that wrote it.

        Of one that was not measured its norm tells, by which it was clipped.
        """
        grad = param.grad
        if grad is None or grad.unmeasured is None:
            return grad is not None and bool(grad.nonfinite)
        wrote = self.step_of(param)
        return wrote is not None and not finite(self.norm_of(wrote))

    def step_of(self, param: Param) -> Optimizer | None:
        """The optimizer step that wrote a parameter: the last before it."""
        steps = [o for o in self.optimizers if o.index == param.optimizer and o.seq < param.seq]
        return steps[-1] if steps else None

    def inherited(self) -> list[Tensor]:
        """List the bad tensors that the step before met and that come in from outside the modules.

        Data may be prepared after the last update, which ends no step.
        """
        outer = (c for c in self.calls if c.phase == "forward" and c.parent is None)
        return [t for c in outer for t in self.hurt(c.inputs) if t.from_step == self.number - 1]

    def damage(self) -> Literal["loss", "gradient", "output"] | None:
        """Tell what a non-finite value has reached; None while all that counts is clean.

        A loss is the judge where there is one. Without one it is the output of an outermost
        module, unless what consumed it made something finite of it.
        """
        if any(not finite(a.detail.get("value")) for a in self.losses):
            return "loss"
        if not self.bad:
            return "output" if self.spoilt_inside(self.raised_on_values()) else None
        backward = [c for c in self.calls if c.phase == "backward"]
        if not self.scaled() and self.reaches_parameter():
            return "gradient"
        # One that is caught does no harm; this one ends the run.
        ended = any(a.action == "exception" for a in self.actions)
        if ended and any(c.exception and self.hurt(c.inputs) for c in self.calls):
            return "output"
        if self.spoilt_inside(self.raised_on_values()):
            return "output"
        return None if self.losses or backward else self._derived() or self._unhealed()

    def _derived(self) -> Literal["loss", "gradient"] | None:
        """What a derivative was taken of, or came to, where a loop learns by nothing else.

        `torch.func.grad` shows no gradient of a parameter, and there is no call of backward().
        """
        if self.optimizers or self.updated >= 0 or self.healthy >= 0:
            return None
        taken = [c for c in self.forward() if c.op == DERIVATIVE]
        if any(self.nonfinite(c.inputs) for c in taken):
            return "loss"
        return "gradient" if any(self.nonfinite(c.outputs) for c in taken) else None

    def raised_on_values(self) -> Call | None:
        """The module call out of which the run ended, if for what is not finite, as the text says.

        It is the last outermost call, and was given nothing bad.
        """
        texts = [said_by(a) for a in self.actions if a.action == "exception"]
        said = texts[-1] if texts else self.raised
        if said is None or not said.is_of_values():
            return None
        last = max((c for c in self.forward() if c.parent is None and c.op is None),
                   key=lambda c: c.seq, default=None)  # fmt: skip
        if last is None or last.exception != said.kind or self.hurt(last.inputs):
            return None
        return last

    def spoilt_inside(self, call: Call | None) -> Tensor | None:
        """What is not finite that a call made, and that was why it raised; None if it was not.

        Its ops tell, those of a replay if there was one: one of the last took it, which the code
        that raised has run, or made it.
        """
        if call is None:
            return None
        ops = [c for c in self.replayed or self.calls
               if c.op is not None and c.phase == "forward" and c.seq > call.seq]  # fmt: skip
        last = sorted(ops, key=lambda c: c.seq)[-_LAST:]
        met = (t for c in reversed(last) for t in self.hurt([*c.inputs, *c.outputs]))
        return next(met, None)

    def reaches_parameter(self) -> bool:
        """Whether the gradient of a parameter is not finite; others may be multiplied away."""
        return (
            any(self.nonfinite(c.outputs) for c in self.calls
                if c.phase == "backward" and c.op is None)
            or any(not finite(o.grad_norm) for o in self.optimizers)
            or any(p.grad is not None and p.grad.nonfinite for p in self.params)
            or self.wrote_by_hand()
        )  # fmt: skip

    def _is_by_hand(self) -> bool:
        """Whether neither a module nor an optimizer was seen: weights are mere tensors."""
        return not (self.modules or self.optimizers or self.updated >= 0)

    def _spoilt_leaves(self) -> tuple[set[tuple[int, ...] | None], int]:
        """The shapes of mere tensors whose gradient is not finite, and the seq of its backward."""
        by_seq = self.by_seq()
        shapes: set[tuple[int, ...] | None] = set()
        since = self.calls[-1].seq if self.calls else 0
        for call in self.calls:
            if call.phase != "backward" or call.forward not in by_seq:
                continue
            bad = {name for name, id in call.outputs if self.nonfinite([(name, id)])}
            of = [id for name, id in by_seq[call.forward].inputs if name in bad]
            given = (self.tensors[id] for id in of if id in self.tensors)
            leaves = {tensor.shape for tensor in given if tensor.is_leaf and tensor.requires_grad}
            since = min(since, call.seq) if leaves else since
            shapes |= leaves
        return shapes, since

    def wrote_by_hand(self) -> bool:
        """Whether the program itself has moved a weight, a mere tensor, by what is not finite.

        A gradient that it left out, or healed, does no harm.
        """
        if not self.bad or not self._is_by_hand():
            return False
        shapes, since = self._spoilt_leaves()
        for call in self.forward() if shapes else ():
            op = call.op or ""
            if call.seq < since or not (op.endswith("_") or op in ("add", "sub")):
                continue
            given = [self.tensors[id] for _, id in call.inputs if id in self.tensors]
            weight = any(t.shape in shapes and not t.nonfinite for t in given)
            if weight and any(t.shape in shapes for t in self.nonfinite(call.outputs)):
                return True
        return False

    def span(self, column: Column) -> tuple[float, float]:
        """The lowest and highest number other than 0 in a column of the step line; 0 if none. Hot.

        What a check wants of a profile over depth, or of each module, is nearly always ruled out
        by these two.
        """
        known = self._spans.get(column)
        if known is None:
            numbers = getattr(self.summary.modules, column) if self.summary is not None else ()
            some = list(filter(None, numbers))
            known = self._spans[column] = (min(some), max(some)) if some else (0.0, 0.0)
        return known

    def profile(
        self, column: Column, part_of: Mapping[str, int] = MappingProxyType({})
    ) -> list[tuple[str, float]]:
        """List the layers of the commonest class with their rms in a column of the step line.

        In order of first call, so from input to output. One class only, since an embedding, a
        convolution and a norm do not compare; layers without weights of two dims, and those
        without an rms (no gradient) or with none but zeros, are left out.

        Args:
            column: of the step line.
            part_of: by path, where the step has several networks; of one part only, too.
        """
        if self.summary is None:
            return []
        if column not in self._profiles:
            columns = self.summary.modules
            families: dict[tuple[str, int | None], list[tuple[str, float]]] = {}
            for path, rms in zip(columns.path, getattr(columns, column), strict=False):
                module = self.modules.get(path) if rms else None
                if module is not None and has_matrix(module):
                    family = module.cls, part_of.get(path)
                    families.setdefault(family, []).append((path, rms))
            self._profiles[column] = max(families.values(), key=len, default=[])
        return self._profiles[column]

    def carried(self) -> Iterator[tuple[Call, str, Tensor]]:
        """List what modules got from earlier steps with a graph, outermost modules first.

        Returns:
            The call that got it first, the name of the input there, and the tensor.
        """
        # Nearly always there are none: one look at each tensor must do.
        old = {id: t for id, t in self.tensors.items()
               if t.from_step is not None and t.grad_fn is not None and not t.is_leaf}  # fmt: skip
        calls = [c for c in self.calls if old and c.phase == "forward" and c.op is None]
        for call in sorted(calls, key=lambda c: (c.parent is not None, c.seq)):
            for name, id in call.inputs if not call.recompute else ():
                if id in old:
                    yield call, name, old.pop(id)

    def _unhealed(self) -> Literal["output"] | None:
        """Follow what outermost modules spoilt to where nothing finite was made of it.

        An index or a count of NaN (argmax, eq) heals nothing.
        """
        outer = (c for c in self.calls if c.parent is None and c.phase == "forward")
        bad: set[int] = set()
        used: set[int] = set()
        for call in sorted(outer, key=lambda c: c.seq):
            got = {id for _, id in call.inputs if id in bad}
            made = {tensor.id for tensor in self.hurt(call.outputs)}
            if call.op is None or got:
                bad |= made
            if any(self.is_float(id) for _, id in call.outputs):
                used |= got - made
        return "output" if bad - used else None

    def is_float(self, id: int) -> bool:
        """Whether a tensor of the step is of real or complex numbers."""
        tensor = self.tensors.get(id)
        return tensor is not None and tensor.dtype.startswith(("float", "bfloat", "complex"))

    def nonfinite(self, names: Iterable[tuple[str, int]]) -> list[Tensor]:
        """Pick those of a call's tensors that have any NaN or infinity."""
        found = (self.tensors.get(id) for _, id in names)
        return [t for t in found if t is not None and (t.nan or t.posinf or t.neginf)]

    def hurt(self, names: Iterable[tuple[str, int]]) -> list[Tensor]:
        """Pick those of a call's tensors that have NaN or +inf; -inf alone is a mask, or data."""
        found = self.nonfinite(names)
        if all(t.nan or t.posinf for t in found):
            return found
        data = self._bad_data()
        return [t for t in found if t.nan or t.posinf or t.id in data]

    def unmeasured(self, names: Iterable[tuple[str, int]]) -> list[tuple[str, Tensor]]:
        """Pick those of a call's tensors that nobody knows of whether they are finite, by name."""
        found = ((name, self.tensors[id]) for name, id in names if self.is_float(id))
        return [(name, tensor) for name, tensor in found if tensor.unmeasured]

    def _bad_data(self) -> set[int]:
        now = len(self.calls), len(self.tensors)
        if now != self._judged:
            self._judged = now
            self._data = bad_data(self.number, self.forward(), self.tensors, self.modules)
        return self._data


def has_matrix(module: Module) -> bool:
    """Whether a parameter of a module's own has two dims or more. Hot."""
    for parameter in module.parameters:  # noqa: SIM110 any() takes three times as long
        if len(parameter.shape) > 1:
            return True
    return False


def is_own_backward(call: Call) -> bool:
    """Whether a call is the backward of an autograd function of the user's own.

    It is called like the function, with no number after it as torch's nodes have.
    """
    return call.op is not None and call.node == f"{call.op}Backward"


def completion_order(calls: Iterable[Call]) -> list[Call]:
    """Sort calls as they ended: children before their parent, siblings by seq."""
    children: dict[int | None, list[Call]] = {}
    ordered = sorted(calls, key=lambda c: c.seq)
    here = {c.seq for c in ordered}
    for call in ordered:
        children.setdefault(call.parent if call.parent in here else None, []).append(call)
    # Parents first and siblings from the last, then all of it backwards.
    order: list[Call] = []
    stack = list(children.get(None, []))
    while stack:
        call = stack.pop()
        order.append(call)
        stack += children.get(call.seq, [])
    return order[::-1]


def is_damage(finding: Finding) -> bool:
    """Whether a finding is about values that are not finite, and no note."""
    return finding.code.startswith("TT1") and finding.severity != "note"


def is_left_by(note: Finding, tensor: Tensor) -> bool:
    """Whether a tensor of an earlier step is what a note about harmless values of TT101 tells of.

    The tensor itself if it was not met since, or, by its shape, one that these values were written
    to in place.
    """
    if tensor.from_step is None or note.step > tensor.from_step:
        return False
    return note.step == tensor.from_step or list(tensor.shape or ()) in note.evidence.get(
        "wrote", ()
    )


def finite(x: Scalar | None) -> bool:
    """Tell whether a scalar of the log is a finite number, or absent."""
    return x is None or (not isinstance(x, str) and math.isfinite(x))
