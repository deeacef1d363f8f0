"""What causes/ says and advises is held against torch: a repair has to repair."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.causes import Facts, backward, forward, limit_of
from tensortrace.magnitudes import LARGEST
from tensortrace.records import Finding
from tensortrace.records import Tensor as Told
from tests.capture import Recorded
from tests.checks.traced import find_live

Repaired = Callable[[Tensor, float], Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ENDS = torch.tensor([-1.0, 0.5, 1.0])
FROM_0 = torch.tensor([0.0, 0.0, 1.0])
SINGULAR = torch.ones(3, 3)


def told(x: Tensor, *, requires_grad: bool = False) -> Told:
    """The record of a tensor, as far as an explanation looks at it."""
    known = x.detach()[x.isfinite()].float()
    return Told(
        0, tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), numel=x.numel(),
        requires_grad=requires_grad, nan=int(x.isnan().sum()), posinf=int(x.isposinf().sum()),
        neginf=int(x.isneginf().sum()), zeros=int((x == 0).sum()),
        min=known.min().item() if len(known) else None,
        max=known.max().item() if len(known) else None,
    )  # fmt: skip


def facts(word: str, *inputs: Tensor, out: Tensor | None = None, **arguments: float) -> Facts:
    outputs = [told(inputs[0] if out is None else out)]
    return Facts(word, [told(x) for x in inputs], outputs, arguments)


@pytest.mark.parametrize("name", [*LARGEST, "float64", "float8_e4m3fn", "float8_e5m2"])
def test_the_largest_number_of_a_dtype_is_that_of_torch(name: str) -> None:
    exact = torch.finfo(getattr(torch, name)).max
    assert LARGEST.get(name, exact) == exact
    assert 0.995 * exact < limit_of(name) <= exact  # three digits, rounded down


def advised(fix: str | None) -> float:
    """The first eps of a repair."""
    (first, *_) = re.findall(r"\d(?:\.\d+)?e-\d+", fix or "")
    return float(first)


ZERO: dict[str, Repaired] = {
    "log": lambda x, eps: x.clamp_min(eps).log(),
    "log2": lambda x, eps: x.clamp_min(eps).log2(),
    "log10": lambda x, eps: x.clamp_min(eps).log10(),
    "sqrt": lambda x, eps: x.clamp_min(eps).sqrt(),
    "rsqrt": lambda x, eps: (x + eps).rsqrt(),
    "div": lambda x, eps: torch.ones_like(x) / (x + eps),
    "xlogy": lambda x, eps: torch.xlogy(torch.ones_like(x), x.clamp_min(eps)),
    "logit": lambda x, eps: torch.logit(x, eps=eps),
}
ENDED: dict[str, Repaired] = {
    **{word: lambda x, eps, f=f: f(x.clamp(-1 + eps, 1 - eps))
       for word, f in (("acos", torch.acos), ("arccos", torch.arccos), ("asin", torch.asin),
                       ("arcsin", torch.arcsin), ("atanh", torch.atanh),
                       ("arctanh", torch.arctanh), ("erfinv", torch.erfinv))},
    "acosh": lambda x, eps: torch.acosh(x.clamp_min(1 + eps)),
    "arccosh": lambda x, eps: torch.arccosh(x.clamp_min(1 + eps)),
    "log1p": lambda x, eps: x.clamp_min(-1 + eps).log1p(),
    "xlog1py": lambda x, eps: torch.special.xlog1py(torch.ones_like(x), x.clamp_min(-1 + eps)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("explain", [forward.explain, backward.explain])
@pytest.mark.parametrize("word", [*ZERO, *ENDED])
def test_eps_of_a_repair_does_something_in_the_dtype(
    word: str, explain: Callable[[Facts], forward.Reason], dtype: torch.dtype
) -> None:
    x = (FROM_0 if word in ZERO else ENDS).to(dtype, copy=True).requires_grad_()
    reason = explain(facts(word, x.detach()))
    made = {**ZERO, **ENDED}[word](x, advised(reason.fix))
    made.sum().backward()
    assert x.grad is not None
    assert (made.isfinite().all(), x.grad.isfinite().all()) == (True, True), reason


@pytest.mark.parametrize(("p", "word"), [(-1.0, "pow"), (-0.5, "pow"), (-2.0, "pow"), (0.3, "pow")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_under_a_power_keeps_its_slope_in_the_range(
    p: float, word: str, dtype: torch.dtype
) -> None:
    x = FROM_0.to(dtype, copy=True).requires_grad_()
    reason = backward.explain(facts(word, x.detach(), exponent=p))
    made = x.clamp_min(advised(reason.fix)).pow(p)
    made.sum().backward()
    assert x.grad is not None
    assert (made.isfinite().all(), x.grad.isfinite().all()) == (True, True), reason


@pytest.mark.parametrize("explain", [forward.explain, backward.explain])
def test_only_float16_is_told_that_the_usual_eps_rounds_to_0(
    explain: Callable[[Facts], forward.Reason],
) -> None:
    assert "an eps of 1e-8 rounds to 0 in f16" in explain(facts("log", FROM_0.half())).why
    assert "rounds to 0" not in explain(facts("log", FROM_0)).why
    assert "rounds to 0" not in explain(facts("log", FROM_0.bfloat16())).why
    assert "rounds to 0" not in forward.explain(facts("normalize", FROM_0 * 0)).why


@pytest.mark.parametrize("word", ["acosh", "arccosh"])
def test_slope_of_acosh_is_infinite_at_1_alone(word: str) -> None:
    reason = backward.explain(facts(word, torch.tensor([1.0, 1.36])))
    assert "infinite at 1;" in reason.why
    assert reason.fix == f"{word}(x.clamp_min(1 + 1e-6))"


def test_slope_of_log1p_is_infinite_at_minus_1() -> None:
    assert "infinite at -1" in backward.explain(facts("log1p", ENDS)).why
    assert "y = -1" in backward.explain(facts("xlog1py", ENDS, ENDS)).why
    assert "y = -1" in forward.explain(facts("xlog1py", ENDS, ENDS)).why


@pytest.mark.parametrize("word", ["std", "norm", "linalg_vector_norm", "cdist", "dist"])
def test_gradient_at_a_norm_or_std_of_0_is_not_said_to_be_infinite(word: str) -> None:
    x = torch.zeros(3, 3, requires_grad=True)
    made = {
        "std": x.std(0),
        "norm": x.norm(dim=1),
        "cdist": torch.cdist(x, x),
        "linalg_vector_norm": torch.linalg.vector_norm(x),
        "dist": torch.dist(x, x * 0),
    }[word]
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    why = backward.explain(facts(word.replace("_", ""), x.detach())).why
    assert "0 / 0" not in why
    assert "(0 for a" in why


@pytest.mark.parametrize(("word", "f"), [
    ("linalgslogdet", lambda x: torch.linalg.slogdet(x)[1]), ("logdet", torch.logdet),
    ("linalginvex", lambda x: torch.linalg.inv_ex(x)[0]),
    ("linalgsolveex", lambda x: torch.linalg.solve_ex(x, x[0])[0]),
])  # fmt: skip
def test_singular_matrix_is_called_so_and_a_jitter_mends_it(
    word: str, f: Callable[[Tensor], Tensor]
) -> None:
    made = f(SINGULAR)
    assert not made.isfinite().all()
    reason = forward.explain(facts(word, SINGULAR, out=made))
    assert "the matrix is singular" in reason.why
    x = (SINGULAR + advised(reason.fix) * torch.eye(3)).requires_grad_()
    f(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_jitter_is_not_lost_in_a_large_matrix() -> None:
    x = SINGULAR * 110
    reason = forward.explain(facts("logdet", x, out=torch.logdet(x)))
    assert (reason.fix or "").startswith("A + 1e-3 * torch.eye(n)")
    assert (x + advised(reason.fix) * torch.eye(3)).logdet().isfinite()


def test_negative_determinant_has_no_logarithm() -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    reason = forward.explain(facts("logdet", x, out=torch.logdet(x)))
    assert "negative determinant" in reason.why
    assert torch.linalg.slogdet(x)[1] == 0


def test_determinant_and_a_large_solution_are_over_the_range() -> None:
    x = torch.eye(3) * 1e20
    assert "over the range of f32" in forward.explain(facts("det", x, out=torch.det(x))).why
    reason = forward.explain(facts("linalgsolve", torch.eye(3), x, out=x * math.inf))
    assert "singular" not in reason.why


@pytest.mark.parametrize(("word", "what"), [
    ("linalgqr", "its factor R"), ("linalgcholeskyex", "its factor L"),
    ("linalginv", "of the matrix"), ("linalgslogdet", "of the matrix"),
])  # fmt: skip
def test_gradient_that_holds_an_inverse(word: str, what: str) -> None:
    reason = backward.explain(facts(word, SINGULAR))
    assert what in reason.why
    assert "singular or nearly so" in reason.why


def test_gradient_of_svd_divides_by_differences_of_squares() -> None:
    why = backward.explain(facts("linalgsvd", SINGULAR)).why
    assert "1 / (a**2 - b**2)" in why
    assert "not square" not in why
    assert "1 / a, as the matrix is not square" in backward.explain(
        facts("linalgsvd", torch.ones(4, 3))).why  # fmt: skip


CALM = torch.tensor([0.5, 0.9])


@pytest.mark.parametrize(("word", "inputs", "arguments"), [
    ("linear", [CALM, CALM], {}), ("mul", [CALM, CALM], {}), ("mul", [CALM], {"other": 2.0}),
    ("sqrt", [CALM], {}), ("rsqrt", [CALM], {}), ("log", [CALM], {}), ("acos", [CALM], {}),
    ("acosh", [CALM + 1], {}), ("div", [CALM, CALM], {}), ("div", [CALM], {"other": 2.0}),
    ("pow", [CALM], {"exponent": 0.5}), ("pow", [CALM * 0], {"exponent": 2.0}),
    ("exp", [CALM], {}), ("log1p", [CALM - 1], {}), ("logit", [CALM], {}),
    ("xlogy", [CALM * 0, CALM], {}), ("hypot", [CALM * 0, CALM], {}), ("logsumexp", [CALM], {}),
])  # fmt: skip
def test_moderate_numbers_are_not_blamed(
    word: str, inputs: list[Tensor], arguments: dict[str, float]
) -> None:
    reason = backward.explain(facts(word, *inputs, **arguments))
    assert "a hook on the tensor or module may have changed them" in reason.why
    assert not re.search(r"infinite|the gradient times|slope", reason.why)
    short = backward.explain(facts(word, *(x.half() for x in inputs), **arguments))
    assert "near the end of the range of f16 (largest 65504) before" in short.why
    assert "scale the loss down" in (short.fix or "")


@pytest.mark.parametrize(("word", "inputs", "arguments"), [
    ("linear", [CALM, CALM * 1e25], {}), ("mul", [CALM], {"other": 1e30}),
    ("linear", [CALM.half(), CALM.half() * 6e4], {}), ("acos", [CALM + 0.1], {}),
    ("acosh", [CALM + 0.5], {}), ("div", [CALM, CALM * 1e-30], {}), ("atanh", [CALM * 2], {}),
    ("pow", [CALM * 0], {"exponent": 0.5}), ("exp", [CALM * 100], {}),
    ("log1p", [ENDS], {}), ("logit", [CALM + 0.1], {}), ("xlogy", [CALM, CALM * 0], {}),
    ("hypot", [FROM_0, FROM_0], {}), ("logsumexp", [CALM.log() - math.inf], {}),
])  # fmt: skip
def test_numbers_that_may_do_it_are(
    word: str, inputs: list[Tensor], arguments: dict[str, float]
) -> None:
    assert "a hook" not in backward.explain(facts(word, *inputs, **arguments)).why


def train(loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[Finding]:
    """One update of a layer; a target is missing."""
    torch.manual_seed(0)
    fc, records = nn.Linear(4, 3), Recorded()
    optimizer = torch.optim.SGD(fc.parameters(), lr=1e-3)
    with trace(out=records.append, every=1, level="op") as t:
        made, y = fc(torch.randn(8, 4)), torch.randn(8, 3)
        y[2, 1] = math.nan
        loss_of(made, y).backward()
        optimizer.step()
    return [f for f in t.findings if f.severity != "note"]


@pytest.mark.parametrize(("op", "loss_of"), [
    ("pow", lambda p, y: torch.where(y.isnan(), 0.0, (p - y) ** 2).mean()),
    ("mul", lambda p, y: torch.where(y.isnan(), 0.0, p * y).mean()),
    ("mul", lambda p, y: (p * y)[~y.isnan()].mean()),
])  # fmt: skip
def test_missing_value_that_is_left_out_too_late_is_told(
    op: str, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    (found,) = train(loss_of)
    assert (found.code, found.op) == ("TT102", op)
    assert "1 NaN of 24" in found.explanation
    assert "0 * NaN is NaN" in found.explanation
    assert "infinite" not in found.explanation
    assert "torch.where(ok, x, 0.0)" in (found.fix or "")


def test_missing_value_is_no_factor_of_its_own_gradient() -> None:
    bad, good = torch.tensor([math.nan, 1.0]), CALM
    of_it = Facts("mul", [told(bad, requires_grad=True), told(good)], [told(bad)])
    assert "0 * NaN" not in backward.explain(of_it).why
    other = Facts("mul", [told(bad), told(good, requires_grad=True)], [told(bad)])
    assert "0 * NaN" in backward.explain(other).why
    assert "0 * NaN" not in backward.explain(facts("mul", bad, other=2.0)).why


def test_mask_that_is_multiplied_with_minus_infinity_is_told_to_select() -> None:
    (found,) = train(lambda p, y: (p.masked_fill(y.isnan(), -math.inf) * ~y.isnan()).mean())
    assert (found.code, found.op) == ("TT101", "mul")
    assert "0 * -inf is NaN" in found.explanation
    assert "torch.where" in (found.fix or "")
    assert "on what goes in, before the product" in (found.fix or "")


def test_hook_that_spoils_a_gradient_is_not_called_an_overflow() -> None:
    def loss_of(p: Tensor, y: Tensor) -> Tensor:
        p = p.tanh()
        p.register_hook(lambda g: g / (g * 0))
        return F.linear(p, torch.ones(2, 3)).mean()

    (found,) = train(loss_of)
    assert (found.code, found.phase) == ("TT102", "backward")
    assert "over the range of f32 (" not in found.explanation
    assert "a hook on the tensor or module may have changed them" in found.explanation


def test_number_and_tensor_of_a_division_are_told_apart() -> None:
    x = torch.tensor([0.0, 2.0])
    for made, words in ((x / 0, "divided by the number 0"), (0 / x, "the divisor has 1 zero")):
        assert words in forward.explain(facts("div", x, out=made, other=0)).why
    x = torch.tensor([0.0, 1e30])
    assert "the quotient by 1e-30 is over" in forward.explain(
        facts("div", x, out=x / 1e-30, other=1e-30)).why  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_beside_a_root_goes_under_it(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).to(dtype).requires_grad_()
    root = x.square().sum(1, keepdim=True).sqrt()
    y = msgspec.structs.replace(told(root), grad_fn="SqrtBackward0")
    reason = forward.explain(Facts("div", [told(x), y], [told(x / root)]))
    assert "the divisor has 1 zero" in reason.why
    assert "add eps before the root, not after" in (reason.fix or "")
    for mended, helps in (
        (x / (x.square().sum(1, keepdim=True) + advised(reason.fix)).sqrt(), True),
        (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-2), False),
    ):
        x.grad = None
        mended.sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all()) is helps


@pytest.mark.parametrize("level", ["module", "op"])
def test_division_by_a_root_is_told_where_its_eps_goes(level: str) -> None:
    def program() -> None:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), Unit())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(4):
            x = torch.randn(8, 4) * torch.arange(8)[:, None].clamp_min(step != 2)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    (found,) = [f for f in find_live(program, level=level) if f.severity != "note"]
    assert (found.code, found.step, found.op) == ("TT101", 2, "div")
    assert "x / (s + 1e-12).sqrt(); for a norm F.normalize" in (found.fix or "")


class Unit(nn.Module):
    """Rows of length 1; one of zeros has none."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt()


