"""Weights that a loop moves itself, and whether it clears their gradients.

Without an optimizer nothing says that a weight has moved or that a gradient was cleared, and what
is written through ``.data`` counts in no version. So a few weights near the loss, and their
gradients, are compared with what they were when the backward before had run: identity, version and
some values.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tensortrace.capture.loss_graph import leaves_near
from tensortrace.capture.tensors import version_of
from tensortrace.capture.unwrap import is_backed, is_dense_cpu, quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tensortrace.capture.gradients import Parameters

# Of so many weights, so many of their first values.
_MOST = 8
_VALUES = 64
_MOST_UNHELD = 1000


class _Look(NamedTuple):
    key: int
    version: int
    values: list[float]


class ByHand:
    """Follow weights from one backward to the next; keeps no tensor alive but in between.

    Where optimizers are, those that none of them holds, or that one holds which never steps.
    """

    def __init__(self) -> None:
        self._leaves: list[torch.Tensor] = []
        # By identity of a weight: it and its gradient when backward had run.
        self._left: dict[int, tuple[_Look, _Look]] = {}
        # By name, parameters that no optimizer holds.
        self._unheld: dict[str, _Look | tuple[int, int]] = {}
        # By optimizer, its first parameters when it last cleared their gradients.
        self._cleared: dict[int, list[_Look | tuple[int, int]]] = {}

    def moved(self, unheld: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Name those parameters that have other values, or are others, than when this was asked.

        On the CPU, and elsewhere those that were written in place.
        """
        now = {name: _look(p) or (id(p), version_of(p)) for name, p in islice(unheld, _MOST_UNHELD)}
        before, self._unheld = self._unheld, now
        return [name for name, look in now.items() if name in before and before[name] != look]

    def is_still(self, index: int, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether the first parameters of an optimizer are what they were the last time."""
        now = [_look(p) or (id(p), version_of(p)) for p in islice(parameters, _MOST)]
        before, self._cleared[index] = self._cleared.get(index), now
        return before == now

    def follows(self) -> bool:
        """Whether any weight is followed. Hot."""
        return bool(self._leaves or self._left)

    def forget(self) -> None:
        """Follow nothing from here on: this backward is not looked at."""
        self._leaves, self._left = [], {}

    def begins(self, loss: torch.Tensor, parameters: Parameters) -> dict[str, Any] | None:
        """Tell, as a backward begins, what the loop has done since the one before.

        Returns:
            The ``name`` and ``shape`` of a weight that it has moved, and whether its gradient was
            ``cleared``, or written: of one whose gradient was not, if there is one. None if it has
            moved none that had a gradient.
        """
        self._leaves = [leaf for leaf in leaves_near(loss) if leaf.requires_grad][:_MOST]
        fates = list(self._fates(parameters))
        return min(fates, key=lambda fate: fate["cleared"], default=None)

    def _fates(self, parameters: Parameters) -> Iterator[dict[str, Any]]:
        for leaf in self._leaves:
            left, now = self._left.get(id(leaf)), _look(leaf)
            if left is None or now is None or left[0] == now:
                continue
            grad = None if leaf.grad is None else _look(leaf.grad)
            name = parameters.name_of(leaf)
            yield {
                "name": name and ".".join(part for part in name if part),
                "shape": list(leaf.shape),
                "cleared": grad != left[1],
            }

    def ended(self) -> None:
        """Note what a backward has left."""
        leaves, self._leaves, self._left = self._leaves, [], {}
        for leaf in leaves:
            weight = _look(leaf)
            grad = None if leaf.grad is None else _look(leaf.grad)
            # Zeros look the same when they are cleared.
            if weight is not None and grad is not None and any(grad.values):
                self._left[id(leaf)] = weight, grad


def _look(tensor: torch.Tensor) -> _Look | None:
    """What a tensor is now; None of one that is not read without waiting, or not in order."""
    if not is_dense_cpu(tensor) or not is_backed(tensor) or not tensor.is_contiguous():
        return None
    with quiet():
        values = tensor.detach().view(-1)[:_VALUES].tolist()
    return _Look(id(tensor), version_of(tensor), values)
