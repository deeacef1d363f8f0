"""What an action's `detail` holds, by action and key: the vocabulary below a record's own fields.

All keys may be missing. `well_typed` leaves out what has another type than it says here, so that a
check or a screen needs to doubt whether a key is there, and never what it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import msgspec

from tensortrace.records import Action, Location, Phase, Scalar

# Exact as a float too.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
# The functional form, for "as": the name that the user's line has for a tensor.
Described = TypedDict(
    "Described",
    {
        "as": str, "shape": list[Count] | None, "dtype": str, "device": str,
        "requires_grad": bool, "is_leaf": bool, "grad_fn": str, "min": int, "max": int,
        "value": bool | int | float | str | None, "cls": str, "module": str | None,
    },
    total=False,
)  # fmt: skip


class Named(Described):
    """A tensor or another operand of a line, by its name."""

    name: str


class ZeroGrad(TypedDict, total=False):
    """`left` parameters outside every optimizer keep gradients that `grown` calls added to.

    Called on a module, it clears parameters of `optimizers`. Of an optimizer that has never
    stepped `still` says that there were gradients, and that its first parameters are what they were
    at its last one; `lr` is then that of each group, and `held` names, once, what it holds.
    """

    set_to_none: bool
    parameters: Count
    optimizers: list[Count]
    left: Count
    left_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    grown: Count
    still: bool
    lr: list[Scalar | None]
    held: list[str]


class Clip(TypedDict, total=False):
    """By norm, or by `value`; `outside` counts gradients among them that no optimizer holds."""

    total_norm: Scalar | None
    max_norm: Scalar | None
    value: Scalar | None
    outside: Count


class Scale(TypedDict, total=False):
    """What a GradScaler multiplies by, and what it has found."""

    scale: Scalar | None
    found_inf: Scalar | None


class Kept(TypedDict):
    """What still lives with its graph and was last met before the last step; the latest of them."""

    tensors: Count
    oldest: Count
    step: Count
    id: Count
    shape: list[Count]
    grad_fn: str | None


class ByHand(TypedDict):
    """A weight that a loop without an optimizer has moved since the last backward.

    `cleared` says whether its gradient was cleared, or written, since; `name` is None of a tensor
    that no module has.
    """

    name: str | None
    shape: list[Count]
    cleared: bool


class Loss(TypedDict, total=False):
    """What entered `GradScaler.scale`, or else what `backward()` was called on.

    `gradients`: by optimizer, whether those of its last step lie untouched as backward begins
    ("kept") or were written since ("changed"); nothing if they are gone.
    `graph`: name of an autograd node, places of its inputs in this list; nearest first, views out.
    `beside_classes`: of the log-probabilities that nll_loss takes, of `classes_shape`, the dim that
    their softmax was taken over, and that of the classes, where it is another.
    `single`: place in `graph` and shape of each softmax over one element, whose result is constant.
    `copied` is 1 where the targets of a cross entropy are the tokens that an embedding was given,
    each at its place, 0 where they are others; given where a path leads from one to the other. Then
    `causal` is 1 where an attention sees what came before alone, 0 where it sees more.
    `left` parameters of no module that ran and of no optimizer have a gradient already: one of them
    has `left_shape`, and its gradient, at most `left_absmax`, has grown over `left_updates`.
    `by_hand` is given in full steps before an optimizer was met.
    """

    value: Scalar
    shape: list[Count]
    dtype: str
    gradients: dict[str, Literal["kept", "changed"]]
    graph: list[tuple[str, list[Count]]]
    beside_classes: list[Count]
    classes_shape: list[Count]
    single: list[tuple[Count, list[Count]]]
    copied: Scalar
    causal: Scalar
    left: Count
    left_shape: list[Count]
    left_updates: Count
    left_absmax: Scalar
    by_hand: ByHand
    kept: Kept


class Mode(TypedDict, total=False):
    """How many modules `train()` or `eval()` reached, or are compiled and not visible.

    `again` of an eval() whose module was in eval mode already, with updates since the last one.
    """

    modules: Count
    again: bool


class Loader(TypedDict, total=False):
    """A DataLoader begins to be read; `batches` of an epoch, None if that is not known.

    `order` is a hash of what decides the order in which a `sampler` draws, if it shuffles;
    `sampler_index` tells samplers of one class apart.
    """

    host_ns: Count
    batches: Count | None
    workers: Count
    pin_memory: bool
    shuffled: bool
    replacement: bool
    order: str
    sampler: str
    sampler_index: Count


class Fetch(TypedDict, total=False):
    """How long the loop waited for a batch."""

    host_ns: Count


class Duplicates(TypedDict, total=False):
    """Rows of a batch that were there before: `within` it, or `earlier` in the epoch."""

    rows: Count
    within: Count
    earlier: Count


class Sync(TypedDict, total=False):
    """The host waits for a device, outside modules; on full steps only."""

    device: str


class Kernel(TypedDict, total=False):
    """A kernel of ours for tensors of a dtype was compiled, within what the step took."""

    dtype: str
    host_ns: Count


class LoadStateDict(TypedDict, total=False):
    """Which names matched; a prefix that most names of one side have in front of the other's.

    `optimizers` are those that hold a parameter of the module. Of the tensors given `own` are the
    very ones that the module holds by their names. Where state_dict() was seen to return them,
    `updates` counts the steps of those optimizers since, and `reloaded` says whether another state
    was loaded since; neither is there if the loop itself has written them meanwhile.
    """

    optimizers: list[Count]
    own: Count
    updates: Count
    reloaded: bool
    matched: Count
    missing: Count
    unexpected: Count
    examples: list[str]
    prefix_given: str
    prefix_wanted: str


class Hook(TypedDict):
    """A forward hook of the program's, and the paths of modules that it runs before and after."""

    at: Location
    before: list[str]
    after: list[str]


