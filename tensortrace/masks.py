"""Which -inf is a mask and which is data: log(0) in a spectrogram, a missing value.

A mask says of each position that it is there, 0, or not, -inf; data vary. Nor does a mask go into
what multiplies all that it is given, or change its sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tensortrace.records import Call, Module, Tensor

# What has no use for a mask at its first inputs, and makes one value of many.
_TAKES_DATA = frozenset((
    "linear", "bilinear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum",
    "conv1d", "conv2d", "conv3d", "layer_norm", "batch_norm", "group_norm", "instance_norm",
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
))  # fmt: skip
_TAKES_MASKS = ("softmax", "attention", "transformer", "mask")


def bad_data(
    calls: Iterable[Call], tensors: Mapping[int, Tensor], modules: Mapping[str, Module]
) -> set[int]:
    """The ids of tensors whose -inf came in as data, or was made of that.

    Args:
        calls: of a step, in order of seq.
        tensors: of the step, by id.
        modules: of the run, by path.
    """
    found: set[int] = set()
    made: set[int] = set()
    sources: dict[int, set[int]] = {}  # by id: what came in that its -inf may be from
    for call in calls:
        if call.phase != "forward" or call.recompute or call.replay:
            continue
        for name, id in call.inputs:
            outside = call.parent is None and id not in made and id not in sources
            if outside and _may_be_data(tensors.get(id)):
                sources[id] = {id}
            if id in sources and _takes_data(call, name, modules):
                found |= {id, *sources[id]}
        given = set().union(*(sources.get(id, ()) for _, id in call.inputs))
        for _, id in call.outputs:
            made.add(id)
            result = tensors.get(id)
            if given and id not in sources and _has_neginf(result):
                sources[id] = given | {id}
            # A mask is not turned round.
            found |= given if result is not None and result.posinf and not result.nan else set()
    return found | {id for id, given in sources.items() if given & found}


def _has_neginf(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.neginf > 0 and not tensor.nan and not tensor.posinf


def _may_be_data(tensor: Tensor | None) -> bool:
    """Whether it is no mask by its values: those that are finite are not all 0, nor all alike."""
    if tensor is None or not _has_neginf(tensor) or tensor.requires_grad or tensor.numel < 2:
        return False
    alike = tensor.min is not None and tensor.min == tensor.max  # a thin step does not know them
    return tensor.zeros + tensor.neginf < tensor.numel and not alike


def _takes_data(call: Call, name: str, modules: Mapping[str, Module]) -> bool:
    if call.op is not None:
        return call.op.rpartition(".")[2] in _TAKES_DATA
    module = modules.get(call.module or "")
    kind = (module.cls if module is not None else "").lower()
    return name == "input[0]" and not any(word in kind for word in _TAKES_MASKS)
