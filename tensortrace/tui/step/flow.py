"""Where a row's tensors come from and where they go: the data flow of a step, walked call by call.

The lines of the step are looked through for an id or a seq, and only those that hold it are
decoded: 1 µs a line, nothing is kept (the columns of `StepRecords` cost 2 MB a thousand calls).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tensortrace.records import Action, Call, Line, Param, Record, Tensor
from tensortrace.run import StepRecords
from tensortrace.text import escape, module_text

Named = Sequence[tuple[str, int]]
# A tensor that nothing made is followed through its views and in-place changes up to here.
FARTHEST = 8
# Records that have tensors, or tell what was done.
KINDS = ("call", "param", "action", "line")
# What no call is found for may be of one that is not in the log.
GAPS = {
    "all": "",
    "some": "not all calls of this step were kept: ",
    "none": "the calls of this step were not kept: ",
}


@dataclass(frozen=True, slots=True)
class Link:
    """A record to go to, and the tensor that leads there: ``input[0]``, ``gradient``."""

    record: Record
    label: str

    @property
    def seq(self) -> int | None:
        """The number of the record within its step."""
        return _seq(self.record)


@dataclass(frozen=True, slots=True)
class Way:
    """Where one can go from a row, and one sentence for when that is nowhere."""

    links: list[Link]
    why: str = ""


class Flow:
    """Questions to one step; `cancelled` is asked every thousand lines, so that a thread ends."""

    def __init__(self, step: StepRecords, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._step, self._cancelled = step, cancelled
        self._lines: list[int] = step.indices(*KINDS).tolist()

    @property
    def gaps(self) -> str:
        """How calls of the step are missing from the log, as a sentence begins; "" if none is."""
        return GAPS[self._step.kept]

    def holding(self, pattern: bytes, numbers: Iterable[int] = ()) -> list[Record]:
        """The records with a text in their line; `numbers` stand for ``%b``, any of them."""
        texts = [b"%d" % number for number in sorted(set(numbers))]
        asked = re.compile(pattern % b"|".join(texts) if texts else pattern)
        found = []
        for at, line in enumerate(self._lines):
            if at % 1000 == 0 and self._cancelled():
                break
            data = self._step.line(line)
            # Most lines hold none of the numbers: to see that first is five times as fast.
            if (not texts or any(text in data for text in texts)) and asked.search(data):
                record = self._step.record(line)
                if record is not None:
                    found.append(record)
        return found

    def about(self, ids: Iterable[int]) -> list[Record]:
        """The records that name one of some tensors, in log order."""
        wanted = set(ids)
        # As a link `["input[0]",7]`, described `"id":7`, or of an action `"tensor":7`.
        pattern = rb'(?:,\s*|"id":\s*|"tensor":\s*)(?:%b)(?!\d)'
        return self.holding(pattern, wanted) if wanted else []

    def of(self, seqs: Iterable[int]) -> list[Call]:
        """The backward and recomputed calls that belong to some forward calls."""
        wanted = set(seqs)
        found = self.holding(rb'"forward":\s*(?:%b)(?!\d)', wanted) if wanted else []
        return [c for c in found if isinstance(c, Call) and c.forward in wanted]

    def call(self, seq: int | None) -> Call | None:
        """The call of a seq."""
        if seq is None:
            return None
        found = self.holding(rb'"seq":\s*(?:%b)(?!\d)', [seq])
        return next((c for c in found if isinstance(c, Call) and c.seq == seq), None)

    def inside(self, seq: int) -> list[Call]:
        """The calls that ran directly inside a call, what a replay repeated of it too."""
        found = self.holding(rb'"parent":\s*(?:%b)(?!\d)', [seq])
        return [c for c in found if isinstance(c, Call) and c.parent == seq]

    def of_module(self, path: str | None) -> list[Call]:
        """The forward calls of a module."""
        found = [r for i in self._lines if isinstance(r := self._step.record(i), Call)]
        return [c for c in found if c.module == path and c.op is None and c.phase == "forward"]


def sources(record: Record | None, flow: Flow) -> Way:
    """What made the inputs of a row; of a gradient, what it arrived from."""
    wanted = taken(record)
    if not wanted:
        return Way([], "nothing goes into this row")
    near = flow.about(number for _, number in wanted)
    links, whys = [], []
    for name, number in wanted:
        made = _maker(number, near, record, flow)
        if made is None and isinstance(record, Call) and record.phase == "backward":
            mirrored = _arrived_from(record, name, flow)
            links += [Link(call, name) for call in mirrored]
            lost = f"{flow.gaps}what passed on {name} is not known" if flow.gaps else (
                f"no call before it in this step passed on {name}")  # fmt: skip
            whys += [] if mirrored else [lost]
        elif made is None:
            whys.append(_no_maker(name, described_tensor(number, near), record, flow.gaps))
        else:
            links.append(Link(made, name))
    again = replayed_maker(record, flow)
    links += [] if again is None else [Link(again, "made inside")]
    return Way(_once(links), "; ".join(map(escape, whys[:3])))


def uses(record: Record | None, flow: Flow) -> Way:
    """What used the outputs of a row; of a gradient, where it went on to."""
    made = _made(record)
    near = flow.about(number for _, number in made)
    links = [
        Link(user, name)
        for name, number in made
        for user in _users(number, near)
        if _seq(user) != _seq(record)
    ]
    if isinstance(record, Call) and record.phase == "backward":
        links += [Link(other, name) for other, name in _passed_to(record, flow)]
        links += [
            Link(param, param.name)
            for param in _params(flow)
            if any(param.name == f"{record.module}.{name}".lstrip(".") for name, _ in made)
        ]
    if isinstance(record, Call) and record.replay and not links:
        # A replay has tensors of its own; what it repeats went on from the call around it.
        links += uses(flow.call(record.parent), flow).links
    if links:
        return Way(_once(links))
    return Way([], _no_user(record, made, flow) if made else "this row made nothing")


def counterparts(record: Record | None, flow: Flow) -> Way:
    """The gradients of a forward call; the forward call of a gradient or of a recomputation."""
    match record:
        case Call(forward=int(seq)):
            call = flow.call(seq)
            links = [] if call is None else [Link(call, "forward")]
            return _found(links, f"its forward call #{seq} is not in this step")
        case Call(phase="backward"):
            links = [Link(call, "forward") for call in flow.of_module(record.module)]
            return _found(links, "its forward call is not known")
        case Call():
            # Ops were replayed for one pass only, and what they repeat has its own gradient.
            found = [Link(c, "gradient" if c.phase == "backward" else "recomputed")
                     for c in flow.of([record.seq])]  # fmt: skip
            return _found(found, f"{flow.gaps}its gradient is not known" if flow.gaps else
                          "no gradient came back to this call in this step")  # fmt: skip
        case Param(grad=Tensor(id=number)):
            links = [Link(call, "gradient") for call in _gradients(record, number, flow)]
            return _found(links, "the call that made its gradient is not in this step")
        case Param():
            return Way([], "this parameter got no gradient in this step")
    return Way([], "this row has no gradient")


def replayed_maker(record: Record | None, flow: Flow) -> Call | None:
    """The replayed op inside a module call that made what is not finite, None without one."""
    if not isinstance(record, Call) or record.op or record.replay or record.phase != "forward":
        return None
    found = [c for c in flow.inside(record.seq) if c.replay and c.phase == "forward"
             and any(t.nonfinite and _has(c.outputs, t.id) for t in c.tensors)]  # fmt: skip
    return max(found, key=lambda call: call.seq, default=None)


def inner_maker(record: Call, flow: Flow) -> Call | None:
    """The innermost call inside a forward call that made what the call gave back."""
    if record.phase != "forward":
        return None
    made = [number for _, number in record.outputs]
    calls = [c for c in flow.about(made) if isinstance(c, Call) and c.phase == "forward"]
    found = [c for c in calls if c.seq > record.seq
             and any(_has(c.outputs, n) and not _has(c.inputs, n) for n in made)]  # fmt: skip
    return max(found, key=lambda call: call.seq, default=None)


# ---- what a record takes and makes


def taken(record: Record | None) -> Named:
    """The tensors that a record took in, by name."""
    match record:
        case Call(inputs=inputs):
            return inputs
        case Param(value=value, grad=grad):
            return [*([("gradient", grad.id)] if grad else []), ("value", value.id)]
        case Action(action=name, tensor=int(number)):
            return [(name, number)]
    return []


def _made(record: Record | None) -> Named:
    match record:
        case Call(outputs=outputs):
            return outputs
        case Param(value=value):
            return [("value", value.id)]
        case Action(action=name, tensor=int(number)):
            return [(name, number)]
    return []


def _maker(number: int, near: list[Record], user: Record | None, flow: Flow) -> Call | None:
    """The innermost call that made a tensor, else what it is a view of or was changed from."""
    for _ in range(FARTHEST):
        calls = [c for c in near if isinstance(c, Call) and c.seq != _seq(user)]
        makers = [c for c in calls if _has(c.outputs, number)]
        # Of nested calls the inner one has the larger seq; one that was given it did not make it.
        makers = [c for c in makers if not _has(c.inputs, number)] or [
            c for c in makers if not isinstance(user, Call) or c.seq < user.seq
        ]
        if makers:
            return max(makers, key=lambda call: call.seq)
        tensor = described_tensor(number, near)
        if tensor is None:
            return None
        before = tensor.view_of if tensor.previous is None else tensor.previous
        if before is None:
            return None
        number, near = before, flow.about([before])
    return None


def _users(number: int, near: list[Record]) -> list[Record]:
    """The innermost calls that were given a tensor, and the loss or parameter that it became."""
    calls = [c for c in near if isinstance(c, Call) and _has(c.inputs, number)]
    inside = {c.parent for c in calls if not c.replay}
    found: list[Record] = [c for c in calls if c.seq not in inside]
    found += [a for a in near if isinstance(a, Action) and a.tensor == number]
    found += [
        p for p in near if isinstance(p, Param) and p.grad is not None and p.grad.id == number
    ]
    return found


def _arrived_from(back: Call, name: str, flow: Flow) -> list[Call]:
    """Whose gradient arrived at an output of a forward call: the backward of those that used it."""
    forward = flow.call(back.forward)
    number = dict(forward.outputs).get(name) if forward is not None else None
    if number is None:
        return []
    users = [c for c in _users(number, flow.about([number])) if isinstance(c, Call)]
    used = {c.seq: [n for n, i in c.inputs if i == number] for c in users if c.phase == "forward"}
    found = [c for c in flow.of(used) if c.phase == "backward" and c.seq < back.seq]
    exact = [c for c in found if any(n in used[c.forward or 0] for n, _ in c.outputs)]
    return exact or found


def _passed_to(back: Call, flow: Flow) -> list[tuple[Call, str]]:
    """Where a gradient went on to: the backward of the calls that made the inputs."""
    forward = flow.call(back.forward)
    if forward is None:
        return []
    near = flow.about(number for _, number in forward.inputs)
    makers = [(made.seq, name) for name, number in forward.inputs
              if (made := _maker(number, near, forward, flow)) is not None]  # fmt: skip
    found = [c for c in flow.of(seq for seq, _ in makers) if c.phase == "backward"]
    return [(c, name) for c in found if c.seq > back.seq for seq, name in makers
            if seq == c.forward]  # fmt: skip


def _gradients(param: Param, number: int, flow: Flow) -> list[Call]:
    calls = [r for r in flow.about([number]) if isinstance(r, Call) and _has(r.outputs, number)]
    if calls:
        return calls
    local = param.name.rpartition(".")[2]
    found = flow.holding(b'"phase":\\s*"backward"')
    return [c for c in found if isinstance(c, Call) and c.module == param.module
            and any(name == local for name, _ in c.outputs)]  # fmt: skip


def _params(flow: Flow) -> list[Param]:
    return [r for r in flow.holding(b'"kind":\\s*"param"') if isinstance(r, Param)]


def _seq(record: Record | None) -> int | None:
    return getattr(record, "seq", None)


def _has(named: Named, number: int) -> bool:
    return any(other == number for _, other in named)


def described_tensor(number: int, near: Iterable[Record]) -> Tensor | None:
    """The tensor of an id, as the first of some records that has it describes it."""
    for record in near:
        held: Sequence[Tensor | None] = ()
        if isinstance(record, Call | Line):
            held = record.tensors
        elif isinstance(record, Param):
            held = (record.value, record.grad)
        found = next((t for t in held if t is not None and t.id == number), None)
        if found is not None:
            return found
    return None


def _no_user(record: Record | None, made: Named, flow: Flow) -> str:
    """Say in one line why no call used what a record made."""
    told = escape(", ".join(name for name, _ in made[:3]))
    if isinstance(record, Call) and record.op is None and record.parent is not None:
        beside = flow.inside(record.parent)
        if record.phase == "forward" and not any(c.op and not c.replay for c in beside):
            return (
                f"no recorded call used {told}: at this level ops inside modules are not recorded"
            )
    if flow.gaps:
        return f"{flow.gaps}what used {told} is not known"
    return f"nothing in this step used {told}"


def _no_maker(name: str, tensor: Tensor | None, user: Record | None, gaps: str) -> str:
    """Say in one line why no call made a tensor."""
    if tensor is not None and tensor.from_step is not None:
        return f"nothing in this step made {name}: it came from step {tensor.from_step}"
    if gaps:
        return f"{gaps}what made {name} is not known"
    if isinstance(user, Param):
        return f"nothing in this step made {name}"
    if isinstance(user, Call) and user.parent is not None and user.op is None and not (
        tensor is not None and tensor.is_leaf
    ):  # fmt: skip
        where = "the module around it" if not user.module else f"around {module_text(user.module)}"
        return f"what made {name} was not recorded: an op {where}"
    return f"nothing in this step made {name}: it came from outside"


def _found(links: list[Link], why: str) -> Way:
    return Way(links, "" if links else why)


def _once(links: list[Link]) -> list[Link]:
    """Each record once, in the order of the step; the names that lead there together."""
    by_seq: dict[int, list[Link]] = {}
    for link in links:
        if link.seq is not None:
            by_seq.setdefault(link.seq, []).append(link)
    return [
        Link(same[0].record, ", ".join(dict.fromkeys(link.label for link in same)))
        for _, same in sorted(by_seq.items())
    ]