class Replay(TypedDict, total=False):
    """One call was run again at op level: where the value was `placed`, or why it could not be.

    If no op made it: where the `hooks` of a backward are, the `forward_hooks`, and whether one
    changed what the root was given (`hooked`); `buffers` are names by the id of a tensor.
    """

    phase: Phase
    forward: Count
    host_ns: Count
    placed: str
    op: str
    seq: Count
    differs: Any
    hooks: list[Location]
    forward_hooks: list[Hook]
    hooked: bool
    buffers: dict[str, str]


class KeyNames(TypedDict):
    """How many keys, and the first of them."""

    count: Count
    names: list[str]


class KeySizes(TypedDict):
    """How many keys, and of the first ones name, dims in the checkpoint and dims in the model."""

    count: Count
    first: list[tuple[str, str, str]]


class StateDict(TypedDict):
    """What torch's message says about a state dict that does not fit."""

    missing: KeyNames
    unexpected: KeyNames
    sizes: KeySizes


class Raised(TypedDict, total=False):
    """An exception that left the loop, as `capture/exceptions.py` reads it off its frames."""

    type: str
    message: str
    module: str
    phase: Phase
    lines: list[tuple[Count, str]]
    expression: str
    operation: str
    function: str
    torch: list[str]
    settings: dict[str, int | list[int]]
    options: dict[str, int]
    operands: list[Named]
    arguments: list[Named]
    entered: list[Described]
    parameters: list[Named]
    state_dict: StateDict


class Threads(TypedDict, total=False):
    """Written once, when more than one thread trains: how many do."""

    threads: Count


class TracerError(TypedDict, total=False):
    """A fault of the tracer's own, or of a check's: which part stopped, and why."""

    where: str
    error: str
    traceback: str


DETAILS: dict[str, type] = {
    "zero_grad": ZeroGrad, "clip": Clip, "unscale": Scale, "scale": Scale, "loss": Loss,
    "train": Mode, "eval": Mode, "compiled": Mode, "loader": Loader, "fetch": Fetch,
    "duplicates": Duplicates, "sync": Sync, "kernel": Kernel, "load_state_dict": LoadStateDict,
    "replay": Replay, "exception": Raised, "threads": Threads,
    "tracer_error": TracerError,
}  # fmt: skip
_TYPES = {action: get_type_hints(detail, include_extras=True) for action, detail in DETAILS.items()}


def well_typed(action: Action) -> Action:
    """Leave out of an action's detail the keys that hold another type than `DETAILS` says.

    A graph that leads to places outside itself goes too.
    """
    if not action.detail:
        return action
    types = _TYPES.get(action.action, {})
    kept = {key: value for key, value in action.detail.items() if _fits(value, types.get(key, Any))}
    if any(place >= len(kept["graph"]) for _, above in kept.get("graph", ()) for place in above):
        del kept["graph"]
    same = len(kept) == len(action.detail)
    return action if same else msgspec.structs.replace(action, detail=kept)


def _fits(value: Any, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return False
    return True
