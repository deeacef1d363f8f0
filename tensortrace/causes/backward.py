"""Why the gradient that an op makes is not finite: one explanation for each kind of op."""

from __future__ import annotations

from collections.abc import Callable

from tensortrace.causes import (
    Facts,
    Reason,
    counted,
    large,
    negative,
    range_text,
    values_text,
    zero,
)
from tensortrace.records import Call
from tensortrace.text import location_text, number_text, short_dtype


def explain(facts: Facts, selected_by: Call | None = None) -> Reason:
    """Say why the backward of an op made what is not finite.

    Args:
        facts: the op as it was called in the forward pass.
        selected_by: the op that picked from its result and left the rest out.
    """
    reason = _BY_WORD.get(facts.word, _general)(facts)
    if selected_by is None or facts.word not in _BY_WORD:
        return reason
    place = f"{selected_by.op} ({location_text(selected_by.location)})"
    why = f"{reason.why}; {place} does not use that element, but sends it a gradient of 0, "
    fix = "make the argument safe first: f(torch.where(ok, x, 1.0)), and select after that"
    return Reason(f"{why}and 0 * inf is NaN", fix, reason.blamed, reason.carries)


def explain_function(name: str) -> Reason:
    """The same of an autograd function of the user's own, which computes its gradient itself."""
    return Reason(
        f"{name} is an autograd function of yours: finite gradients went into its backward(), "
        "others came out",
        f"guard what {name}.backward() divides by or takes the root, power or logarithm of; "
        f"torch.autograd.gradcheck({name}.apply, inputs) in float64 compares it with differences",
    )


def _got(f: Facts, *told: str) -> str:
    if not f.inputs:
        return ""
    x = f.first
    told_all = f"{' and '.join(told)} of {x.numel} ({values_text(x)})" if told else values_text(x)
    return f"; it got {told_all}"


def _zeros(f: Facts) -> list[str]:
    return [counted(f.first.zeros, "zero")] if f.first.zeros else []


def _root(f: Facts) -> Reason:
    slope = "1 / (2 sqrt(x))" if f.word == "sqrt" else "-1 / (2 x sqrt(x))"
    why = f"the slope of {f.word} is {slope}: infinite at 0, and infinity times a zero gradient "
    why += f"is NaN{_got(f, *_zeros(f))}"
    return Reason(why, f"add eps before the root: (x + 1e-12).{f.word}(), or x.clamp_min(1e-12)",
                  f.first, zero)  # fmt: skip


def _log(f: Facts) -> Reason:
    why = f"the slope of {f.word} is 1 / x: infinite at 0{_got(f, *_zeros(f))}"
    fix = "clamp the argument before the log: x.clamp_min(1e-8).log()"
    return Reason(why, fix, f.first, zero)


def _norm(f: Facts) -> Reason:
    why = f"the gradient of a norm is x / norm: 0 / 0 for a vector of zeros{_got(f, *_zeros(f))}"
    fix = "(x.square().sum(-1) + 1e-12).sqrt(), or skip the pairs whose distance is 0"
    return Reason(why, fix, f.first, zero)


def _div(f: Facts) -> Reason:
    y = f.inputs[-1] if f.inputs else f.first
    why = "the gradient of x / y holds 1 / y and x / y**2, which overflow where y is near 0"
    if f.inputs:
        told = f"{counted(y.zeros, 'zero')} of {y.numel} ({values_text(y)})" if y.zeros else (
            values_text(y))  # fmt: skip
        why += f"; the divisor has {told}"
    return Reason(why, "x / (y + 1e-8), or replace y under the mask before dividing", y, zero)


def _pow(f: Facts) -> Reason:
    p = f.number("exponent", "1")
    power = "p" if p is None else number_text(p)
    why = f"the slope of x ** {power} is {power} x ** ({power} - 1): infinite at 0 for a power "
    why += f"below 1{_got(f, *_zeros(f))}"
    return Reason(why, "x.clamp_min(1e-8).pow(p)", f.first, zero)


