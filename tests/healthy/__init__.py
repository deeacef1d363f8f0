"""A stock of healthy training programs: all checks together must have nothing to say about them.

Each file of this folder holds the programs of one theme, written as a person would write them. A
program is a function of the number of steps that trains and returns nothing; `HEALTHY` names them.
Everything runs on the CPU, from a fixed seed, in well under a second for 30 steps.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable

import torch

Program = Callable[[int], None]
HEALTHY: dict[str, Program] = {}


def healthy(program: Program) -> Program:
    """Enter a program into `HEALTHY` under its own name; it starts from a fixed seed."""

    @functools.wraps(program)
    def seeded(steps: int) -> None:
        torch.manual_seed(0)
        program(steps)

    assert program.__name__ not in HEALTHY, program.__name__
    HEALTHY[program.__name__] = seeded
    return seeded


def load() -> dict[str, Program]:
    """Import every file of programs; returns `HEALTHY`."""
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("test_"):
            importlib.import_module(f"{__name__}.{info.name}")
    return HEALTHY
