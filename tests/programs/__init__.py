"""Edge programs: short, legal PyTorch programs that tracing must neither break nor change.

Each file of this folder holds the programs of one theme. A program is a function without arguments
(`nested_trace` takes the tracer) that returns tensors; what they are is compared to the bit between
a plain and a traced run. Programs that fail untraced must fail in the same way traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Program:
    """A program and what it needs: `warns` are the messages of warnings that it is known to give.

    `package` must be importable, else the test is skipped. `raises` names what it raises untraced.
    """

    run: Callable[..., Any]
    warns: tuple[str, ...] = ()
    package: str | None = None
    raises: type[BaseException] | None = None


PROGRAMS: dict[str, Program] = {}


def program(*warns: str, **needs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into `PROGRAMS` under its own name."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        assert function.__name__ not in PROGRAMS, function.__name__
        PROGRAMS[function.__name__] = Program(function, warns, **needs)
        return function

    return enter


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def tanh_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def scalar_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def batch() -> Tensor:
    return torch.randn(3, 4)


def grads(*modules: nn.Module) -> list[Tensor | None]:
    return [p.grad for module in modules for p in module.parameters()]


def backward(y: Tensor, *modules: nn.Module) -> list[Tensor | None]:
    """Send a gradient of ones back; returns the output and the gradients of the modules."""
    y.sum().backward()
    return [y, *grads(*modules)]
