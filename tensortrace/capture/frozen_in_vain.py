"""What a program has set on a module or parameter to freeze it, and torch never looks at."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

# `requires_grad` is an attribute of tensors alone; of those it is often misspelt.
_MEANT = re.compile(r"requir\w*grad(?:s|ients?)?", re.IGNORECASE)


def frozen_in_vain(module: nn.Module, own: Mapping[str, nn.Parameter | None]) -> list[str]:
    """Name the attributes that are False and were meant to freeze something.

    Args:
        module: that may have one.
        own: its own parameters.

    Returns:
        "requires_grad" of the module, "weight.require_grad" of a parameter.
    """
    found = _meant(vars(module))
    for name, parameter in own.items():
        if parameter is not None:
            found += [f"{name}.{key}" for key in _meant(vars(parameter))]
    return found


def _meant(attributes: Mapping[str, object]) -> list[str]:
    return [key for key, value in attributes.items() if value is False and _MEANT.fullmatch(key)]
