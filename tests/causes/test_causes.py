"""Each kind of op: a program with a fault, what is said of it, and its silent repair."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.causes import Facts, backward
from tensortrace.causes.forward import explain
from tensortrace.records import Finding
from tests.builders import make_tensor
from tests.capture import Recorded
from tests.checks.traced import find_live

Level = Literal["module", "op"]
Part = Callable[[Tensor], Tensor]
INF = float("inf")
NOTHING = torch.full((3,), -100)
HIDES_A_ROW = torch.tensor([[True, False, False, False]] * 2 + [[False] * 4])
NO_WEIGHT = torch.tensor([0.0, 1.0, 1.0, 1.0])
LABELS = torch.tensor([0, 1, 2])
ZEROS, SPREAD = torch.zeros(4), torch.tensor([0.5, 1.0, 2.0, 3.0])
SPELT = torch.tensor([[1, 2, 2]])


@dataclass(frozen=True)
class Case:
    """What `wrong` does, the op to blame, words of the explanation, and the same done right."""

    op: str
    wrong: Part
    right: Part
    says: tuple[str, ...]
    phase: str = "forward"


def unit(x: Tensor) -> Tensor:
    """Positive values up to 1, with one row of zeros."""
    return x.sigmoid() * torch.tensor([[1.0], [1.0], [0.0]])


def shrunk(x: Tensor) -> Tensor:
    p = x.sigmoid()
    for _ in range(4):
        p = p * 1e-15
    return p


def half(x: Tensor) -> Tensor:
    return (x * 0 + 300).half()


FORWARD = {
    "log of zero": Case(
        "log", lambda x: unit(x).log(), lambda x: unit(x).clamp_min(1e-8).log(),
        ("log of 0 is -inf", "4 zeros of 12", "f32 [3, 4] from 0 to")),
    "log of a negative": Case(
        "log", lambda x: (unit(x) - 2).log(), lambda x: (unit(x) + 2).log(),
        ("negative number NaN", "12 negatives of 12")),
    "log1p below -1": Case(
        "log1p", lambda x: (-unit(x) - 1).log1p(), lambda x: (-unit(x) - 1).clamp_min(-0.9).log1p(),
        ("log1p of -1",)),
    "sqrt": Case(
        "sqrt", lambda x: (unit(x) - 2).sqrt(), lambda x: (unit(x) - 2).clamp_min(1e-12).sqrt(),
        ("root of a negative number is NaN", "12 negatives of 12")),
    "rsqrt": Case(
        "rsqrt", lambda x: unit(x).rsqrt(), lambda x: (unit(x) + 1e-3).rsqrt(),
        ("1 / sqrt(x) is infinite at 0", "4 zeros of 12")),
    "div": Case(
        "div", lambda x: x / unit(x).sum(1, keepdim=True),
        lambda x: x / (unit(x).sum(1, keepdim=True) + 1e-3),
        ("the divisor has 1 zero out of 3 (f32 [3, 1]",)),
    "div by a count": Case(
        "div", lambda x: x[x > INF].sum() / 0, lambda x: x[x > INF].sum() / 1,
        ("divided by the number 0",)),
    "reciprocal": Case(
        "div", lambda x: 1 / unit(x), lambda x: 1 / (unit(x) + 1e-3),
        ("the divisor has 4 zeros out of 12",)),
    "div overflows": Case(
        "div", lambda x: 1e30 / (unit(x) + 1e-12), lambda x: 1.0 / (unit(x) + 1e-3),
        ("the quotient is over the range of f32",)),
    "negative power of 0": Case(
        "pow", lambda x: unit(x) ** -0.5, lambda x: unit(x).clamp_min(1e-3) ** -0.5,
        ("0 to the power -0.5 is infinite", "4 zeros of 12")),
    "fractional power": Case(
        "pow", lambda x: (unit(x) - 2) ** 0.5, lambda x: (unit(x) - 2).clamp_min(1e-3) ** 0.5,
        ("a negative number to the power 0.5", "12 negatives of 12")),
    "pow overflows": Case(
        "pow", lambda x: (unit(x) + 1e20) ** 3, lambda x: (unit(x) + 1.0) ** 3,
        ("over the range of f32",)),
    "exp": Case(
        "exp", lambda x: (unit(x) + 89).exp(), lambda x: (unit(x) + 89).clamp(max=10).exp(),
        ("exp is over the range of f32 above 88.7", "from 89 to")),
    "exp in half": Case(
        "exp", lambda x: (unit(x) + 12).half().exp(), lambda x: (unit(x) + 12).half().float().exp(),
        ("exp is over the range of f16 above 11.1",)),
    "mse_loss": Case(
        "mse_loss", lambda x: F.mse_loss(unit(x) * 1e20, unit(x)),
        lambda x: F.mse_loss(unit(x), unit(x) * 0),
        ("the result is over the range of f32 (largest 3.4e+38)", "from 0 to")),
    "acos": Case(
        "acos", lambda x: (unit(x) + 1.5).acos(), lambda x: unit(x).clamp(-0.9, 0.9).acos(),
        ("acos is defined between -1 and 1 only", "from 1.5 to")),
    "a negative number to a power": Case(
        "pow", lambda x: (-2.0) ** (unit(x) + 0.5), lambda x: 2.0 ** (unit(x) + 0.5),
        ("(-2) to a fractional power is NaN: the base is a negative number", "f32 [3, 4]")),
    "0 to a negative power": Case(
        "pow", lambda x: 0.0 ** (-unit(x) - 1), lambda x: 0.0 ** (unit(x) + 1),
        ("0 to a negative power is infinite: the base is the number 0",)),
    "a number to a large power": Case(
        "pow", lambda x: torch.pow(2.0, unit(x) + 200),
        lambda x: 2.0 ** (unit(x) + 200).clamp(max=63),
        ("2 to the power x is over the range of f32 (largest 3.4e+38) above 128",)),
    "a share to a power far below 0": Case(
        "pow", lambda x: 0.5 ** (unit(x) - 200), lambda x: 0.5 ** (unit(x) - 200).clamp(min=-63),
        ("0.5 to the power x is over the range of f32 (largest 3.4e+38) below -128",)),
    "nothing by the number 0": Case(
        "div", lambda x: x * 0 / 0, lambda x: x * 0 / 1,
        ("0 / 0 is NaN: it is divided by the number 0, and it got",)),
    "the number 0 by 0": Case(
        "div", lambda x: 0 / (x * 0), lambda x: 0 / (x * 0 + 1),
        ("0 / 0 is NaN; the divisor has 12 zeros out of 12",)),
    "a number by what is small": Case(
        "div", lambda x: 1e30 / (x * 0 + 1e-20), lambda x: 1e30 / (x * 0 + 1),
        ("the quotient is over the range", "the divisor is f32 [3, 4], all 1e-20")),
    "asin": Case(
        "asin", lambda x: (unit(x) + 1.5).asin(), lambda x: unit(x).clamp(-0.9, 0.9).asin(),
        ("asin is defined between -1 and 1 only",)),
    "atanh": Case(
        "atanh", lambda x: (unit(x) + 1).atanh(), lambda x: unit(x).clamp(-0.9, 0.9).atanh(),
        ("atanh is infinite at -1 and 1",)),
    "norm in half": Case(
        "norm", lambda x: (half(x) * 200).norm(), lambda x: (half(x) * 200).float().norm(),
        ("over the range of f16 (largest 65504)", "f16 [3, 4], all 6.0e+04")),
    "std of one": Case(
        "std", lambda x: x[:1].std(0), lambda x: x[:1].std(0, correction=0) + x[:1].mean(0),
        ("std of 1 element with correction 1 is 0 / 0", "f32 [1, 4]", "over dim 0")),
    "var of one": Case(
        "var", lambda x: x[0, 0].var(), lambda x: x[0, 0].var(correction=0),
        ("var of 1 element",)),
    "mean of nothing": Case(
        "mean", lambda x: x[x > INF].mean(), lambda x: x[x > INF].sum() / 1,
        ("the mean of nothing is 0 / 0", "f32 [0]")),
    "times the number NaN": Case(
        "mul", lambda x: x * float("nan"), lambda x: x * 2.0,
        ("an argument of it is the number NaN (other=NaN)",)),
    "minus the number inf": Case(
        "sub", lambda x: x - INF, lambda x: x - 2.0,
        ("an argument of it is the number inf (other=inf)",)),
    "softmax of a masked row": Case(
        "softmax", lambda x: x.masked_fill(~HIDES_A_ROW, -INF).softmax(-1),
        lambda x: x.masked_fill(~HIDES_A_ROW, torch.finfo(x.dtype).min).softmax(-1),
        ("a row that is -inf throughout", "its mask hides every position", "10 -inf of 12")),
    "softmax of a diagonal that is the whole row": Case(
        "softmax", lambda x: (x[:1] @ x[:1].T).fill_diagonal_(-INF).softmax(-1),
        lambda x: (x @ x.T).fill_diagonal_(-INF).softmax(-1),
        ("a row that is -inf throughout", "1 -inf of 1")),
    "attention over the range": Case(
        "scaled_dot_product_attention",
        lambda x: F.scaled_dot_product_attention(x[None] * 1e25, x[None] * 1e25, x[None])[0],
        # A row of the mask that hides everything gives zeros since torch 2.5.
        lambda x: F.scaled_dot_product_attention(
            x[None], x[None], x[None], attn_mask=HIDES_A_ROW[:, :3])[0],
        ("query times key is over the range of f32",)),
    "cross entropy without a target": Case(
        "cross_entropy", lambda x: F.cross_entropy(x, NOTHING),
        lambda x: F.cross_entropy(x, NOTHING, reduction="sum") / 1,
        ("all 3 targets are -100", "the mean over no target at all is 0 / 0")),
    "cross entropy of classes without weight": Case(
        "cross_entropy", lambda x: F.cross_entropy(x, LABELS * 0, NO_WEIGHT),
        lambda x: F.cross_entropy(x, LABELS, NO_WEIGHT),
        ("those are 0 for every target that is not ignored: 0 / 0; weight has 1 zero of 4",)),
    "kl_div of a target of logarithms": Case(
        "kl_div", lambda x: F.kl_div(x.log_softmax(1), x.log_softmax(1) - 1, reduction="sum"),
        lambda x: F.kl_div(x.log_softmax(1), x.log_softmax(1) - 1, reduction="sum",
                           log_target=True),
        ("it takes the logarithm of the target, which holds negative numbers",)),
    "mask of zeros times -inf": Case(
        "mul", lambda x: (x + HIDES_A_ROW[:1].float() * -INF).amax(1),
        lambda x: x.masked_fill(HIDES_A_ROW[:1], -INF).amax(1),
        ("0 * -inf is NaN, not 0; it got 3 zeros of 4",)),
    "dropout of a mask": Case(
        "dropout", lambda x: F.dropout(x.masked_fill(~HIDES_A_ROW[:1], -INF), 0.9).softmax(-1),
        lambda x: F.dropout(x.masked_fill(~HIDES_A_ROW[:1], -INF).softmax(-1), 0.9),
        ("what it drops it multiplies by 0, and 0 * -inf is NaN", "9 -inf of 12")),
    "gelu of a mask": Case(
        "gelu", lambda x: F.gelu(x.masked_fill(~HIDES_A_ROW[:1], -INF)).amax(1),
        lambda x: F.gelu(x).masked_fill(~HIDES_A_ROW[:1], -INF).amax(1),
        ("gelu of -inf is -inf * 0", "9 -inf of 12")),
    "log of a product": Case(
        "log", lambda x: x.softmax(-1).repeat(1, 90).prod(-1).log(),
        lambda x: x.softmax(-1).repeat(1, 90).log().sum(-1),
        ("a product of many factors below 1 is rounded to 0", "3 zeros of 3")),
    "log of a determinant": Case(
        "log", lambda x: (1e-16 * torch.eye(3) * x.sigmoid().mean()).det().log(),
        lambda x: torch.linalg.slogdet(1e-16 * torch.eye(3) * x.sigmoid().mean()).logabsdet,
        ("a determinant is a product", "1 zero of 1")),
    "log of an exponential": Case(
        "log", lambda x: (x - 200).exp().log(), lambda x: x - 200,
        ("exp(z), rounded to 0 where z is far below 0",)),
    "log of what shrank": Case(
        "log", lambda x: shrunk(x).log(), lambda x: x.sigmoid().log() + 4 * math.log(1e-15),
        ("all of it is 0: mul rounded to 0 what became too small",)),
    "log of what a mask hides": Case(
        "log", lambda x: (x.softmax(-1) * torch.zeros(3, 1)).log(),
        lambda x: x.softmax(-1).log() * torch.zeros(3, 1),
        ("all of it is 0, as a factor of mul is",)),
    "log of a mask's own": Case(
        "log", lambda x: (x.softmax(-1) * 0).log(), lambda x: x.softmax(-1).log() * 0,
        ("all of it is 0, as a factor of mul is",)),
    "ctc of a target longer than its input": Case(
        "ctc_loss", lambda x: F.ctc_loss(x.log_softmax(1)[:, None], SPELT, (3,), (3,)),
        lambda x: F.ctc_loss(x.log_softmax(1)[:, None], SPELT[:, :2], (3,), (2,)),
        ("more labels than frames", "it got f32 [3, 1, 4]")),
    "cross entropy of a class that is ruled out": Case(
        "cross_entropy", lambda x: F.cross_entropy(x.masked_fill(~HIDES_A_ROW[:1], -INF), LABELS),
        lambda x: F.cross_entropy(x, LABELS),
        ("a class of probability 0 costs infinity",)),
    "normalize in half": Case(
        "normalize", lambda x: F.normalize(unit(x).half(), dim=1),
        lambda x: F.normalize(unit(x), dim=1, eps=1e-3),
        ("eps 1e-12 rounds to 0 in f16: 0 / 0", "4 zeros of 12")),
    "division by the norm of zeros": Case(
        "div", lambda x: unit(x) / unit(x).norm(dim=1, keepdim=True),
        lambda x: unit(x) / (unit(x).norm(dim=1, keepdim=True) + 1e-3),
        ("the divisor has 1 zero out of 3",)),
    "layer norm without eps": Case(
        "layer_norm", lambda x: F.layer_norm(unit(x), (4,), eps=0.0),
        lambda x: F.layer_norm(unit(x), (4,)),
        ("equal elements have the variance 0, and with eps 0 that is 0 / 0",)),
    "batch norm of a negative variance": Case(
        "batch_norm", lambda x: F.batch_norm(x, ZEROS, SPREAD - 2),
        lambda x: F.batch_norm(x, ZEROS, SPREAD),
        ("the running variance is negative, its smallest value -1.5, and sqrt(var + 1e-05) is NaN",
         "as running_var it got f32 [4] from -1.5 to 1")),
    "torch's own batch norm of a negative variance": Case(
        "batch_norm",
        lambda x: torch.batch_norm(x, None, None, ZEROS, SPREAD - 2, False, 0.1, 1e-5, False),
        lambda x: torch.batch_norm(x, None, None, ZEROS, SPREAD, False, 0.1, 1e-5, False),
        ("the running variance is negative, its smallest value -1.5",)),
    "instance norm of a negative variance": Case(
        "instance_norm",
        lambda x: F.instance_norm(x[:, :, None], ZEROS, SPREAD - 2, use_input_stats=False),
        lambda x: F.instance_norm(x[:, :, None], ZEROS, SPREAD, use_input_stats=False),
        ("the running variance is negative, its smallest value -1.5",)),
    "batch norm over the range": Case(
        "batch_norm", lambda x: F.batch_norm(x * 1e30, ZEROS, SPREAD, SPREAD * 1e30),
        lambda x: F.batch_norm(x, ZEROS, SPREAD, SPREAD),
        ("the result is over the range of f32",)),
    "var with a correction of all": Case(
        "var", lambda x: (x * 0).var(0, correction=3), lambda x: (x * 0).var(0, correction=2),
        ("NaN came out of finite numbers, and none of them is near the largest of f32",)),
    "matmul in half": Case(
        "matmul", lambda x: half(x) @ half(x).T, lambda x: half(x).float() @ half(x).float().T,
        ("over the range of f16 (largest 65504)", "f16 [3, 4], all 300, f16 [4, 3], all 300")),
    "sum in half": Case(
        "sum", lambda x: (half(x) * 100).sum(), lambda x: (half(x) * 100).sum(dtype=torch.float32),
        ("over the range of f16", "all 3.0e+04")),
    "times a large number": Case(
        "mul", lambda x: unit(x) * 3e38 * 100, lambda x: unit(x) * 100,
        ("the result is over the range of f32 (largest 3.4e+38)", " and the number 100")),
    "plus a large number": Case(
        "add", lambda x: unit(x) * 0 + 3e38 + 3e38, lambda x: unit(x) + 3.0,
        ("the result is over the range of f32 (largest 3.4e+38)", " and the number 3.0e+38")),
    "cast to half": Case(
        "half", lambda x: (unit(x) + 1e5).half(), lambda x: (unit(x) + 1e5).bfloat16(),
        ("it does not fit in f16 (largest 65504)",)),
    "prod": Case(
        "prod", lambda x: (unit(x) + 1e15).prod(), lambda x: (unit(x) + 1.0).prod(),
        ("the product is over the range of f32",)),
    "cumprod": Case(
        "cumprod", lambda x: (unit(x) + 1e15).cumprod(1), lambda x: (unit(x) + 1.0).cumprod(1),
        ("the product is over the range of f32",)),
    "slogdet": Case(
        "linalg_slogdet", lambda x: torch.linalg.slogdet(x.T @ x * 0)[1],
        lambda x: torch.linalg.slogdet(x.T @ x * 0 + torch.eye(4))[1],
        ("the matrix is singular: its determinant is 0", "f32 [4, 4], all 0")),
    "inverse": Case(
        "linalg_inv_ex", lambda x: torch.linalg.inv_ex(x.T @ x * 0)[0],
        lambda x: torch.linalg.inv_ex(x.T @ x * 0 + torch.eye(4))[0],
        ("the matrix is singular or so nearly that its inverse is over the range",)),
    "anything else": Case(
        "digamma", lambda x: -unit(x).digamma(), lambda x: (unit(x) + 1).digamma(),
        ("outside its domain or over its range; it got f32 [3, 4] from 0 to",)),
}  # fmt: skip

BACKWARD = {
    "kl_div of a target that is trained": Case(
        "kl_div",
        lambda x: F.kl_div(x.log_softmax(1), (x * 1e3).softmax(1), reduction="none").sum(1),
        lambda x: F.kl_div(
            x.log_softmax(1), (x * 1e3).log_softmax(1), reduction="none", log_target=True).sum(1),
        ("the target y gets a gradient too, log(y) + 1 - x, and where y is 0 that is NaN",
         "zeros of 12 (f32 [3, 4] from 0 to 1)")),
    "sqrt": Case(
        "sqrt", lambda x: unit(x).sqrt(), lambda x: (unit(x) + 1e-3).sqrt(),
        ("the slope of sqrt is 1 / (2 sqrt(x)): infinite at 0", "4 zeros of 12")),
    "rsqrt": Case(
        "rsqrt", lambda x: (unit(x) + 1e-30).rsqrt(), lambda x: (unit(x) + 1e-3).rsqrt(),
        ("the slope of rsqrt is",)),
    "log selected by where": Case(
        "log", lambda x: torch.where(unit(x) > 0, unit(x).log(), x),
        lambda x: torch.where(unit(x) > 0, torch.where(unit(x) > 0, unit(x), 1.0).log(), x),
        ("infinite at 0", "4 zeros of 12", "where (", "sends it a gradient of 0, and 0 * inf")),
    "pow": Case(
        "pow", lambda x: unit(x) ** 0.3, lambda x: unit(x).clamp_min(1e-3) ** 0.3,
        ("the slope of x ** 0.3 is 0.3 x ** (0.3 - 1)", "4 zeros of 12")),
    "acos": Case(
        "acos", lambda x: (unit(x) * 0 + 1).acos(), lambda x: unit(x).clamp(-0.9, 0.9).acos(),
        ("the slope of acos is infinite at -1 and 1", "all 1")),
    "asin": Case(
        "asin", lambda x: (unit(x) * 0 - 1).asin(), lambda x: unit(x).clamp(-0.9, 0.9).asin(),
        ("the slope of asin is infinite at -1 and 1", "all -1")),
    "div": Case(
        "div", lambda x: (x / (unit(x) * 0 + 1e-30)) * 1e-8, lambda x: x / (unit(x) + 1e-3),
        ("x / y**2", "all 1e-30")),
    "prod": Case(
        "prod", lambda x: (unit(x)[:2] * 0 + torch.tensor([1e-30, 1e30, 1e30, 1e-5])).prod(1),
        lambda x: (unit(x)[:2] + 1).prod(1),
        ("the gradient of a product is the product of all others",)),
    "cumprod": Case(
        "cumprod", lambda x: (unit(x) * 0 + torch.tensor([1e-30, 1e30, 1e20, 1e-5])).cumprod(1),
        lambda x: (unit(x) + 1).cumprod(1),
        ("the gradient of a product is the product of all others", "from 1e-30")),
    "hypot": Case(
        "hypot", lambda x: unit(x).hypot(unit(x)), lambda x: (unit(x) + 1e-3).hypot(unit(x)),
        ("both are 0",)),
    "logsumexp": Case(
        "logsumexp",
        lambda x: (x + torch.where(HIDES_A_ROW, 0, -INF)).logsumexp(-1).clamp_min(-9.0),
        lambda x: (x + torch.where(HIDES_A_ROW, 0, -1e9)).logsumexp(-1).clamp_min(-9.0),
        ("a row that is -inf throughout",)),
    "eigh": Case(
        "linalg_eigh", lambda x: torch.linalg.eigh((x[0, 0] * 0).nan_to_num() + torch.eye(3))[1],
        lambda x: torch.linalg.eigvalsh(x[0, 0] * 0 + torch.eye(3)),
        ("eigenvalues a and b", "infinite where they are equal")),
    "acosh": Case(
        "acosh", lambda x: (unit(x) * 0 + 1).acosh(), lambda x: unit(x).clamp_min(1.1).acosh(),
        ("the slope of acosh is 1 / sqrt(x**2 - 1): infinite at 1; it got f32 [3, 4], all 1",)),
    "qr": Case(
        "linalg_qr", lambda x: torch.linalg.qr(x.T[:, :2] * 0)[1],
        lambda x: torch.linalg.qr(x.T[:, :2])[1], ("the inverse of its factor R",)),
    "digamma": Case(
        "digamma", lambda x: (unit(x) * 0 + 1e-30).digamma() * 1e-8,
        lambda x: (unit(x) + 1).digamma(),
        ("its slope there is infinite or over the range, or a hook", "all 1e-30")),
    "anything else": Case(
        "erfinv", lambda x: (unit(x) * 0 + 0.99999994).erfinv() * 1e35,
        lambda x: (unit(x) * 0.5).erfinv(),
        ("finite gradients went in, others came out", "f32 [3, 4], all 1")),
}  # fmt: skip
CASES = {
    **{f"forward {name}": case for name, case in FORWARD.items()},
    **{
        f"backward {name}": Case(c.op, c.wrong, c.right, c.says, "backward")
        for name, c in BACKWARD.items()
    },
}


class Model(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.fc(x)).float()


def train(part: Part, level: Level) -> list[Finding]:
    """Three updates; returns what is more than a note."""
    torch.manual_seed(0)
    model = Model(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    records = Recorded()
    with trace(out=records.append, every=1, level=level) as t:
        for _ in range(3):
            loss = model(torch.randn(3, 4)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [a.detail for a in records.actions("tracer_error")] == []
    return [finding for finding in t.findings if finding.severity != "note"]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", CASES)
def test_fault_is_explained_by_the_values_that_went_in(name: str, level: Level) -> None:
    case = CASES[name]
    (finding,) = train(case.wrong, level)
    assert (finding.op, finding.severity) == (case.op, "error")
    # Op level sees the -inf that `where` hides, and what it did in backward.
    assert finding.phase == ("forward" if "where" in name and level == "op" else case.phase)
    for words in case.says:
        assert words in finding.explanation
    # The message says what, how many and where; why is said once, elsewhere.
    assert re.search(r"made \d+ -?(NaN|inf)", finding.message)
    assert finding.explanation not in finding.message
    assert finding.fix


@pytest.mark.parametrize(("root", "fix"), [
    ("x.sqrt()", "x.clamp_min(1e-12).sqrt()"), ("x.rsqrt()", "x.clamp_min(1e-12).rsqrt()"),
    ("x ** 0.5", "x.clamp_min(1e-8).pow(0.5)"), ("x ** 1.5", "x.clamp_min(1e-8).pow(1.5)"),
])  # fmt: skip
def test_a_root_of_negatives_that_is_masked_later_is_no_matter_of_eps(root: str, fix: str) -> None:
    def part(of: str) -> Part:
        return lambda x: torch.where(x > 0, eval(of, {"x": x - 1e-3}) * 2, 0.0)

    (finding,) = train(part(root), "module")
    assert re.search(r"the slope of .* is NaN for a negative", finding.explanation)
    assert "hook" not in finding.explanation
    assert fix.replace("0.5)", "p)").replace("1.5)", "p)") in (finding.fix or "")
    assert train(part(fix), "module") == []


def test_an_op_without_a_backward_is_explained_without_one() -> None:
    def part(x: Tensor) -> Tensor:
        ones = 1 / (x.detach() * 0)
        return x * ones.isfinite() + torch.where(ones.isfinite(), ones, 0.0).log() * x.detach()

    (finding, *_) = train(part, "op")
    assert "in backward" not in finding.explanation


def test_number_that_is_not_finite_is_told_beside_the_inputs() -> None:
    (finding,) = train(FORWARD["times the number NaN"].wrong, "op")
    assert "from finite inputs and the number NaN" in finding.message
    # At op level these are fills, which are no origin: TT103 says that the trail ends at them.
    (finding,) = train(lambda x: x + torch.full((4,), float("nan")), "module")
    assert (finding.op, "from the number NaN" in finding.message) == ("full", True)
    (finding,) = train(lambda x: x * torch.tensor([float("nan")] * 4), "module")
    assert (finding.op, "from no tensor" in finding.message) == ("tensor", True)
    assert "no tensor went in: the number, list or array" in finding.explanation


def test_buffer_that_is_not_finite_is_told_at_the_op_that_takes_it() -> None:
    scale = torch.tensor(1.0).log() / 0
    (finding,) = train(lambda x: x * scale, "module")
    assert finding.message.endswith("in mul, of a tensor that is no input of it: f32 [] with 1 NaN "
                                    "of 1")  # fmt: skip
    assert "a buffer, a constant" in finding.explanation
    assert finding.location is not None
    assert finding.location.code is not None
    assert "x * scale" in finding.location.code
    assert train(lambda x: x * scale.nan_to_num(1.0), "module") == []


@pytest.mark.parametrize(("name", "words"), [
    ("cross entropy of classes without weight", "w[y].sum().clamp_min(1e-8)"),
    ("kl_div of a target of logarithms", "log_target=True), or y.exp() as the target"),
    ("mask of zeros times -inf", "scores.masked_fill(mask.bool(), float('-inf'))"),
    ("dropout of a mask", "drop after the softmax"),
    ("gelu of a mask", "mask after gelu"),
    ("log of a product", "p.log().sum(dim) for p.prod(dim).log()"),
    ("log of a determinant", "torch.linalg.slogdet(A).logabsdet"),
    ("log of an exponential", "z itself"),
    ("log of what shrank", "keep logarithms from the start"),
    ("log of what a mask hides", "for a mask x.log() * mask"),
    ("exp", "maximum first, x.clamp(max=80), or"),
    ("exp in half", "x.float() before it, subtract the maximum first, x.clamp(max=10), or"),
])  # fmt: skip
def test_repair_fits_the_fault_and_its_dtype(name: str, words: str) -> None:
    (finding,) = train(FORWARD[name].wrong, "op")
    assert words in (finding.fix or "")


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", CASES)
def test_repair_is_silent(name: str, level: Level) -> None:
    # Other families may speak of the same program: labels that are all ignored stay that.
    found = [f for f in train(CASES[name].right, level) if f.code.startswith("TT1")]
    assert [finding.message for finding in found] == []


LEFT, RIGHT = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("part", [
    lambda x: (x.softmax(-1) * LEFT * RIGHT).log(),
    lambda x: ((x.softmax(-1) * LEFT) @ (RIGHT[:, None] * x[0, 0].exp())).log(),
    lambda x: (x.softmax(-1) * LEFT[:, None, None]).prod(-1).log(),
])  # fmt: skip
def test_a_product_with_zeros_of_its_factors_is_not_said_to_be_rounded(part: Part) -> None:
    (finding,) = train(part, "op")
    assert finding.op == "log"
    assert "rounded to 0" not in finding.explanation


class Normaliser(nn.Module):
    """Keeps a running mean of large values: of none that is NaN, and shows in the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x / (self.spread + 1e-5)
        with torch.no_grad():
            large = (x > 0.5).float()
            self.spread.lerp_((x * large).sum(0) / large.sum(0), 0.1)
        return y


