"""Which units of a rectified layer are dead: not above 0 for any input, over several batches.

A unit is a channel, or a feature of a linear layer. That one is 0 for a whole batch says little, so
for every layer it is remembered when each of its units was last above 0. The layer is known by its
parameter, found in the graph above the ReLU: the same for a module and for `F.relu`, and for every
call of a layer that is used several times.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from tensortrace.capture import compiled
from tensortrace.capture.loss_graph import LEAF
from tensortrace.capture.unwrap import is_backed, is_dense_cpu, plain, quiet
from tensortrace.engine import CLOSELY, SELDOM

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from tensortrace.capture.stats.gather import Ticket
    from tensortrace.capture.stats.queue import StatsQueue

# The nodes of ReLU, ReLU6 and threshold, and of a pooling that may be of one of them.
_POOLINGS = frozenset(("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"))
_RELUS = frozenset(("ReluBackward0", "HardtanhBackward0", "ThresholdBackward0"))
# And of a batch of images that is flattened for a linear layer.
_FLATTEN = "ViewBackward0"
RECTIFIED = _RELUS | _POOLINGS | {_FLATTEN}
_CHANNELS = ("Convolution", "BatchNorm", "GroupNorm", "InstanceNorm")
_FEATURES = ("AddmmBackward0", "MmBackward0", "BmmBackward0", "LayerNorm")
_MOST_NODES = 12
_MOST_UNITS = 4096
_MOST_LAYERS = 4096
# A unit is dead after so many steps and rows (samples, or their positions) without it: with none in
# 300 it is active in less than 1 % of them at 95 % confidence (the rule of three).
_STEPS = 8
_ROWS = 300
_REMEMBERED = 128


class Tickets(NamedTuple):
    """How many units there are; where the queue will say how many are dead, and since when."""

    units: int
    dead: Ticket
    since: Ticket


class _Layer:
    """`last` is the step in which each unit was last above 0, `seen` the rows of each step."""

    __slots__ = ("last", "parameter", "seen")

    def __init__(self, parameter: torch.Tensor, last: torch.Tensor) -> None:
        self.parameter = weakref.ref(parameter)
        self.last = last
        self.seen: list[tuple[int, int]] = []


class Units:
    """Follow the units of all layers; keeps no tensor of the program's alive."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def look(self, tensor: torch.Tensor, step: int, queue: StatsQueue) -> Tickets | None:
        """Note which units a rectified tensor is above 0 in; nothing is read from its device.

        Args:
            tensor: ``(N, units)``, ``(N, units, *)`` after a convolution or a norm of channels,
                else ``(*, units)``; not modified, not kept.
            step: its step; after the first, those are looked at that checks look at: a look reads
                the tensor once more.
            queue: takes the two counts.
        Returns:
            None until enough was seen, and for what has no units: no layer above it, one dim.
        """
        try:
            found = _layer_of(tensor.grad_fn, tensor.shape) if tensor.dim() > 1 else None
            if found is None or not _can_be_read(tensor):
                return None
            return self._look(tensor, *found, step, queue)
        except RuntimeError:
            return None  # nothing that a count is worth failing for: out of memory, odd layouts

    def let_go(self, parameter: torch.Tensor) -> None:
        """Keep no weak reference to a parameter; its units are followed anew."""
        self._layers.pop(id(parameter), None)

    def _look(
        self, tensor: torch.Tensor, parameter: torch.Tensor, dim: int, step: int, queue: StatsQueue
    ) -> Tickets | None:
        layer = self._layer(parameter, tensor.device, step)
        seen, units = layer.seen, len(layer.last)
        if len(seen) >= CLOSELY and step % SELDOM:
            return None
        rows = tensor.numel() // units
        if seen and seen[-1][0] == step:
            rows += seen.pop()[1]
        seen.append((step, rows))
        del seen[:-_REMEMBERED]
        start = _window(seen)
        counted = _count_now(tensor, layer.last, dim, step, start or 0)
        if counted is not None:
            return None if start is None else Tickets(units, *map(queue.add_number, counted))
        with quiet():
            layer.last = _noted(tensor, layer.last, dim, step)
            if start is None:
                return None
            dead = layer.last < start
            since = torch.where(dead, layer.last, -1.0).amax() + 1
            return Tickets(units, *queue.add_scalars([dead.sum(dtype=torch.float32), since]))

    def _layer(self, parameter: torch.Tensor, device: torch.device, step: int) -> _Layer:
        """What is known of a layer."""
        layer, units = self._layers.get(id(parameter)), len(parameter)
        if (
            layer is None
            or layer.parameter() is not parameter
            or len(layer.last) != units
            # A dry run on the CPU, before the same Parameter moves to its device.
            or layer.last.device != device
        ):
            if len(self._layers) >= _MOST_LAYERS:
                self._layers.clear()
            with quiet():
                last = torch.full((units,), float(step - 1), device=device)
            layer = self._layers[id(parameter)] = _Layer(parameter, last)
        return layer


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Whether a tensor has elements, and they are its own."""
    if not tensor.numel():
        return False
    if is_dense_cpu(tensor):
        return is_backed(tensor)
    with quiet():
        return plain(tensor) is tensor


def _count_now(
    tensor: torch.Tensor, last: torch.Tensor, dim: int, step: int, start: int
) -> tuple[int, float] | None:
    """Note in `last` which units are above 0, if the compiled kernel can read them. Hot.

    Returns:
        How many units are dead since before step `start`, and the first step without all of them.
    """
    if compiled.kernel is None:
        return None
    # Elements between a unit and the next, in any dense order: images that were flattened have
    # `shape[dim] // units` of each.
    apart = tensor.stride(dim) * (tensor.shape[dim] // len(last))
    found: tuple[int, float] | None = compiled.kernel.count_dead(tensor, last, apart, step, start)
    return found


def _noted(tensor: torch.Tensor, last: torch.Tensor, dim: int, step: int) -> torch.Tensor:
    """`last` with this step for each unit that is above 0; nothing is read from the device."""
    if tensor.shape[dim] != len(last):
        tensor = tensor.view(len(tensor), len(last), -1)
    # Sample by sample first: of small images amax(0, 2, 3) takes ten times as long.
    highest = tensor.amax(0)
    if highest.dim() > 1:
        highest = highest.flatten(1).amax(1) if dim == 1 else highest.flatten(0, -2).amax(0)
    # Not "above 0": NaN is no sign of death.
    return torch.where(highest <= 0, last, float(step))


def _window(seen: list[tuple[int, int]]) -> int | None:
    """The step with which the shortest time begins that is long enough to call a unit dead."""
    rows = 0
    for count, (step, more) in enumerate(reversed(seen), start=1):
        rows += more
        if count >= _STEPS and rows >= _ROWS:
            return step
    return None


def _layer_of(root: Node | None, shape: torch.Size) -> tuple[torch.Tensor, int] | None:
    """The first parameter above a ReLU that has one element, row or filter for each unit.

    Returns:
        It, and the dim of the units: 1 after a convolution or a norm over channels, else the last.
    """
    flat = root is not None and root.name() == _FLATTEN
    if root is not None and flat:
        root = root.next_functions[0][0] if len(shape) == 2 else None
    if root is not None and root.name() in _POOLINGS:
        root = root.next_functions[0][0]
    if root is None or root.name() not in _RELUS:
        return None
    channels = _flattened_channels(root.next_functions[0][0], shape)
    if channels is not None:
        flat, root = True, channels
    dim = None
    nodes = [root]
    for node in nodes:
        name = node.name()
        parameter = node.variable if name == LEAF else None  # type: ignore[attr-defined]
        if parameter is not None and dim is not None and parameter.dim():
            units = len(parameter)
            fits = shape[1] % units == 0 if flat and dim == 1 else shape[dim] == units
            if fits and units <= _MOST_UNITS:
                return parameter, dim
            continue
        if dim is None and any(word in name for word in _CHANNELS):
            dim = 1
        elif dim is None and any(word in name for word in _FEATURES):
            if flat:
                return None  # a linear layer over positions: its units lie apart
            dim = len(shape) - 1
        if len(nodes) < _MOST_NODES:
            nodes += [above for above, _ in node.next_functions if above is not None]
    return None


def _flattened_channels(node: Node | None, shape: torch.Size) -> Node | None:
    """The node of channels that a node has made rows of, one for each sample of the batch."""
    if node is None or node.name() != _FLATTEN or len(shape) != 2:
        return None
    above = node.next_functions[0][0]
    sizes: tuple[int, ...] = node._saved_self_sym_sizes  # type: ignore[attr-defined]
    named = above is not None and any(word in above.name() for word in _CHANNELS)
    return above if named and sizes[0] == shape[0] else None