def test_number_to_the_power_of_a_tensor_overflows() -> None:
    x = torch.tensor([0.0, 200.0])
    assert "over the range" in forward.explain(facts("pow", x, out=2.0**x)).why
    assert "a ** x log(a)" in backward.explain(facts("pow", x)).why


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", ["pow", "floatpower"])
def test_gradient_of_a_learned_power_has_a_logarithm(word: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-0.5, 0.0, 2.0]).to(dtype)
    p = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    x.pow(p).sum().backward()
    assert p.grad is not None
    assert p.grad.isnan()
    two = [told(x), told(p, requires_grad=True)]
    reason = backward.explain(Facts(word, two, [told(x**3)]))
    assert "x ** p log(x): NaN for a negative x; it got" in reason.why
    assert "infinite at 0" not in reason.why
    learned, p.grad = x.clone().requires_grad_(), None
    learned.clamp_min(advised(reason.fix)).pow(p).sum().backward()
    assert learned.grad is not None
    assert (p.grad.isfinite(), learned.grad.isfinite().all()) == (True, True)


def test_power_that_learns_nothing_or_of_positive_numbers_has_no_logarithm() -> None:
    x, p = torch.tensor([-0.5, 2.0]), torch.tensor(3.0)
    for one, learns in ((x, False), (x.abs(), True)):
        why = backward.explain(
            Facts("pow", [told(one), told(p, requires_grad=learns)], [told(one**3)])
        ).why
        assert "log" not in why
        assert "the slope of x ** p is p x ** (p - 1): over the range of f32" in why


