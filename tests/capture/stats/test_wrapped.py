"""Tensors whose operators are code in Python have no memory of their own, and are not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map

from tests.checks.traced import find_live


class Scaled(Tensor):
    """Small integers and their scale, as weights of eight bits are held."""

    small: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, small: Tensor, scale: Tensor) -> Any:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, small.shape, dtype=scale.dtype)
        made.small, made.scale = small, scale
        return made

    def full(self) -> Tensor:
        return self.small.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Scaled(args[0].small.clone(), args[0].scale.clone())

        def opened(value: Any) -> Any:
            return value.full() if isinstance(value, Scaled) else value

        return func(*tree_map(opened, args), **tree_map(opened, kwargs or {}))


def scaled(x: Tensor) -> Scaled:
    scale = x.abs().amax() / 127
    return Scaled((x / scale).round().to(torch.int8), scale)


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x[:, None]), layout=torch.jagged)


class Net(nn.Module):
    def __init__(self, given: Any, held: str) -> None:
        super().__init__()
        self.linear, self.given = nn.Linear(8, 3), given
        if held == "buffer":
            self.register_buffer("held", scaled(torch.randn(3, 8)))
        else:
            self.held = scaled(torch.randn(3, 8)) if held else None

    def forward(self, x: Any, far: Tensor) -> Tensor:
        if self.given is masked_tensor:
            x = x.to_tensor(0.0)
        elif self.given is jagged:
            x = torch.cat(x.unbind())
        elif self.given is scaled:
            x = x.full()
        made: Tensor = self.linear(x)
        if self.held is not None:
            made = made + x @ self.held.full().t()
        return made + (far - 2).log()  # the cause


@pytest.mark.filterwarnings("ignore:The PyTorch API of")
@pytest.mark.parametrize("at", [4, 230])
@pytest.mark.parametrize(
    ("given", "held"),
    [(jagged, ""), (masked_tensor, ""), (scaled, ""), (None, "buffer"), (None, "attribute")],
)
def test_what_is_kept_of_such_tensors_ends_no_program_and_a_replay_takes_them(
    given: Any, held: str, at: int
) -> None:
    def program() -> None:
        net = Net(given, held)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for step in range(at + 2):
            x = torch.randn(5, 8)
            if given is not None:
                x = masked_tensor(x, x > 0) if given is masked_tensor else given(x)
            far = torch.full((1,), 1.0 if step == at else 3.0)
            optimizer.zero_grad()
            net(x, far).square().mean().backward()
            optimizer.step()

    (found,) = (f for f in find_live(program) if f.severity == "error")
    assert (found.code, found.step, found.op, found.evidence["placed"]) == (
        "TT101", at, "log", "exact",
    )  # fmt: skip
    assert found.location is not None
    assert found.location.code.endswith("# the cause")


def test_one_with_a_graph_is_not_kept() -> None:
    def program() -> None:
        first, net = nn.Linear(8, 8), Net(jagged, "")
        optimizer = torch.optim.SGD([*first.parameters(), *net.parameters()], 0.01)
        for step in range(6):
            x = first(jagged(torch.randn(5, 8)))
            optimizer.zero_grad()
            net(x, torch.full((1,), 1.0 if step == 4 else 3.0)).square().mean().backward()
            optimizer.step()

    (found,) = (f for f in find_live(program) if f.severity == "error")
    assert (found.code, found.step, found.module, found.op) == ("TT101", 4, "Net", None)
    assert "NestedTensor with a graph cannot be copied" in found.evidence["placed"]
