"""What a loss is made of: the autograd nodes above it, as far as they tell the kind of loss.

Losses are computed inside modules too, where no op is seen at module level; the graph shows them
all the same. A node costs about a microsecond (measured on one thread of a desktop CPU), so few are
read, and only the first times that a line calls backward.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from tensortrace.records import Location

# A sum of several losses has about ten nodes for each.
_MOST_NODES = 48
# Losses that take turns on one line (a GAN in a function) are met in the first few steps.
_TIMES = 3
_MOST_PLACES = 256
_MOST_SKIPPED = 16
# What a node is called that adds to the gradient of a leaf, its `variable`.
LEAF = "torch::autograd::AccumulateGrad"
# They pass values on and change none: views, copies, casts, and bounds on probabilities.
_TRANSPARENT = frozenset(
    f"{name}Backward{n}"
    for name in (
        "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "ToCopy", "Clone",
        "Squeeze", "Unsqueeze", "Slice", "Select", "Index", "IndexSelect", "Alias", "Expand",
        "AsStrided", "Split", "SplitWithSizes", "Unbind", "Clamp", "ClampMin", "MaskedSelect",
    )
    for n in range(4)
)  # fmt: skip


def root_of(loss: torch.Tensor) -> Node | None:
    """The node that made a loss; None where asking for it would build one."""
    try:
        return None if loss._is_view() and loss._version else loss.grad_fn
    except RuntimeError:
        return None


class LossGraphs:
    """Reads the graph of a loss, but not again and again at the same line."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, int], int] = {}

    def nodes(self, loss: torch.Tensor, location: Location | None) -> list[list[Any]] | None:
        """List the nodes above a loss, nearest first, views and casts left out.

        Returns:
            [name, places in this list of the nodes that it takes its inputs from]; None where this
            line's graph has been read, or cannot be read without building a node.
        """
        place = (location.file, location.line) if location is not None else ("", 0)
        times = self._read.get(place, 0)
        if times >= _TIMES or (times == 0 and len(self._read) >= _MOST_PLACES):
            return None
        self._read[place] = times + 1
        root = root_of(loss)
        return _walk(root) if root is not None else None


def _walk(root: Node) -> list[list[Any]]:
    found: list[list[Any]] = []
    todo = [root]
    places = {root: 0}
    for node in todo:
        above: list[int] = []
        for direct, _ in node.next_functions:
            parent = _past_views(direct)
            if parent is None:
                continue
            place = places.get(parent)
            if place is None and len(todo) < _MOST_NODES:
                place = places[parent] = len(todo)
                todo.append(parent)
            if place is not None:
                above.append(place)
        found.append([sys.intern(node.name()), above])
    return found


def _past_views(node: Node | None) -> Node | None:
    for _ in range(_MOST_SKIPPED):
        if node is None or node.name() not in _TRANSPARENT:
            break
        parents = node.next_functions
        node = parents[0][0] if parents else None
    return node
