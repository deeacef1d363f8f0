"""Weights of which nothing but products is taken: a sample of a gradient shows what is wrong in it.

The gradient of the weight of a matrix product or convolution is a product too, dY^T X. A NaN or an
infinity in a row of dY, or in a column of X, is in all of that row or column of it, times zero
included. So a step at rest, which asks of a gradient whether it is finite, need not read all of a
large one. What it misses is a sum of finite products that overflows in float32.

Which weights those are is read from the graph of a loss, in a full step now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensortrace.capture import compiled, rest
from tensortrace.capture.graph import LEAF, root_of

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from tensortrace.capture.gradients import Parameters
    from tensortrace.capture.recorder import Recorder

# As in _statistics.c, which reads no sample of others; the last is of a kernel's places, of which
# half a run has to meet each.
_LEAST, _LEAST_COLUMNS, _MOST_PLACES = 131_072, 512, 32
# A graph is read in so many steps once; at a microsecond a node a larger one would be felt.
_APART = 100
_MOST_NODES = 20_000
# The inputs of a node that are factors of its product.
_FACTORS = {"AddmmBackward0": (1, 2), "MmBackward0": (0, 1), "ConvolutionBackward0": (0, 1)}
_TRANSPOSED = "TBackward0"


def is_large(parameter: nn.Parameter) -> bool:
    """Whether so much of a gradient of this shape would be read that a sample is worth it."""
    shape = parameter.shape
    if len(shape) < 2 or parameter.dtype not in (torch.float32, torch.float64):
        return False
    n = parameter.numel()
    wide = n >= max(_LEAST, shape[0] * _LEAST_COLUMNS)
    return wide and math.prod(shape[2:]) <= _MOST_PLACES


class Products:
    """Finds those weights, from the first step on in which a gradient may be read in part.

    Attributes:
        step: the last in which graphs are read, below 0 if there was none.
    """

    def __init__(self) -> None:
        self.step = -_APART

    def begin_step(self, recorder: Recorder) -> None:
        """Decide whether this step's graphs are read. Hot."""
        step = recorder.step
        if not recorder.full or step < max(rest.RESTS_FROM, self.step + _APART):
            return
        is_full = recorder.journal.is_full
        # Before a full step none rests.
        may_rest = recorder.may_rest and not is_full(step + 1) and not is_full(step + 2)
        if compiled.kernel is not None and may_rest and not recorder.op_level:
            self.step = step

    def read(self, loss: torch.Tensor, parameters: Parameters) -> None:
        """Mark the parameters in the graph of a loss by what takes them.

        Args:
            loss: what backward is about to run on.
            parameters: knows the probes to mark.
        """
        if not parameters.any_large:
            return
        root = root_of(loss)
        for parameter, takers in _taken(root) if root is not None else ():
            hooks = parameter._backward_hooks
            # Ours; another may change what it is given.
            alone = hooks is not None and len(hooks) == 1
            known = alone and bool(takers) and all(map(_is_product, takers))
            parameters.mark(parameter, self.step, known)


_Taker = tuple[Any, int]


def _taken(root: Node) -> Iterator[tuple[torch.Tensor, list[_Taker]]]:
    """List what takes each parameter above a node: nodes, and as which input; none of a huge graph.

    What is only transposed before it is taken counts as taken so.
    """
    takers: dict[Node, list[_Taker]] = {root: []}
    todo = [root]
    for node in todo:
        if len(todo) > _MOST_NODES:
            return
        for i, (above, _) in enumerate(node.next_functions):
            if above is None:
                continue
            if above not in takers:
                takers[above] = []
                todo.append(above)
            takers[above].append((node, i))
    for leaf in todo:
        if leaf.name() != LEAF:
            continue
        straight: list[_Taker] = []
        for taker, i in takers[leaf]:
            straight += takers[taker] if taker.name() == _TRANSPOSED else [(taker, i)]
        yield leaf.variable, straight  # type: ignore[attr-defined]


def _is_product(taker: _Taker) -> bool:
    node, place = taker
    name = node.name()
    # In groups a column of the weight is one of some of its rows only.
    grouped = name == "ConvolutionBackward0" and node._saved_groups != 1
    return place in _FACTORS.get(name, ()) and not grouped
