"""Tensor ids: the same tensor, unchanged, has the same id all through a step.

A tensor is recognised by weak reference and version, so no tensor is kept alive for its id.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
import torch

from tensortrace.capture import compiled
from tensortrace.capture.stats.gather import Ticket
from tensortrace.capture.stats.queue import Head, Stats, StatsQueue, stats_of
from tensortrace.capture.stats.rows import row_spread, row_spread_now
from tensortrace.capture.stats.units import RECTIFIED, Tickets, Units
from tensortrace.capture.unwrap import node_of
from tensortrace.engine import CLOSELY, SELDOM
from tensortrace.records import Tensor

_DTYPE_NAMES: dict[torch.dtype, str] = {}

# With grad off, larger tensors outside modules are described without statistics: an exponential
# moving average over all weights would otherwise read every parameter several times a step.
LARGEST_WITHOUT_GRAD = 65_536

# grad_of, previous, view_of, from_step
Tail = tuple[int | None, int | None, int | None, int | None]


class TensorDraft(msgspec.Struct, gc=False):
    """A described tensor: `head`, the statistics and `tail` are the fields of a `Tensor`, in order.

    The statistics are `known`, or None while they are in the queue, which `ticket` is for. What
    `units` and `spread` say is added when it is finished, which few tensors of a thin step ever
    are. Of a step's thousands of objects most belong to tensors: nothing here that the garbage
    collector would have to look at is kept longer than need be.
    """

    head: Head
    known: Any
    tail: Tail
    ticket: Ticket | None = None
    units: Tickets | None = None
    spread: Ticket | None = None
    made: Tensor | None = None

    @property
    def id(self) -> int:
        """The id of the tensor."""
        return self.head[0]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the tensor."""
        return self.head[1]

    def record(self) -> Tensor:
        """The finished description, once the queue is resolved. Hot."""
        made = self.made
        if made is None:
            made = self.peek()
            if self.units is not None:
                made = _with_units(made, self.units)
            if self.spread is not None:
                spread = stats_of(self.spread).min
                made = msgspec.structs.replace(made, row_spread=spread)
            self.made = made
        return made

    def peek(self) -> Tensor:
        """The description so far, once the queue is resolved; more may be asked for later."""
        if self.made is not None:
            return self.made
        # By position, a third of the time of by keyword; a test holds the order.
        return Tensor(*self.head, *self.stats(), *self.tail)  # type: ignore[call-arg] # mypy joins

    def stats(self) -> Any:
        """The fields of a `Stats`, once the queue is resolved. Hot."""
        if self.known is not None:
            return self.known
        assert self.ticket is not None
        return stats_of(self.ticket)

    def is_finite(self) -> bool:
        """Whether no NaN and no infinity was counted, once the queue is resolved. Hot."""
        nan, posinf, neginf = self.stats()[:3]
        return not (nan or posinf or neginf)

    def is_measured(self) -> bool:
        """Whether its statistics were asked for."""
        return self.known is not _NOT_ASKED


# Outputs whose rows are compared, in one step.
_COMPARED = 4
_MOST_PASSED = 10_000
# So many descriptions are kept for source lines, be their tensors alive or not.
_FEW = 1000
_NOT_ASKED = Stats(unmeasured="not asked")
_NO_TAIL: Tail = (None, None, None, None)
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_is_functorch = torch._C._functorch.is_functorch_wrapped_tensor


def draft_of_head(tensor: torch.Tensor) -> TensorDraft:
    """A description without statistics, of a tensor that has no id."""
    return TensorDraft(_head(tensor, -1), _NOT_ASKED, _NO_TAIL)


def _with_units(tensor: Tensor, units: Tickets) -> Tensor:
    dead, since = stats_of(units.dead).min, stats_of(units.since).min
    if dead is None or since is None:
        return tensor
    return msgspec.structs.replace(
        tensor, units=units.units, dead=int(dead), dead_since=int(since) if dead else None
    )


# A tensor that an op made which was passed over, and who is told its id and description when it is
# met, with what he needs to know of it.
Passed: TypeAlias = tuple[
    weakref.ref[torch.Tensor], Callable[["Passed", int, TensorDraft], None], Any
]


class _Known(msgspec.Struct, gc=False):
    ref: weakref.ref[torch.Tensor]
    version: int
    id: int
    step: int


