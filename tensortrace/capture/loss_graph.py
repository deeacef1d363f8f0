"""What a loss is made of: the autograd nodes above it, as far as they tell the kind of loss.

Losses are computed inside modules too, where no op is seen at module level; the graph shows them
all the same. A node costs about a microsecond (measured on one thread of a desktop CPU), so few are
read, and only the first times that a line calls backward.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.unwrap import node_of
from tensortrace.kinds import PASSING

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from tensortrace.records import Location

# A sum of several losses has about ten nodes for each.
_MOST_NODES = 48
# In which leaves are looked for, in full steps: 500 would be 5 % of a small LSTM's step.
_NEAR = 64
# Losses that take turns on one line (a GAN in a function) are met in the first few steps.
_TIMES = 3
_MOST_PLACES = 256
_MOST_SKIPPED = 16
_VIEWS = frozenset(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"))
# They take logarithms of probabilities of classes, along dim 1.
_NLL = frozenset(("NllLossBackward0", "NllLoss2DBackward0"))
_SOFTMAX = frozenset(("SoftmaxBackward0", "LogSoftmaxBackward0"))
# What a node is called that adds to the gradient of a leaf, its `variable`.
LEAF = "torch::autograd::AccumulateGrad"


def leaves_near(loss: torch.Tensor) -> list[torch.Tensor]:
    """The leaves among the nodes of a graph that are nearest to its loss."""
    root = node_of(loss)
    todo: list[Node] = [] if root is None else [root]
    seen, found = set(todo), []
    for node in todo:
        if node.name() == LEAF:
            found.append(node.variable)  # type: ignore[attr-defined]
        for above, _ in node.next_functions:
            if above is not None and above not in seen and len(todo) < _NEAR:
                seen.add(above)
                todo.append(above)
    return found


class LossGraphs:
    """Reads the graph of a loss, but not again and again at the same line."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, int], int] = {}

    def nodes(
        self, loss: torch.Tensor, location: Location | None
    ) -> tuple[list[list[Any]], list[tuple[int, list[int]]]] | None:
        """List the nodes above a loss, nearest first, views and casts left out.

        Returns:
            [name, places in this list of the nodes that it takes its inputs from]; and place and
            shape of each softmax or log_softmax among them that has one element alone to divide by,
            in several rows. None where this line's graph has been read, or cannot be read without
            building a node.
        """
        place = (location.file, location.line) if location is not None else ("", 0)
        times = self._read.get(place, 0)
        if times >= _TIMES or (times == 0 and len(self._read) >= _MOST_PLACES):
            return None
        self._read[place] = times + 1
        root = node_of(loss)
        if root is None:
            return None
        nodes, found = _walk(root)
        shapes = ((i, _shape_if_single(node)) for i, node in enumerate(nodes))
        return found, [(i, shape) for i, shape in shapes if shape]


def dim_beside_classes(loss: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Find an nll_loss of probabilities that add up to 1 over another dim than that of the classes.

    Only what it takes from log_softmax, or from log of softmax, with no view in between but of all
    leading dims as one: after another the dims are others.

    Returns:
        That dim of theirs and that of the classes, and their shape.
    """
    root = node_of(loss)
    todo = [root] if root is not None else []
    seen = set(todo)
    for node in todo:
        for above, _ in node.next_functions:
            if above is not None and above not in seen and len(todo) < _MOST_NODES:
                seen.add(above)
                todo.append(above)
        try:
            wrong = _beside(node.next_functions[0][0]) if node.name() in _NLL else None
        except (AttributeError, IndexError, RuntimeError):  # a shape that is not one of numbers
            continue
        if wrong is not None:
            return wrong
    return None


def _beside(node: Node | None) -> tuple[list[int], list[int]] | None:
    flat = None
    if node is not None and node.name() in _VIEWS:
        flat = _shape_of(node)
        node = node.next_functions[0][0]
    wanted = "LogSoftmaxBackward0"
    if node is not None and node.name() == "LogBackward0":
        node, wanted = node.next_functions[0][0], "SoftmaxBackward0"
    if node is None or node.name() != wanted:
        return None
    shape, dim = _shape_of(node), _dim_of(node)
    classes = min(1, len(shape) - 1)
    if flat is not None:
        classes = len(shape) - 1
        if len(flat) != 2 or classes < 1 or flat[1] != shape[-1]:
            return None
    return None if dim == classes else ([dim, classes], shape)


def _shape_if_single(node: Node) -> list[int]:
    """The shape of a softmax over a dim of one element, of which it has several; else nothing."""
    if node.name() not in _SOFTMAX:
        return []
    try:
        shape = _shape_of(node)
        return shape if shape and shape[_dim_of(node)] == 1 < math.prod(shape) else []
    except (AttributeError, IndexError, RuntimeError):  # a shape that is not one of numbers
        return []


def _dim_of(node: Node) -> int:
    """The dim that a softmax was taken over, counted from the first."""
    # One that was given as -1 is kept as a number without a sign.
    dim: int = node._saved_dim  # type: ignore[attr-defined]
    dim = dim - 2**64 if dim >= 2**63 else dim
    return dim + len(_shape_of(node)) if dim < 0 else dim


def _shape_of(node: Node) -> list[int]:
    """The shape of what a node has made."""
    shape = node._input_metadata[0].shape
    if not all(type(n) is int for n in shape):
        raise RuntimeError("symbols are no numbers")
    return list(shape)


def _walk(root: Node) -> tuple[list[Node], list[list[Any]]]:
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
    return todo, found


def _past_views(node: Node | None) -> Node | None:
    for _ in range(_MOST_SKIPPED):
        if node is None or node.name() not in PASSING:
            break
        parents = node.next_functions
        node = parents[0][0] if parents else None
    return node