@pytest.mark.parametrize("bad_at", [1, 32])
def test_a_buffer_is_named_and_where_the_forward_writes_to_it(bad_at: int) -> None:
    def program() -> None:
        model = nn.Sequential(Normaliser(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(bad_at + 3):
            optimizer.zero_grad()
            x = torch.rand(64, 4) * (0.4 if step == bad_at else 1.0)
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    (finding,) = [f for f in find_live(program) if f.severity != "note"]
    assert (finding.step, finding.code, finding.module) == (bad_at + 1, "TT101", "0")
    assert "in add, of the buffer 0.spread: f32 [4] with 4 NaN of 4" in finding.message
    assert "writes to it in lerp_ at" in finding.explanation


def test_a_spoilt_running_mean_is_not_taken_for_the_weight_of_the_same_shape() -> None:
    def program() -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        mean = model[1].get_buffer("running_mean")
        for step in range(5):
            if step == 3:
                mean[0] = torch.nan
            optimizer.zero_grad()
            (model(torch.rand(8, 4)) - 1).square().mean().backward()
            optimizer.step()

    (finding,) = [f for f in find_live(program, "TT101") if f.severity != "note"]
    assert (finding.module, finding.param) == ("1", None)
    assert "of the buffer 1.running_mean: f32 [4] with 1 NaN of 4" in finding.message


PADDED = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
FAR = (torch.arange(6)[:, None] - torch.arange(6)).abs() > 1


@pytest.mark.parametrize(("mask", "padding", "why", "fix"), [
    (FAR, PADDED, "a row that the masks hide every position of, all of them together, gives 0 / 0; "
     "they hide 3 of 12 (f32 [2, 6]) and 20 of 36 (f32 [6, 6])", "fill each with -1e4"),
    (FAR | (torch.arange(6) == 0)[:, None], None, "a row of the mask that hides every position "
     "gives 0 / 0; it hides 22 of 36 (f32 [6, 6])", "fill with torch.finfo(x.dtype).min"),
    (None, PADDED | PADDED.flip(1), "a row of the mask that hides every position gives 0 / 0; "
     "it hides 6 of 12 (f32 [2, 6])", "fill with torch.finfo(x.dtype).min"),
])  # fmt: skip
def test_what_two_masks_hide_is_told_of_both(
    mask: Tensor | None, padding: Tensor | None, why: str, fix: str
) -> None:
    def program() -> None:
        attention = nn.MultiheadAttention(8, 1, batch_first=True)
        optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
        x = torch.randn(2, 6, 8)
        out, _ = attention(x, x, x, attn_mask=mask, key_padding_mask=padding)
        out.square().mean().backward()
        optimizer.step()

    (found,) = find_live(program, "TT101")
    assert (found.op, found.explanation) == ("multi_head_attention_forward", why)
    assert fix in (found.fix or "")


def test_what_is_true_in_a_mask_takes_part_or_not_as_the_op_has_it() -> None:
    mask = make_tensor(4, 4, 4, dtype="bool", zeros=12)
    given = [make_tensor(id, 4, 1, 4) for id in range(3)]

    def told(word: str) -> str:
        return explain(Facts(word, [*given, mask], [make_tensor(5, 4, 1, 4, nan=4)])).why

    assert "it hides 12 of 16 (b8 [4, 4])" in told("scaleddotproductattention")
    assert "it hides 4 of 16 (b8 [4, 4])" in told("multiheadattentionforward")


@pytest.mark.parametrize(("zeros", "trained", "arguments", "told"), [
    (2, True, {}, True), (0, True, {}, False), (2, False, {}, False),
    (2, True, {"log_target": True}, False),
])  # fmt: skip
def test_the_target_of_kl_div_is_blamed_for_zeros_that_need_a_gradient(
    zeros: int, trained: bool, arguments: dict[str, bool], told: bool
) -> None:
    x = make_tensor(1, 4, requires_grad=True)
    target = make_tensor(2, 4, min=0.0, zeros=zeros, requires_grad=trained)
    reason = backward.explain(Facts("kldiv", [x, target], [make_tensor(3)], arguments))
    assert reason.why.startswith("the target y gets a gradient too") == told
