"""Which -inf is a mask and which is data: log(0) in a spectrogram, a missing value.

A mask says of each position that it is there, 0, or not, -inf; data vary. Where they do alike (a
bias by distance), it is data if a product, a norm or a loss makes NaN or +inf of it. So is what
came in as +inf, and became -inf in a difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeGuard

from tensortrace.kinds import DISTANCE_OPS
from tensortrace.records import Call, Module, Tensor

# What has no use for a mask among its first inputs, and makes one value of many.
_TAKES_DATA = frozenset((
    "linear", "bilinear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum",
    "conv1d", "conv2d", "conv3d", "layer_norm", "batch_norm", "group_norm", "instance_norm",
    *DISTANCE_OPS,
))  # fmt: skip
_PRODUCTS = re.compile(
    r"(NonDynamicallyQuantizable)?Linear|Bilinear|Conv(Transpose)?\dd|(Sync)?(Batch|Layer|Group|Instance|RMS)Norm(\dd)?|"
    r"(MSE|L1|SmoothL1|Huber)Loss"
)
# Their gates make something finite of -inf, and NaN in backward.
_GATES = re.compile(r"(LSTM|GRU|RNN)(Cell)?")
# What makes +inf of -inf; a mask is added, and not squared or taken from something.
_TURNS = frozenset(("abs", "pow", "square"))
# A sign makes +inf again of the -inf that a difference made of +inf.
_SIGNS = frozenset(("neg", "mul"))
# The -inf that these make is theirs, also where a cost of +inf was taken from what went in.
_SETTLES = frozenset(("softmax", "logsoftmax", "log_softmax", "logsumexp", "log", "exp"))
_TAKES_MASKS = re.compile("softmax|attention|transformer|mask", re.IGNORECASE)


def bad_data(
    number: int, calls: Iterable[Call], tensors: Mapping[int, Tensor], modules: Mapping[str, Module]
) -> set[int]:
    """The ids of tensors whose -inf came in as data, or was made of that or of +inf that came in.

    Args:
        number: of the step.
        calls: of the step, in order of seq.
        tensors: of the step, by id.
        modules: of the run, by path.
    """
    calls = [c for c in calls if c.phase == "forward" and not c.recompute and not c.replay]
    spoilt, unseen = _spoilt_inside(calls, tensors, modules)
    found: set[int] = set()
    made: set[int] = set()
    sources: dict[int, set[int]] = {}  # by id: what came in that its -inf or +inf may be from
    for call in calls:
        for at, (_, id) in enumerate(call.inputs):
            tensor = tensors.get(id)
            outside = call.parent is None and id not in made and id not in sources
            data = _may_be_data(tensor) and tensor.from_step in (None, number - 1)
            if outside and (data or _is_infinite(tensor)):
                sources[id] = {id}
            if id not in sources or not _has_neginf(tensor):
                continue
            if call.seq in spoilt or (call.seq in unseen and at == 0):
                found |= {id, *sources[id], *spoilt.get(call.seq, ())}
            elif _is_turned(call, at, tensors) or _is_turned_back(call, tensors, sources[id]):
                found |= {id, *sources[id]}
        given = set().union(*(sources.get(id, ()) for _, id in call.inputs))
        if _word(call) in _SETTLES:
            given = {id for id in given if not _is_infinite(tensors.get(id))}
        for _, id in call.outputs:
            made.add(id)
            result = tensors.get(id)
            if given and id not in sources and (_has_neginf(result) or _is_infinite(result)):
                sources[id] = given | {id}
    return found | {id for id, given in sources.items() if given & found}


def _spoilt_inside(
    calls: list[Call], tensors: Mapping[int, Tensor], modules: Mapping[str, Module]
) -> tuple[dict[int, set[int]], set[int]]:
    """The seqs of outermost calls in which a product, norm or loss made bad values of -inf.

    Returns:
        Those, with the ids of what such a product took, and the ones that made bad values and of
        which nothing inside was seen, though they have modules inside.
    """
    root_of: dict[int | None, int] = {}
    seen: set[int] = set()
    spoilt: dict[int, set[int]] = {}
    unseen: set[int] = set()
    for call in calls:
        root = root_of[call.seq] = root_of.get(call.parent, call.seq)
        seen |= {root} if root != call.seq else set()
        module = modules.get(call.module or "") if call.op is None else None
        product = _PRODUCTS.fullmatch(module.cls) if module is not None else _takes_data(call)
        got = {id for _, id in call.inputs if _has_neginf(tensors.get(id))}
        gates = module is not None and _GATES.fullmatch(module.cls)
        if got and (gates or (product and _made_bad(call, tensors))):
            spoilt.setdefault(root, set()).update(got)
    for call in calls:
        if call.parent is None and call.op is None and call.seq not in seen:
            path = call.module or ""
            inside = any(other.startswith(f"{path}." if path else "") for other in modules
                         if other != path)  # fmt: skip
            kind = modules[path].cls if path in modules else ""
            if inside and not _TAKES_MASKS.search(kind) and _made_bad(call, tensors):
                unseen.add(call.seq)
    return spoilt, unseen


def _is_turned(call: Call, at: int, tensors: Mapping[int, Tensor]) -> bool:
    """Whether an op made bad values of -inf at an input."""
    word = _word(call)
    turns = word in _TURNS or (word in ("sub", "rsub") and at == 1)
    return turns and _made_bad(call, tensors)


def _is_turned_back(call: Call, tensors: Mapping[int, Tensor], sources: Iterable[int]) -> bool:
    """Whether an op made +inf again of the -inf that a difference made of +inf."""
    if _word(call) not in _SIGNS:
        return False
    made = any(_is_infinite(tensors.get(id)) for _, id in call.outputs)
    return made and any(_is_infinite(tensors[source]) for source in sources)


def _word(call: Call) -> str:
    return (call.op or "").rpartition(".")[2]


def _takes_data(call: Call) -> bool:
    return call.op is not None and call.op.rpartition(".")[2] in _TAKES_DATA


def _made_bad(call: Call, tensors: Mapping[int, Tensor]) -> bool:
    results = (tensors.get(id) for _, id in call.outputs)
    return any(t is not None and (t.nan or t.posinf) for t in results)


def _is_infinite(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.posinf > 0


def _has_neginf(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.neginf > 0 and not tensor.nan and not tensor.posinf


def _may_be_data(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether it is no mask by its values: those that are finite are not all 0, nor all alike."""
    if tensor is None or not _has_neginf(tensor) or tensor.requires_grad or tensor.numel < 2:
        return False
    alike = tensor.min is not None and tensor.min == tensor.max  # a thin step does not know them
    return tensor.zeros + tensor.neginf < tensor.numel and not alike