def _arc(f: Facts) -> Reason:
    why = f"the slope of {f.word} is infinite at -1 and 1{_got(f)}"
    return Reason(why, f"{f.word}(x.clamp(-1 + 1e-6, 1 - 1e-6))", f.first, large)


def _where(f: Facts) -> Reason:
    why = "where sends 0 to the branch not taken, and 0 * inf in that branch is NaN"
    return Reason(why, "make the argument safe first: f(torch.where(ok, x, 1.0)), then select")


def _std(f: Facts) -> Reason:
    why = f"{f.word} of equal values is 0, and its slope there is infinite{_got(f)}"
    return Reason(why, "(x.var(correction=0) + 1e-8).sqrt()", f.first)


def _exp(f: Facts) -> Reason:
    why = f"the gradient of {f.word} is {f.word} itself and overflows with it{_got(f)}"
    return Reason(why, "x.clamp(max=80) before it", f.first, large)


def _product(f: Facts) -> Reason:
    why = "the gradient of a product is the product of all others (the result / x): over the "
    why += f"range of {short_dtype(f.dtype)} where one is tiny{_got(f, *_zeros(f))}"
    return Reason(why, "add the logarithms: x.log().cumsum(-1).exp()", f.first, zero)


def _hypot(f: Facts) -> Reason:
    why = f"hypot has no direction where both are 0: its gradient is 0 / 0{_got(f, *_zeros(f))}"
    return Reason(why, "(x**2 + y**2 + 1e-12).sqrt()", f.first, zero)


def _logsumexp(f: Facts) -> Reason:
    why = f"the gradient of {f.word} is a softmax, and a row that is -inf throughout has none"
    return Reason(why, "let every row keep one element that is not -inf", f.first)


def _decomposition(f: Facts) -> Reason:
    why = "the gradient holds 1 / (a - b) for each two singular values or eigenvalues a and b, "
    why += f"infinite where they are equal{_got(f)}"
    return Reason(why, "use the values only, or add a small random diagonal before", f.first)


def _product_of(f: Facts) -> Reason:
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    why = "the gradient times what went in is over the range of "
    why += f"{range_text(f.dtype)}; it got {told}"
    fix = "compute this in float32, scale the loss down, or clip before"
    return Reason(why, fix, max(f.inputs, key=large, default=None), large)


def _xlogy(f: Facts) -> Reason:
    y = f.inputs[-1] if f.inputs else f.first
    why = "the gradient of x * log(y) holds log(y) and x / y: infinite at y = 0; y is "
    why += values_text(y)
    return Reason(why, "torch.xlogy(x, y.clamp_min(1e-8))", y, zero)


def _general(f: Facts) -> Reason:
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    why = "finite gradients went in, others came out: its slope there is infinite or over the range"
    return Reason(f"{why}; in the forward pass it got {told}" if told else why, None,
                  f.inputs[0] if f.inputs else None, negative)  # fmt: skip


_BY_WORD: dict[str, Callable[[Facts], Reason]] = {
    word: explain_
    for explain_, words in (
        (_root, "sqrt rsqrt"), (_log, "log log2 log10 log1p logit"), (_xlogy, "xlogy"),
        (_norm, "norm linalgvectornorm linalgnorm dist cdist pairwisedistance normalize"),
        (_div, "div truediv divide reciprocal rdiv"), (_pow, "pow floatpower"),
        (_arc, "acos asin arccos arcsin atanh acosh"), (_where, "where maskedfill"),
        (_std, "std stdmean"), (_exp, "exp expm1 exp2 sinh cosh"), (_product, "prod cumprod"),
        (_hypot, "hypot"), (_logsumexp, "logsumexp logaddexp logcumsumexp"),
        (_decomposition, "svd eigh linalgsvd linalgeigh eig linalgeig"),
        (_product_of, "mul matmul mm bmm linear addmm conv1d conv2d conv3d einsum square"),
    )
    for word in words.split()
}  # fmt: skip