def test_power_of_what_is_not_known_has_both_reasons() -> None:
    why = backward.explain(Facts("pow", [], [])).why
    assert "infinite at 0 for a power below 1, and that of a learned power is" in why
    assert "learned" not in backward.explain(Facts("pow", [], [], {"exponent": 0.5})).why


class Pool(nn.Module):
    """The generalised mean, whose power is learned."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.p, self.least = nn.Parameter(torch.full((1,), 3.0)), least

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(self.least).pow(self.p).mean(1).clamp_min(1e-6).pow(1 / self.p)


@pytest.mark.parametrize("level", ["module", "op"])
def test_learned_power_of_a_generalised_mean_is_explained(level: str) -> None:
    def program(least: float) -> None:
        model = nn.Sequential(nn.Linear(6, 8), Pool(least))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()

    (found,) = [f for f in find_live(lambda: program(-math.inf), level=level)
                if f.severity != "note"]  # fmt: skip
    assert (found.code, found.op, found.step) == ("TT102", "pow", 0)
    assert "NaN for a negative x; it got f32 [16, 8] from -" in found.explanation
    assert found.fix == "x.clamp_min(1e-6).pow(p)"
    mended = find_live(lambda: program(1e-6), level=level)
    assert [f for f in mended if f.severity != "note"] == []


def test_learned_power_under_a_mask_is_0_times_nan() -> None:
    def program() -> None:
        p, x = nn.Parameter(torch.tensor(3.0)), torch.randn(8)
        optimizer = torch.optim.SGD([p], 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            torch.where(x > 0, x.pow(p), 0.0).sum().backward()
            optimizer.step()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert found.code == "TT102"
    assert "and 0 * NaN is NaN" in found.explanation
    assert "make the argument safe first" in (found.fix or "")


def test_gradient_that_is_cast_to_float16_is_told_as_such() -> None:
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    (x.float() * 1e6).sum().backward()
    assert x.grad is not None
    assert x.grad.isinf().all()
    reason = backward.explain(facts("float", x.detach(), out=x.detach().float()))
    assert "range of f16 (largest 65504) before, or over it in float32" in reason.why
    assert "scale the loss down" in (reason.fix or "")


def test_sum_and_product_of_moderate_numbers_are_not_over_the_range() -> None:
    nan = torch.tensor(math.nan)
    for word in ("matmul", "linear", "sum", "norm", "add"):
        assert "outside its domain or" in forward.explain(facts(word, CALM, CALM, out=nan)).why
        large = CALM * 1e20
        assert "the result is over" in forward.explain(facts(word, large, large, out=nan)).why
    half = torch.full((300,), 300.0).half()
    assert "the result is over" in forward.explain(facts("sum", half, out=half.sum())).why


def test_attention_of_moderate_numbers_is_not_over_the_range() -> None:
    x, nan = torch.ones(1, 3, 4), torch.tensor(math.nan)
    for factor, over in ((1.0, False), (1e20, True)):
        why = forward.explain(
            facts("scaleddotproductattention", x * factor, x * factor, x, out=nan)
        ).why
        assert ("query times key" in why) is over


def test_missing_value_divided_by_what_has_a_gradient_is_told() -> None:
    bad = torch.tensor([math.nan, 1.0])
    for wanted in (True, False):
        f = Facts("div", [told(bad), told(CALM, requires_grad=wanted)], [told(bad)])
        assert ("0 * NaN" in backward.explain(f).why) is wanted


@pytest.mark.parametrize("word", ["sum", "mul", "div", "inverse", "solve", "pow", "exp", "sqrt"])
def test_numbers_near_the_end_of_float64_raise_nothing(word: str) -> None:
    x = torch.full((2, 2), 1e200, dtype=torch.float64)
    for one in (facts(word, x, x, out=x * 1e200), facts(word, x, out=x * 1e200)):
        assert forward.explain(one).why
        assert backward.explain(one).why


def sums(p: Tensor, factor: float) -> Tensor:
    z = p * factor - 200
    return (torch.tensor([0.5, 2.0, 1.0]) * z.exp()).sum(-1)


def test_the_logarithm_of_a_sum_of_exponentials_is_told_to_be_logsumexp() -> None:
    (found,) = train(lambda p, y: (sums(p, 1.0).log() - y.sum()).mean())
    assert (found.code, found.op) == ("TT101", "log")
    assert "exp(z), is rounded to 0" in found.explanation
    assert found.fix is not None
    assert found.fix.startswith("torch.logsumexp(z, dim)")
    z, w = torch.randn(4, 3) - 200, torch.tensor([0.5, 2.0, 1.0])
    assert (w * z.exp()).sum(-1).log().isneginf().all()
    repaired = torch.logsumexp(z + w.log(), -1)
    assert torch.allclose(repaired.double(), (w.double() * z.double().exp()).sum(-1).log())
    # Nothing is said of exponentials where there are none, nor where the sum is not of them.
    for loss in (lambda p, y: (p * 0).sum(-1).log().mean(),
                 lambda p, y: (p.exp().relu().sum(-1) * 0).cumsum(-1).log().mean()):  # fmt: skip
        (found,) = train(loss)
        assert "exp(z)" not in found.explanation


def test_of_a_backward_that_only_carries_nan_on_nothing_is_said() -> None:
    def loss_of(p: Tensor, y: Tensor) -> Tensor:
        mask = torch.zeros(p.shape)
        mask[1] = -math.inf
        weights = (p + mask).softmax(-1)
        return torch.where(mask < 0, 0.0, weights).square().mean()

    (found,) = train(loss_of)
    assert (found.code, found.op) == ("TT101", "softmax")
    assert "finite gradients went in" not in found.explanation
    assert "its mask hides every position" in found.explanation
