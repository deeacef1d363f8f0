"""How far the rows of a tensor differ: the outputs for a batch, the weights of a layer's units.

That all rows are alike shows in no statistic over all elements. A sample is enough to see it.
"""

from __future__ import annotations

import math

import torch

from tensortrace.capture import compiled
from tensortrace.capture.unwrap import is_dense_cpu, plain, quiet

__all__ = ["row_spread", "row_spread_now"]

_ROWS = 16
_COLUMNS = 512


def row_spread(tensor: torch.Tensor) -> torch.Tensor | None:
    """Measure how far the rows are from their mean, as a share of their norm.

    Args:
        tensor: ``(rows, *)``, two dims at least, floating point, strided; not modified, not kept.
    Returns:
        One f32 element on its device: 0 if all rows are equal (rounding leaves less than 1e-6),
        about 1 if they have nothing in common, NaN if all is 0. Measured on at most 16 rows and
        512 columns, evenly spaced. None for other tensors, and without two rows.
    """
    with quiet():
        try:
            found = plain(tensor)
            if isinstance(found, str) or not found.is_floating_point() or found.dim() < 2:
                return None
            rows, columns = len(found), found[0].numel() if len(found) else 0
            if rows < 2 or not columns:
                return None
            flat = found.is_contiguous()
            found = found[:: math.ceil(rows / _ROWS)]
            # Of channels last, flattening makes a copy; a view of some of each dim does not.
            found = (found if flat else _corner(found)).flatten(1)
            sample = found[:, :: math.ceil(found.shape[1] / _COLUMNS)].float()
            apart, whole = torch._foreach_norm([sample - sample.mean(0), sample])
            return apart / whole
        except RuntimeError:
            return None  # nothing worth failing for: out of memory, odd layouts


def row_spread_now(tensor: torch.Tensor) -> float | None:
    """As `row_spread`, by the compiled kernel. Hot.

    Args:
        tensor: any; call it inside `DisableTorchFunction`.
    Returns:
        The same share, 0 to about 1 or NaN, as a number. None without the kernel, and of what is
        not contiguous, no f16, bf16, f32 or f64, or no ordinary CPU tensor.
    """
    if compiled.kernel is None or type(tensor) not in compiled.EXACT or not is_dense_cpu(tensor):
        return None
    if tensor.dim() < 2 or len(tensor) < 2:
        return None
    found: float | None = compiled.kernel.spread(tensor, len(tensor), _ROWS, _COLUMNS)
    return found


def _corner(found: torch.Tensor) -> torch.Tensor:
    """At most 512 elements of each row, from its beginning, of some of each dim."""
    room = _COLUMNS
    for dim in range(1, found.dim()):
        length = min(found.shape[dim], max(1, room))
        found = found.narrow(dim, 0, length)
        room //= length
    return found