class TensorTable:
    """Number the tensors of a step and queue their statistics.

    Args:
        queue: where statistics are computed; a tensor is reduced when it is first described.
    """

    def __init__(self, queue: StatsQueue) -> None:
        self._queue = queue
        _tables.add(self)
        self._waiting: list[TensorDraft] = []
        self._units = Units()
        self._known: dict[int, _Known] = {}
        # The compiled kernel counts it on, too.
        self.next_id = 0
        self._step = 0
        self._compared = 0
        self.kept: dict[str, Any] | None = None
        # The descriptions of this step by id, while source lines ask for them.
        self.drafts: dict[int, TensorDraft] | None = None
        # By their address, what ops of loops have made that were passed over: they are recorded
        # after all when it is met, or it would be taken for data that came in.
        self.passed: dict[int, Passed] = {}
        self.most_passed = _MOST_PASSED
        # By their address, tensors that `detach` has made, and what is known of their source: torch
        # says of them that they are no views.
        self._detached: dict[int, tuple[weakref.ref[torch.Tensor], _Known]] = {}
        self._most_detached = _MOST_PASSED

    def begin_step(self, step: int) -> None:
        """Start the ids again; remember only what is still alive."""
        for key, (ref, _, _) in list(self.passed.items()):  # another thread may add to it
            tensor = ref()
            if tensor is not None and key not in self._known:
                self._known[key] = _Known(ref, version_of(tensor), -1, self._step)
        self.passed = {}
        self._step = step
        self.next_id = self._compared = 0
        if self.drafts:
            self.drafts = {}
        if self._detached:
            self._forget_detached()
        if self._known:
            known = list(self._known.items())  # other threads describe theirs meanwhile
            self._known = {k: e for k, e in known if e.ref() is not None}
        self.kept = self._kept_graphs()

    def _kept_graphs(self) -> dict[str, Any] | None:
        """Count what still lives with its graph and was last met before the last step.

        Returns:
            {"tensors", "oldest", and of the latest one "step", "id", "shape", "grad_fn"}.
        """
        # What the last step has made is still in the loop's variables.
        known = list(self._known.values())
        old = [e for e in known if e.step < self._step - 1 and _has_graph(e.ref())]
        if not old:
            return None
        last = max(old, key=lambda e: (e.step, e.id))
        tensor = last.ref()
        if tensor is None:
            return None
        return {
            "tensors": len(old),
            "oldest": min(e.step for e in old),
            "step": last.step,
            "id": last.id,
            "shape": list(tensor.shape),
            "grad_fn": grad_fn_name(tensor),
        }

    @property
    def step(self) -> int:
        """The step whose tensors are numbered."""
        return self._step

    def continue_from(self, other: TensorTable) -> None:
        """Take over where another table of the same step has got to."""
        self._step, self.next_id = other._step, other.next_id

    def id_at(self, address: int) -> int | None:
        """The id of the living tensor object at an address, if it was described in this step."""
        entry = self._known.get(address)
        if entry is None or entry.ref() is None or entry.step != self._step:
            return None
        return entry.id

    def adopt(self, tensor: torch.Tensor, number: int) -> None:
        """Say that a tensor has the value, and so the id, of one that is described already."""
        self._known[id(tensor)] = _Known(
            weakref.ref(tensor), version_of(tensor), number, self._step
        )

    def detached(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """Remember that a tensor is another one without its graph."""
        entry = self._known.get(id(source))
        if entry is None or entry.ref() is not source:
            known = self._detached.get(id(source))
            entry = known[1] if known is not None and known[0]() is source else None
        if entry is not None:
            self._detached[id(tensor)] = weakref.ref(tensor), entry
            if len(self._detached) > self._most_detached:
                self._forget_detached()

    def let_go(self, tensor: torch.Tensor) -> None:
        """Keep no reference to a tensor, weak ones included; it is a new one when it is met."""
        self._known.pop(id(tensor), None)
        self.passed.pop(id(tensor), None)
        self._detached = {
            key: entry
            for key, entry in list(self._detached.items())
            if key != id(tensor) and entry[1].ref() is not tensor
        }
        self._units.let_go(tensor)

    def received(self, tensor: torch.Tensor) -> None:
        """Take a tensor for a new one: a rank has sent it, and torch may count that as no write."""
        self._known.pop(id(tensor), None)

    def let_all_go(self) -> None:
        """The same of all tensors."""
        self._known, self.passed, self._detached, self._units = {}, {}, {}, Units()

    def _forget_detached(self) -> None:
        self._detached = {k: e for k, e in list(self._detached.items()) if e[0]() is not None}
        self._most_detached = _MOST_PASSED + 2 * len(self._detached)

    def identify(
        self, tensor: torch.Tensor, measure: bool = True
    ) -> tuple[int, TensorDraft | None]:
        """The id of a tensor, and its description if this is the first time in the step. Hot."""
        try:
            version = tensor._version
        except RuntimeError:
            version = 0  # as `version_of` it
        entry, step = self._known.get(id(tensor)), self._step  # another thread may end the step
        previous = from_step = None
        if entry is not None and entry.ref() is tensor:
            if entry.step == step:
                if entry.version == version:
                    return entry.id, None
                previous = entry.id
            else:
                from_step = entry.step
        number = self.next_id
        self.next_id = number + 1
        # A subclass without weak references gets a new id each time.
        try:  # noqa: SIM105 suppress() costs as much as all that is done here
            self._known[id(tensor)] = _Known(weakref.ref(tensor), version, number, step)
        except TypeError:
            pass
        base = None
        viewed = self._base_of(tensor) if self._detached or tensor._is_view() else None
        if viewed is not None:
            if viewed.step == step:
                base = viewed.id
            elif from_step is None and not tensor._is_view():
                from_step = viewed.step  # of what `detach` made; a view is made in this step
        tail = (None, previous, base, from_step)
        draft = self._draft(tensor, number, tail, measure)
        if self.drafts is not None:
            self.drafts[number] = draft
        if self.passed and previous is None:
            passed = self.passed.pop(id(tensor), None)
            if passed is not None and passed[0]() is tensor:
                passed[1](passed, number, draft)
                return number, None
        return number, draft

    def forget_passed(self) -> None:
        """Let go of what was passed over and is gone; called when there is much of it."""
        self.passed = {k: e for k, e in list(self.passed.items()) if e[0]() is not None}
        self.most_passed = _MOST_PASSED + 2 * len(self.passed)

    def id_of(self, tensor: torch.Tensor) -> int | None:
        """The id of a tensor that was described in this step and has not changed since."""
        entry = self._known.get(id(tensor))
        if entry is None or entry.ref() is not tensor or entry.step != self._step:
            return None
        return entry.id if entry.version == version_of(tensor) else None

    def gradient(
        self, grad: torch.Tensor, grad_of: int | None, measure: bool = True
    ) -> tuple[int, TensorDraft]:
        """Describe a gradient; it is a tensor of the engine's that is not met again."""
        number = self.next_id
        self.next_id = number + 1
        tail = _NO_TAIL if grad_of is None else (grad_of, None, None, None)
        return number, self._draft(grad, number, tail, measure)

    def gradients(
        self, arrived: tuple[torch.Tensor | None, ...], made: tuple[torch.Tensor | None, ...]
    ) -> tuple[Tensor | TensorDraft | None, ...]:
        """Describe what arrived at a node, and then what it made; None where there is none. Hot."""
        found = self._queue.look_all(Tensor, self, arrived, made)
        if found is None:
            return tuple(
                self.gradient(grad, None)[1] if isinstance(grad, torch.Tensor) else None
                for grad in (*arrived, *made)
            )
        described, rest = found
        if not rest:
            return described
        return tuple(
            self._draft(grad, each, _NO_TAIL, True)
            if grad is not None and type(each) is int
            else each
            for grad, each in zip((*arrived, *made), described, strict=True)
        )

    def _draft(self, tensor: torch.Tensor, number: int, tail: Tail, measure: bool) -> TensorDraft:
        if not measure:
            return TensorDraft(_head(tensor, number), _NOT_ASKED, tail)
        queue = self._queue
        found = queue.look(tensor, number)
        head = (found and found[0]) or _head(tensor, number)
        if found is None and _is_functorch(tensor):
            head = self._inside_transforms(tensor, head)
        if found is not None:
            draft = TensorDraft(head, found[1], tail)
        else:
            plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
            ticket = (plain and queue.gather(tensor, head)) or queue.add_other(tensor)
            draft = TensorDraft(head, None, tail, ticket)
        if not queue.lean:
            if head[7] in RECTIFIED:
                draft.units = self._units.look(tensor, self._step, queue)
            self._waiting.append(draft)
        return draft

    def _inside_transforms(self, tensor: torch.Tensor, head: Head) -> Head:
        """Know what torch.func wraps when it comes out, and count all that is measured of it."""
        inner = tensor
        while _is_functorch(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
            self.detached(inner, tensor)
        return (*head[:8], inner.numel())

    def compare_rows(self, tensor: torch.Tensor, draft: TensorDraft) -> None:
        """Let the description of a tensor say how far its rows differ."""
        if not draft.is_measured():
            return
        known = row_spread_now(tensor)
        if known is not None:
            draft.spread = self._queue.add_number(known)
            return
        spread = row_spread(tensor)
        if spread is not None:
            (draft.spread,) = self._queue.add_scalars([spread])

    def compare_outputs(self, tensor: torch.Tensor, number: int) -> None:
        """The same for what an outermost module returns: of few tensors a step, and few steps."""
        if self._compared >= _COMPARED or (self._step >= CLOSELY and self._step % SELDOM):
            return
        self._compared += 1
        draft = next((d for d in reversed(self._waiting) if d.id == number), None)
        if draft is not None:
            self.compare_rows(tensor, draft)

    def forget_waiting(self) -> None:
        """Let go of the descriptions that the queue is about to be resolved for."""
        self._waiting = []
        if self.drafts and len(self.drafts) > _FEW:
            # Other threads may describe something meanwhile.
            entries = list(self._known.values())
            alive = {e.id for e in entries if e.step == self._step and e.ref() is not None}
            self.drafts = {n: d for n, d in list(self.drafts.items()) if n in alive}

    def _base_of(self, tensor: torch.Tensor) -> _Known | None:
        """What is known of the tensor that one is a view of."""
        try:
            base = tensor._base if tensor._is_view() else None
        except RuntimeError:
            return None
        entry = self._known.get(id(base)) if base is not None else None
        if entry is not None and entry.ref() is base:
            return entry
        # Of torch.func what is a view comes out as one; of vmap with out_dims=1 a view of it does.
        for origin in (tensor, base) if self._detached else ():
            known = self._detached.get(id(origin))
            if known is not None and known[0]() is origin:
                return known[1]
        return None


_tables: weakref.WeakSet[TensorTable] = weakref.WeakSet()


def let_go(tensor: torch.Tensor) -> None:
    """Keep no weak reference to a tensor anywhere: torch swaps none that has one."""
    for table in list(_tables):
        table.let_go(tensor)


def _head(tensor: torch.Tensor, number: int) -> Head:
    """What a tensor is, in the order of the fields of a `Tensor`. Hot."""
    if compiled.kernel is not None:
        found: Head | None = compiled.kernel.head(tensor, number)
        if found is not None:
            return found
    dense = tensor.layout is torch.strided and not tensor._has_symbolic_sizes_strides
    if dense and type(tensor) in _PLAIN:
        try:
            needs_grad = tensor.requires_grad
            return (
                number,
                tuple(tensor.shape),
                tensor.stride() if not tensor.is_contiguous() else None,
                _DTYPE_NAMES.get(tensor.dtype) or dtype_name(tensor.dtype),
                "cpu" if tensor.is_cpu else str(tensor.device),
                needs_grad,
                tensor.is_leaf,
                grad_fn_name(tensor) if needs_grad else None,
                tensor.numel(),
            )
        except (RuntimeError, TypeError, NotImplementedError):
            pass  # sparse, nested: asked one thing at a time
    fields = describe(tensor, number)
    return (
        number,
        fields["shape"],
        fields.get("stride"),
        fields["dtype"],
        fields.get("device", "cpu"),
        fields.get("requires_grad", False),
        fields.get("is_leaf", False),
        fields.get("grad_fn"),
        fields["numel"],
    )


def describe(tensor: torch.Tensor, number: int) -> dict[str, Any]:
    """What a tensor is, without its values; keys as in `records.Tensor`, defaults left out."""
    fields: dict[str, Any] = {"id": number, "dtype": dtype_name(tensor.dtype)}
    try:
        shape = tuple(tensor.shape)
        fields["numel"] = tensor.numel()
        # Symbolic shapes (a compiler tracing, a jagged dim) are no numbers yet.
        fields["shape"] = shape if all(type(n) is int for n in shape) else None
        if tensor.layout is torch.strided and not tensor.is_contiguous():
            fields["stride"] = tensor.stride()
    except (RuntimeError, TypeError, NotImplementedError):
        fields["shape"] = None
        fields["numel"] = 0
    if type(fields["numel"]) is not int:
        fields["numel"] = 0
    try:
        device = tensor.device
        if device.type != "cpu":
            fields["device"] = str(device)
        if tensor.requires_grad:
            fields["requires_grad"] = True
            fields["grad_fn"] = grad_fn_name(tensor)
        if tensor.is_leaf:
            fields["is_leaf"] = True
    except (RuntimeError, TypeError, NotImplementedError):
        pass  # a subclass that refuses to tell: what is known stands
    return fields


def _has_graph(tensor: torch.Tensor | None) -> bool:
    try:
        return tensor is not None and tensor.requires_grad and not tensor.is_leaf
    except RuntimeError:
        return False


def grad_fn_name(tensor: torch.Tensor) -> str | None:
    """The name of the node that made a tensor; None as in `node_of`."""
    node = node_of(tensor)
    return node.name() if node is not None else None


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype without the prefix: ``float32``."""
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        name = _DTYPE_NAMES[dtype] = str(dtype).removeprefix("torch.")
    return name


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """`version_of` each of several tensors. Hot."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0  # inference tensors do not track versions
