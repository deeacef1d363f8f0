"""The vocabulary: one type per kind of log line.

A record is a frozen struct; its type is both the schema of the log line and its codec. A key whose
value equals the default is left out of the line, so a reader takes what is missing as the default.
Every record carries `step`; within a step `seq` orders what happened.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

import msgspec

FORMAT = "tensortrace"
FORMAT_VERSION = 1

Phase = Literal["forward", "backward", "optimizer"]
Severity = Literal["error", "warning", "note"]
# The worst first.
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
# What arithmetic on times and lines can carry; more is no time of anybody's.
Whole = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
# JSON has no NaN or infinity: a scalar that may be one is a number or its name.
Scalar = float | Literal["NaN", "Infinity", "-Infinity"]
# Of `Tensor.exponents`: how many ranges, the exponent of 2 where range 1 begins, how many
# exponents a range holds.
BUCKETS, LOWEST, WIDTH = 16, -32, 4
# The op of a call of torch.autograd.grad: a step forward whose result a backward pass makes. The
# backward calls of that pass come after it and before the next forward call.
DERIVATIVE = "autograd.grad"


class Location(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A source line of the user's: `code` is its text where it was worth storing.

    Of a line in an installed package `caller` is the nearest line above that is in none.
    """

    file: str
    line: Whole
    function: str
    code: str | None = None
    caller: Location | None = None


