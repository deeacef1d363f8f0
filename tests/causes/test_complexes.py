"""Why complex and double numbers are not finite, and a repair that torch takes for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensortrace import trace
from tensortrace.records import Finding


def found(program: Any) -> list[Finding]:
    """What is said of values and gradients that are not finite."""
    with trace(out=lambda record: None) as t:
        program()
    return [f for f in t.findings if f.code in ("TT101", "TT102")]


def flow(op: str, x: torch.Tensor) -> Any:
    """A program that has gradients flow through an op on `x`."""

    def program() -> None:
        leaf = x.clone().requires_grad_()
        y = eval(op, {"x": leaf * 2, "torch": torch, "p": 0.5})
        (y.real if y.is_complex() else y).sum().backward()

    return program


ZEROS = torch.zeros(4, dtype=torch.complex64)
HUGE = torch.full((4,), complex(1e200), dtype=torch.complex128)


@pytest.mark.parametrize(("op", "x", "words", "fix"), [
    ("x.log()", ZEROS, "log of 0 is infinite; it got 4 zeros of 4", "torch.where(x == 0, 1e-8, x)"),
    ("x.sqrt()", ZEROS, "infinite at 0", "torch.where(x == 0, 1e-8, x).sqrt()"),
    ("x.pow(p)", ZEROS, "infinite at 0", "torch.where(x == 0, 1e-8, x).pow(p)"),
    ("x.exp()", ZEROS + 100, "above 88.7", "torch.complex(x.real.clamp(max=80), x.imag).exp()"),
    ("x.exp()", ZEROS.to(torch.complex128) + 1e3, "c128 where the real part of what goes in is "
     "above 709.8", "torch.complex(x.real.clamp(max=700), x.imag).exp()"),
    ("x.cosh()", ZEROS - 100, "its negative",
     "torch.complex(x.real.clamp(-80, 80), x.imag).cosh()"),
    ("x * x", HUGE, "the range of c128 (largest 1.79e+308)", "scale the inputs down"),
])  # fmt: skip
def test_an_op_on_complex_numbers_is_explained_and_its_repair_works(
    op: str, x: torch.Tensor, words: str, fix: str
) -> None:
    (finding,) = found(flow(op, x))
    assert words in finding.explanation
    assert fix in (finding.fix or "")
    if fix.startswith("torch."):
        assert found(flow(fix + (".log()" if op == "x.log()" else ""), x)) == []


@pytest.mark.parametrize("op", ["x * x", "x @ x", "x.sum() * 1e110", "x / 1e-200", "x.norm()",
                                "x.pow(2)", "x.mul(1e100).square()"])  # fmt: skip
def test_an_overflow_of_double_is_called_that(op: str) -> None:
    (finding, *_) = found(flow(op, torch.full((4,), 1e200, dtype=torch.float64)))
    assert "is over the range of f64 (largest 1.79e+308)" in finding.explanation


def test_an_overflow_of_double_has_its_chain() -> None:
    def program() -> None:
        x = torch.full((4,), 30.0, dtype=torch.float64, requires_grad=True)
        (x * 40).reshape(2, 2).exp().sum().backward()

    (finding,) = found(program)
    assert [link.op for link in finding.chain] == ["mul", "reshape", "exp"]
