"""How steep an op can have been, by the recorded ends of what went in."""

from __future__ import annotations

import math
from collections.abc import Callable

from tensortrace.causes import Facts, largest, may_be_zero
from tensortrace.records import Tensor

PRODUCTS = (
    "mul multiply imul rmul matmul rmatmul mm bmm linear addmm baddbmm conv1d conv2d conv3d "
    "convtranspose1d convtranspose2d convtranspose3d einsum square dot mv bilinear"
)
DIVISIONS = "div truediv truedivide divide reciprocal rtruediv rdiv itruediv"


def steepest(f: Facts) -> float | None:
    """Bound the slope of an op over what it was given; None if the facts do not.

    Of a sum of products that is the largest factor: the number of terms is left out, as the
    bound is compared with a range that exceeds any.
    """
    slope = _SLOPES.get(f.word)
    if slope is None or not f.inputs or f.first.min is None or f.first.max is None:
        return None
    if slope is not _of_product and any(t.nonfinite for t in f.inputs):
        return None
    try:
        return slope(f, f.first)
    except (ArithmeticError, ValueError):  # at the singular point, or beyond it
        return None


def _of_activation(f: Facts, x: Tensor) -> float:
    return 1.2  # 1 of most, 1.13 of gelu, 1.10 of silu, 2 / sqrt(pi) of erf


def _of_root(f: Facts, x: Tensor) -> float:
    low = _above_0(x.min)
    return 1 / math.sqrt(low) if f.word == "sqrt" else 1 / (low * math.sqrt(low))


def _of_log(f: Facts, x: Tensor) -> float:
    return 2 / _above_0(x.min)


def _of_log1p(f: Facts, x: Tensor) -> float:
    return 1 / _above_0(1 + (x.min or 0.0))


def _of_logit(f: Facts, x: Tensor) -> float:
    return 1 / (_above_0(x.min) * _above_0(1 - (x.max or 0.0)))


def _of_xlogy(f: Facts, x: Tensor) -> float:
    y = f.inputs[-1]
    low = _above_0(y.min if f.word == "xlogy" else 1 + (y.min or 0.0))
    return max(1.0, largest(x)) / low


def _of_hypot(f: Facts, x: Tensor) -> float:
    return 1.0 if any(not may_be_zero(t) for t in f.inputs) else math.inf


def _of_one(f: Facts, x: Tensor) -> float:
    return 1.0


def _of_arc(f: Facts, x: Tensor) -> float:
    if f.word in ("acosh", "arccosh"):
        return 1 / math.sqrt((x.min or 0.0) - 1)
    # That of atanh; the others are less steep.
    return 1 / _above_0(1 - largest(x) ** 2)


def _of_pow(f: Facts, x: Tensor) -> float:
    p = f.number("exponent", "1")
    if p is None:
        return math.inf
    if p % 1 and (x.min or 0.0) < 0:
        raise ValueError  # NaN, whatever the power
    return abs(p) * math.pow(largest(x) if p >= 1 else _above_0(x.min), p - 1)


def _of_div(f: Facts, x: Tensor) -> float:
    y = f.inputs[-1]
    if y.min is None or y.max is None or y.min <= 0 <= y.max:
        return math.inf
    low, n = min(abs(y.min), abs(y.max)), f.number("self", "other", "1")
    if len(f.inputs) < 2 and n is not None:  # the dividend or the divisor
        return max(1 / abs(n), abs(n) / low**2)
    return max(1.0, largest(x) / low) / low


def _of_exp(f: Facts, x: Tensor) -> float:
    return math.exp(largest(x))


def _of_product(f: Facts, x: Tensor) -> float:
    if any(t.min is None and t.numel for t in f.inputs):
        return math.inf
    return max(abs(f.number("other", "1") or 0.0), *(largest(t) for t in f.inputs))


def _above_0(n: float | None) -> float:
    if n is None or n <= 0:
        raise ValueError
    return n


_SLOPES: dict[str, Callable[[Facts, Tensor], float]] = {
    word: slope
    for slope, words in (
        (_of_root, "sqrt rsqrt"), (_of_log, "log log2 log10"),
        (_of_log1p, "log1p"), (_of_logit, "logit"), (_of_xlogy, "xlogy xlog1py"),
        (_of_hypot, "hypot"), (_of_activation, "tanh sigmoid relu relu6 hardtanh gelu silu sin cos "
                                               "atan arctan erf softplus logsigmoid"),
        (_of_one, "logsumexp logaddexp logcumsumexp add sub iadd isub to float half clone"),
        (_of_arc, "acos asin arccos arcsin atanh arctanh erfinv acosh arccosh"),
        (_of_pow, "pow floatpower"), (_of_div, DIVISIONS),
        (_of_exp, "exp expm1 exp2 sinh cosh"), (_of_product, PRODUCTS),
    )
    for word in words.split()
}  # fmt: skip