class Tensor(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one tensor was at one moment.

    Numbers are over the finite elements, of a complex tensor over their moduli; None if there are
    none, and where they were not measured: of large tensors in thin steps, and with `stats=`.

    Attributes:
        id: unique within its step, from 0.
        shape: None where it has no plain one (nested, symbolic).
        stride: in elements; None if it is contiguous or not strided.
        dtype: as torch names it: "float32".
        device: "cpu", "cuda:0".
        requires_grad, is_leaf: as torch says.
        grad_fn: the node that made it, "AddmmBackward0"; None without one or if torch refuses.
        numel: how many elements it has; 0 where torch does not say.
        nan, posinf, neginf: how many elements are that; exact, 0 if `unmeasured`.
        zeros: how many are 0; 0 with `stats="minmax"` too.
        min, max, mean: in its own units.
        std: the population's, ``correction=0``.
        norm: L2.
        unmeasured: why there are no statistics ("meta", "fake", "off", ...); None if there are.
        first_bad: where, row by row, the first element is that is not finite; None if all are, or
            it was not looked for.
        exponents: how many elements of a sample (at most 4096) have a magnitude below 2**-32, from
            there below 2**-28 and so on by factors of 16, at last from 2**24 on; zeros and what is
            not finite are in none. None but in full steps, of floats of 64 elements and more, off
            the CPU of float16 and bfloat16 only.
        grad_of: the id of the tensor whose gradient it is; None of others, and if not known.
        previous: its id before it was changed in place; None if it was not.
        view_of: the id of the tensor that it is a view of or was detached from; None of others, and
            if that was not met in the step.
        from_step: the earlier step in which it, or what it was detached from, was met last; None
            if it is new.
        units: how many units the layer has whose ReLU it is; None of other tensors, and until
            enough was seen.
        dead: how many of them were above 0 for no input of the last eight steps looked at, and of
            300 rows at least; None as `units`.
        dead_since: the step since which none of those was; None if none is dead.
        row_spread: how far the rows, along the first dim, are from their mean, as a share of their
            norm, in a sample: 0 if all are alike. Of what an outermost module returns, and of
            parameters and gradients at their first optimizer steps; else None.
    """

    id: int
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    requires_grad: bool = False
    is_leaf: bool = False
    grad_fn: str | None = None
    numel: int = 0
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    unmeasured: str | None = None
    first_bad: int | None = None
    exponents: tuple[int, ...] | None = None
    grad_of: int | None = None
    previous: int | None = None
    view_of: int | None = None
    from_step: int | None = None
    units: int | None = None
    dead: int | None = None
    dead_since: int | None = None
    row_spread: float | None = None

    @property
    def nonfinite(self) -> int:
        """How many elements are NaN or infinite."""
        return self.nan + self.posinf + self.neginf

    @property
    def rms(self) -> float | None:
        """Root mean square over the finite elements: `norm` / sqrt(how many they are).

        None if there are none, or if the norm is not known.
        """
        finite = self.numel - self.nonfinite
        return None if self.norm is None or finite <= 0 else self.norm / math.sqrt(finite)


class ParameterInfo(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A parameter as its module declares it; `name` is local to the module."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    requires_grad: bool = True


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of every log line; `step` comes right after `kind` so that a reader can bisect by it."""

    step: int


class Header(Record, frozen=True, kw_only=True, omit_defaults=False, tag="header"):
    """First line: what ran, where, with which versions and options."""

    format: str
    version: int
    run_id: str
    time_ns: Whole
    argv: list[str]
    python: str
    torch: str
    tensortrace: str
    hostname: str = ""
    pid: int = 0
    cwd: str = ""
    rank: int = 0
    world_size: int = 1
    seed: int | None = None
    deterministic: dict[str, bool] = {}
    kernel: str = "torch"
    options: dict[str, Any] = {}


class Module(Record, frozen=True, kw_only=True, tag="module"):
    """A module, written at its first call and again when it changes.

    `path` as in `named_modules()` ("" is the root). `alias` is a better path learnt later.
    `forward` is where the class defines its forward. `registered` is False if it ran inside a
    module that does not hold it, directly or further in; what it holds itself is registered in it.
    `untrained` is True of a norm that is in eval mode and still has the statistics it was made with
    (BatchNorm, spectral norm; known on the CPU only). `drops` is the line of its forward that calls
    F.dropout without `training=`, of a module in eval mode. `frozen` are attributes that are False
    and freeze nothing: `requires_grad` of the module, "weight.require_grad" of a parameter.
    `places` is how often running its container holds it, if nothing else does; 0 if it is once.
    `inert` is True of a dropout whose share to drop is 0: it is the same in both modes.
    """

    path: str
    cls: str
    parameters: list[ParameterInfo] = []
    training: bool = True
    alias: str | None = None
    forward: Location | None = None
    registered: bool = True
    untrained: bool = False
    drops: Location | None = None
    frozen: list[str] = []
    places: int = 0
    inert: bool = False


class Source(Record, frozen=True, kw_only=True, tag="source"):
    """The text of one function of the user's, from line `first_line` of `file`."""

    file: str
    name: str
    first_line: Whole
    text: str

    @property
    def lines(self) -> list[str]:
        """The text line by line: only a line feed ends one, str.splitlines knows eight more."""
        return self.text.removesuffix("\n").split("\n")

    def line(self, number: int) -> str | None:
        """The text of a line of `file`; None of one that the function does not have."""
        lines, at = self.lines, number - self.first_line
        return lines[at] if 0 <= at < len(lines) else None


class Call(Record, frozen=True, kw_only=True, tag="call", gc=False):
    """One call of a module or an op, forward or backward.

    Attributes:
        seq: its place among what happened in the step.
        update: how many optimizer steps came before, but for skipped ones.
        parent: the seq of the module call that it ran inside; None outside every one, and of a
            backward call that is no replay.
        phase: "forward" or "backward".
        forward: the seq of the forward call that a backward or recomputed one belongs to; None of
            others, of a parameter's gradient, and if it is not known or was in an earlier step.
        module: the path of the module, of an op of the one it ran inside; None outside them all.
        op: the name of the op; None of a module's own call.
        arguments: of an op, those that are no tensors, by name.
        node: of the backward of an op, the autograd node, "AddmmBackward0"; else None.
        nth: how many calls of the module came before in the step, of a backward or recomputed one
            before its forward; 0 of an op.
        recompute: whether a checkpoint ran it again, for the backward.
        replay: whether we ran it again, to find the op to blame.
        thread: 0 for the one that entered the trace, from 1 for others; 0 of a backward call.
        training: the mode of its module; None of an op outside modules, and of a backward call.
        grad_enabled: whether gradients were on, as it began; not looked at in the backward.
        autocast: where autocast was on, "cuda:bfloat16"; None if nowhere, or in the backward.
        location: the user's line that called it, of the backward of an op the op; None of the
            backward of a module, and if it is not known.
        inputs: name and id of each tensor that it took, "input[0]", "mask"; of a backward call the
            gradients that arrived, "output[0]" after the output they are of. Empty of an op of a
            loop that was passed over, but whose output something else took.
        outputs: the same of what it returned; of a backward call the gradients that it made, named
            after the input or parameter that they are of.
        tensors: describes those of both that no earlier line of the step described.
        host_ns: ns on the host, calls inside included; 0 where it was not measured, as in the
            backward.
        device_ns: ns between its beginning and end on a GPU, our statistics of the calls inside
            included; None but of module calls there.
        allocated: bytes that tensors have on the GPU, as a module call ended; None without one.
        exception: the class of what it raised; None if it returned.
        drew: whether it is an outermost call in eval mode that has moved torch's random state,
            where a module of the run has `drops`.
    """

    seq: int
    update: int = 0
    parent: int | None = None
    phase: Phase = "forward"
    forward: int | None = None
    module: str | None = None
    op: str | None = None
    arguments: dict[str, Any] = {}
    node: str | None = None
    nth: int = 0
    recompute: bool = False
    replay: bool = False
    thread: int = 0
    training: bool | None = None
    grad_enabled: bool = True
    autocast: str | None = None
    location: Location | None = None
    inputs: list[tuple[str, int]] = []
    outputs: list[tuple[str, int]] = []
    tensors: list[Tensor] = []
    host_ns: Whole = 0
    device_ns: Whole | None = None
    allocated: int | None = None
    exception: str | None = None
    drew: bool = False


class Param(Record, frozen=True, kw_only=True, tag="param"):
    """One parameter at an optimizer step.

    `name` is the full name (`encoder.weight`), `module` the path of its owner, None if no module
    that ran owns it. `value` is before the step, `grad` as the optimizer saw it. `update_norm` is
    the L2 norm of the change, estimated from `sampled` strided elements; `update_ratio` is it over
    the norm of the value on the same sample. `changed` is False if the optimizer did not write it.
    """

    seq: int
    update: int = 0
    optimizer: int
    name: str
    module: str | None = None
    value: Tensor
    grad: Tensor | None = None
    update_norm: Scalar | None = None
    update_ratio: Scalar | None = None
    sampled: int = 0
    changed: bool = True


class Optimizer(Record, frozen=True, kw_only=True, tag="optimizer"):
    """One optimizer step, written when it begins: this line is a gate.

    Attributes:
        seq: its place among what happened in the step.
        update: how many optimizer steps came before, but for skipped ones.
        index: which optimizer of the run, from 0.
        cls: its class, "AdamW".
        lr: of each parameter group; None of one on a device, which is not waited for.
        grad_norm: L2 over all gradients that it holds; None if there are none, or one of them was
            not measured.
        skipped: whether a GradScaler has skipped it.
        no_grad: how many of its parameters have no gradient.
        parameters: the names it holds, at its first step and when they change; else None.
        unowned: with `parameters`: the shapes of those that no module has, or has any more, whose
            names are made up ("group0.3").
        eps: with `parameters`: what each group adds to a denominator, None of one that does not;
            empty if none does.
        stray: what is NaN or infinite of the weight decay, momentum and betas of a group, as
            "0.weight_decay"; a learning rate that is stays in `lr`.
        added: whether a backward has added to the first gradient that its step before has left;
            None if it has left none.
        moved: in full steps: parameters that got a gradient and that no optimizer holds, and that
            are others, or hold other values, than at the last such step, or have kept no gradient;
            and tied ones that it holds by another name.
        anew: whether it is the first step of one that takes the number of another, which is gone,
            and holds other parameters.
        lost_state: at the first step of one that takes the number and the parameters of another,
            which is gone, and begins without its state: how many steps that had taken; else 0.
        location: the user's line that called it; None if not known.
    """

    seq: int
    update: int = 0
    index: int
    cls: str
    lr: list[Scalar | None] = []
    grad_norm: Scalar | None = None
    skipped: bool = False
    no_grad: int = 0
    parameters: list[str] | None = None
    unowned: list[tuple[int, ...]] = []
    eps: list[float | None] = []
    stray: dict[str, Scalar] = {}
    added: bool | None = None
    moved: list[str] = []
    anew: bool = False
    lost_state: int = 0
    location: Location | None = None

    @property
    def highest_lr(self) -> float:
        """The highest learning rate of its groups; 0 where none is known."""
        if len(self.lr) == 1 and type(self.lr[0]) is float:  # as nearly always. Hot
            return self.lr[0]
        known = [rate for rate in map(from_scalar, self.lr) if rate is not None]
        return max(known, default=0.0)


class Variable(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A variable at a source line: `name` as one writes it (`x`, `batch["ids"]`), `text` short.

    `was` is the text before, None of one that is new. `tensors` are those in it, as the place in
    the value ("" for the value itself, "[0]", "['ids']", ".logits") and the id; `others` are the
    members beside them that hold none, as the place and a short text.
    """

    name: str
    text: str
    was: str | None = None
    tensors: list[tuple[str, int]] = []
    others: list[tuple[str, str]] = []


class Line(Record, frozen=True, kw_only=True, tag="line"):
    """One executed source line of the user's, and the variables that it changed.

    It is written when it has ended; the calls that it made have a `seq` between its own and that of
    the next line of its frame. A frame that an exception leaves has no "return". Where a step
    begins within a frame there is a "call" too: what is carried over has a `was` equal to its text
    there, and no tensors.

    Attributes:
        seq: its place among what happened in the step.
        update: how many optimizer steps came before, but for skipped ones.
        what: "call" where a function or block is entered or goes on, "line", "return", "exception".
        frame: the seq of the first record of its frame in the step.
        depth: how many traced frames are around it.
        parent: the seq of the module call that it ran inside; None outside every one.
        thread: 0 for the one that entered the trace, from 1 for others.
        location: where it is.
        changed: the variables that it changed; of a "call" the arguments or variables.
        value: of "return" and "exception", what it is, named "return", "yield" or "exception"; else
            None.
        tensors: describes those that no earlier line of the step described.
        nth: how many executions in its frame and step came before. A statement over several lines
            may have a line twice in one execution: both have the same, which is -1 if the first of
            them was in the step before.
        passed_over: how many executions since its last record have none; of a "call" how many
            calls of the function were not followed. If the last of a step was not either, its
            record is the only one of its frame.
        since: the seq at which the first of those executions began; None without any, and of a
            "call".
        host_ns: ns that it took, calls included; 0 but of a "line".
        flags: "nonfinite" if it made the first NaN or infinity of its step, "broadcast" if shapes
            met that were hardly meant to.
    """

    seq: int
    update: int = 0
    what: Literal["call", "line", "return", "exception"] = "line"
    frame: int = 0
    depth: int = 0
    parent: int | None = None
    thread: int = 0
    location: Location
    changed: list[Variable] = []
    value: Variable | None = None
    tensors: list[Tensor] = []
    nth: int = 0
    passed_over: int = 0
    since: int | None = None
    host_ns: Whole = 0
    flags: list[Literal["nonfinite", "broadcast"]] = []


ActionName = Literal[
    "zero_grad", "clip", "unscale", "scale", "loss", "train", "eval", "loader", "fetch",
    "duplicates", "sync", "load_state_dict", "compiled", "kernel", "gate", "replay", "exception",
    "threads", "tracer_error",
]  # fmt: skip


class Action(Record, frozen=True, kw_only=True, tag="action"):
    """What the loop did that is no call; `details` says what `detail` holds, by action.

    A "gate" says that what came before was decided here although no optimizer stepped. `of` names
    the module or optimizer class, the dataset of a loader, the op that a sync waited in.
    """

    seq: int
    update: int = 0
    action: ActionName
    of: str | None = None
    optimizer: int | None = None
    tensor: int | None = None
    location: Location | None = None
    detail: dict[str, Any] = {}


class ChainLink(msgspec.Struct, frozen=True):
    """One link of a cause chain, cause first."""

    seq: int | None
    tensor: int | None
    op: str | None
    location: Location | None


class Finding(Record, frozen=True, kw_only=True, omit_defaults=False, tag="finding"):
    """One thing that a check found. Other tools read it: its fields do not change.

    Attributes:
        id: unique in its run; later step lines count by it what followed.
        step, update: when it was found: the step, and how many optimizer steps came before.
        code, check: the check's number and name, "TT101" and "nonfinite-forward".
        severity: "error" for certain, "warning" probable, "note" worth knowing.
        phase, module, op, param: the place; None where it is in no such thing. `module` is a path,
            "" for the model itself.
        seq, tensor: the record of that step, and the id of the tensor in it, that it is about.
        message: one sentence: the number, the limit, the place.
        value, limit: that number and that limit, where there are some.
        location: the user's line.
        explanation: why that happens, or what one sees of it.
        evidence: what else the check knows, by name; "placed" says how sure the place is.
        chain: what led to it, cause first.
        fix: what to try, the most likely first.
    """

    id: str
    update: int
    code: str
    check: str
    severity: Severity
    phase: Phase | None
    module: str | None
    op: str | None
    param: str | None
    seq: int | None
    tensor: int | None
    message: str
    value: Scalar | None
    limit: Scalar | None
    location: Location | None
    explanation: str
    evidence: dict[str, Any]
    chain: list[ChainLink]
    fix: str


class ModuleColumns(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One row per module that ran in the step, in order of first call, as parallel arrays.

    `output_rms`, `grad_rms` (gradient of its outputs) and `param_grad_rms` (gradient of its own
    parameters, before clipping) are root mean squares over finite elements, the largest over the
    calls of the step; `update_ratio` is the largest over its own parameters; None where not seen.
    `flags` is a string of letters: n NaN, i infinite, o in an output, g in a gradient, f finding.
    """

    path: list[str] = []
    output_rms: list[float | None] = []
    zero_frac: list[float | None] = []
    grad_rms: list[float | None] = []
    param_grad_rms: list[float | None] = []
    update_ratio: list[float | None] = []
    flags: list[str] = []


# The columns beside the paths; `flags`, the only one of texts, is the last.
COLUMNS = ModuleColumns.__struct_fields__[1:]


class Step(Record, frozen=True, kw_only=True, tag="step"):
    """Closes a step. `full` says that its calls and parameters are in the log.

    `host_ns` is the time on the host since the step began. `repeats` counts, by finding id, what
    followed from an earlier finding. Of a step that `rested` only the outermost module calls were
    seen, and the gradients and updates of all parameters.
    """

    seq: int
    update: int = 0
    time_ns: Whole = 0
    host_ns: Whole = 0
    full: bool = True
    rested: bool = False
    loss: Scalar | None = None
    grad_norm: Scalar | None = None
    lr: list[Scalar | None] = []
    skipped: bool = False
    records: int = 0
    dropped: int = 0
    repeats: dict[str, int] = {}
    modules: ModuleColumns = ModuleColumns()


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """The exception that ended a run: innermost `module`, and the user's line."""

    type: str
    message: str
    module: str | None = None
    location: Location | None = None


class End(Record, frozen=True, kw_only=True, tag="end"):
    """Last line of a run that ended by itself."""

    why: Literal["exit", "exception", "interrupt"]
    steps: int = 0
    updates: int = 0
    findings: dict[Severity, int] = {}
    records: int = 0
    thinned: int = 0
    dropped: int = 0
    elapsed_ns: Whole = 0
    failure: Failure | None = None


AnyRecord = (
    Header | Module | Source | Call | Param | Optimizer | Line | Action | Finding | Step | End
)


_NOT_FINITE = frozenset(("NaN", "Infinity", "-Infinity"))


def to_scalar(x: float) -> Scalar:
    """Write a float that may be NaN or infinite as JSON can carry it."""
    if math.isfinite(x):
        return x
    return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"


def from_scalar(x: object) -> float | None:
    """Read a scalar back as a float; None for what is none, as in a detail that somebody wrote."""
    if isinstance(x, (int, float)):
        return float(x)
    return float(x) if isinstance(x, str) and x in _NOT_FINITE else None
