"""Why the gradient that an op makes is not finite: one explanation for each kind of op."""

from __future__ import annotations

from collections.abc import Callable

from tensortrace.causes import (
    Facts,
    Reason,
    complexes,
    counted,
    exp_limit,
    from_one,
    jitter_text,
    large,
    limit_of,
    may_be_zero,
    negative,
    power_eps,
    range_text,
    rounding_text,
    safe_eps,
    values_text,
    zero,
)
from tensortrace.causes.slopes import DIVISIONS, PRODUCTS, steepest
from tensortrace.records import Call
from tensortrace.text import location_text, number_text, short_dtype

_HOOKS = (
    "look at what the hooks of this tensor and module return (register_hook, "
    'register_full_backward_hook), and at the gradients that arrive: level="op" records them'
)
_SHORTER = "compute this in float32, scale the loss down, or clip before"
_ADDED = frozenset({"addmm", "baddbmm"})  # their first input is added, not multiplied


def explain(facts: Facts, selected_by: Call | None = None) -> Reason:
    """Say why the backward of an op made what is not finite.

    Args:
        facts: the op as it was called in the forward pass.
        selected_by: the op that picked from its result and left the rest out.
    """
    spoilt = _spoilt(facts)
    if spoilt is not None:
        return spoilt
    target = _target_of_kl(facts)
    if target is not None:
        return target
    slope = steepest(facts)
    if slope is not None and slope * slope < limit_of(facts.dtype):
        return _elsewhere(facts)
    reason = complexes.repair(facts, _BY_WORD.get(facts.word, _general)(facts))
    finite = facts.word in _FINITE or (facts.word == "pow" and not _diverges(facts))
    if selected_by is None or facts.word not in _BY_WORD or finite:
        return reason
    place = f"{selected_by.op} ({location_text(selected_by.location)})"
    why = f"{reason.why}; {place} does not use that element, but sends it a gradient of 0, "
    fix = "make the argument safe first: f(torch.where(ok, x, 1.0)), and select after that"
    is_nan = _learns_power_of_negative(facts) or _roots_negative(facts)
    times = "NaN" if is_nan else "inf"
    return Reason(f"{why}and 0 * {times} is NaN", fix, reason.blamed, reason.carries)


def _spoilt(f: Facts) -> Reason | None:
    """What went in in the forward pass was NaN already, and is a factor of the gradient."""
    if f.word in _PRODUCTS:
        factors = f.inputs[-2:] if f.word in _ADDED else f.inputs[:2]
        # Of a tensor and a number only the number is a factor.
        bad = [t for i, t in enumerate(factors) if t.nonfinite
               and (factors[i - 1].requires_grad if len(factors) > 1 else f.word == "square")
               ]  # fmt: skip
    elif f.word in _BY_WORD and f.word not in _SELECTING:
        # The dividend is a factor of the gradient of the divisor alone.
        only = f.word in _DIVISIONS and f.inputs and not f.inputs[-1].requires_grad
        used = f.inputs[-1:] if only else f.inputs
        bad = [t for t in used if t.nan]
    else:
        return None
    if not bad:
        return None
    t = bad[0]
    held = {"NaN": t.nan, "inf": t.posinf, "-inf": t.neginf}
    what = next(word for word, n in held.items() if n)
    why = (f"what went in in the forward pass has {held[what]} {what} of {t.numel} "
           f"({values_text(t)}), and the gradient is computed with it: even one of 0 "
           f"turns NaN, as 0 * {what} is NaN")  # fmt: skip
    fix = ("select before it, not after: torch.where(ok, x, 0.0), or nan_to_num, on what goes in; "
           "a mask that is multiplied does not help either")  # fmt: skip
    return Reason(why, fix, t)


def _elsewhere(f: Facts) -> Reason:
    """The values do not show it: say what is known and no more."""
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    half = "float16" in (f.dtype, *(t.dtype for t in f.inputs))
    dtype = range_text("float16") if half else short_dtype(f.dtype)
    over = ", or over it in float32" if half else ""
    maybe = [f"they were near the end of the range of {dtype} before{over}",
             "a hook on the tensor or module may have changed them"]  # fmt: skip
    if not half:  # in half precision it is a loss scale far more often than a hook
        maybe.reverse()
    why = (f"finite gradients went in, others came out, which {told} in the forward pass does not "
           f"explain: {', or '.join(maybe)}")  # fmt: skip
    return Reason(why, f"{_SHORTER}; or {_HOOKS}" if half else _HOOKS)


def known(word: str) -> bool:
    """Whether there is an explanation of its own for the backward of an op."""
    return word in _BY_WORD


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
    x, usual = f.first, "1e-12"
    eps = safe_eps(x, usual, "1e-4" if f.word == "sqrt" else "1e-3")
    if negative(x):
        why = f"the slope of {f.word} is NaN for a negative number and infinite at 0, and NaN or "
        why += f"infinity times a zero gradient is NaN{_got(f, *_zeros(f))}"
        return Reason(why, f"make the argument safe before the root: x.clamp_min({eps}).{f.word}() "
                      f"or torch.where(x > 0, x, 1.0).{f.word}(), and select after it; adding eps "
                      "is not enough", x, zero)  # fmt: skip
    slope = "1 / (2 sqrt(x))" if f.word == "sqrt" else "-1 / (2 x sqrt(x))"
    why = f"the slope of {f.word} is {slope}: infinite at 0, and infinity times a zero gradient "
    why += f"is NaN{_got(f, *_zeros(f))}{rounding_text(x, usual)}"
    return Reason(why, f"add eps before the root: (x + {eps}).{f.word}(), or x.clamp_min({eps})",
                  x, zero)  # fmt: skip


def _log(f: Facts) -> Reason:
    x = f.first
    slope = {"log2": "1 / (x ln 2)", "log10": "1 / (x ln 10)"}.get(f.word, "1 / x")
    why = f"the slope of {f.word} is {slope}: infinite at 0{_got(f, *_zeros(f))}"
    why += rounding_text(x, "1e-8")
    eps = safe_eps(x, "1e-8", "1e-4")
    return Reason(why, f"clamp the argument before the log: x.clamp_min({eps}).{f.word}()", x, zero)


def _log1p(f: Facts) -> Reason:
    why = f"the slope of log1p is 1 / (1 + x): infinite at -1{_got(f)}"
    return Reason(why, f"x.clamp_min(-1 + {from_one(f.first)}).log1p()", f.first, negative)


def _logit(f: Facts) -> Reason:
    why = f"the slope of logit is 1 / (x (1 - x)): infinite at 0 and 1{_got(f, *_zeros(f))}"
    return Reason(why, f"torch.logit(x, eps={from_one(f.first)})", f.first, zero)


def _norm(f: Facts) -> Reason:
    x = f.first
    why = "the gradient of a norm is x / norm (0 for a norm of 0): over the range where the norm "
    why += f"is tiny{_got(f, *_zeros(f))}"
    fix = f"(x.square().sum(-1) + {safe_eps(x, '1e-12', '1e-4')}).sqrt()"
    return Reason(why, f"{fix}, or skip the pairs whose distance is 0", x, zero)


def _normalize(f: Facts) -> Reason:
    x, eps = f.first, f.number("eps")
    eps = 1e-12 if eps is None else eps
    why = f"the gradient of normalize holds 1 / norm, 1 / eps (eps={number_text(eps)}) for a vector"
    why += f" of zeros{_got(f, *_zeros(f))}"
    return Reason(why, "F.normalize(x, eps=1e-3), or skip the vectors of zeros", x, zero)


def _div(f: Facts) -> Reason:
    y = f.inputs[-1] if f.inputs else f.first
    why = "the gradient of x / y holds 1 / y and x / y**2, which overflow where y is near 0"
    if f.inputs:
        told = f"{counted(y.zeros, 'zero')} of {y.numel} ({values_text(y)})" if y.zeros else (
            values_text(y))  # fmt: skip
        why += f"; the divisor has {told}{rounding_text(y, '1e-8')}"
    fix = f"x / (y + {safe_eps(y, '1e-8', '1e-2')}), or replace y under the mask before dividing"
    return Reason(why, fix, y, zero)


def _learns_power_of_negative(f: Facts) -> bool:
    """Whether the exponent gets a gradient too, which has the logarithm of a negative number."""
    powers = f.word in ("pow", "floatpower") and len(f.inputs) == 2
    return powers and f.inputs[1].requires_grad and bool(negative(f.first))


def _diverges(f: Facts) -> bool:
    """Whether the slope of x ** p is infinite or NaN somewhere.

    At 0 with p below 1 or unknown, for a negative x with p that is no whole number.
    """
    p = f.number("exponent", "1")
    if p is None and len(f.inputs) == 2:
        p = f.inputs[1].min
        return p is None or p < 1 or _learns_power_of_negative(f)
    return p < 1 or _roots_negative(f) if p is not None else len(f.inputs) != 1


def _roots_negative(f: Facts) -> bool:
    """Whether a root of a negative number is taken, or a power with a root in it."""
    p = f.number("exponent", "1")
    rooted = f.word in ("sqrt", "rsqrt") or (f.word in ("pow", "floatpower") and p and p % 1)
    return bool(rooted) and bool(negative(f.first))


def _pow(f: Facts) -> Reason:
    p = f.number("exponent", "1")
    if p is None and len(f.inputs) == 1:
        why = f"the slope of a ** x is a ** x log(a): over the range of {range_text(f.dtype)}"
        return Reason(f"{why}{_got(f)}", "clamp x before it", f.first, large)
    if _learns_power_of_negative(f):
        why = "the gradient of the exponent p of x ** p is x ** p log(x): NaN for a negative x"
        return Reason(f"{why}{_got(f)}", f"x.clamp_min({safe_eps(f.first, '1e-6', '1e-4')}).pow(p)",
                      f.first, negative)  # fmt: skip
    power = "p" if p is None else number_text(p)
    if _roots_negative(f):
        why = f"the slope of x ** {power} is NaN for a negative x{_got(f)}"
        return Reason(why, f"x.clamp_min({power_eps(f.first, p)}).pow(p)", f.first, negative)
    why = f"the slope of x ** {power} is {power} x ** ({power} - 1): "
    if not _diverges(f):
        why += f"over the range of {range_text(f.dtype)}{_got(f)}"
        return Reason(why, "scale x down before it, or clip before", f.first, large)
    why += f"infinite at 0 for a power below 1{_got(f, *_zeros(f))}"
    if p is None and not f.inputs:  # of an op of the step before nothing more is known
        why += ", and that of a learned power is x ** p log(x): NaN for a negative x"
    return Reason(why, f"x.clamp_min({power_eps(f.first, p)}).pow(p)", f.first, zero)


def _arc(f: Facts) -> Reason:
    eps = from_one(f.first)
    if f.word in ("acosh", "arccosh"):
        why = f"the slope of {f.word} is 1 / sqrt(x**2 - 1): infinite at 1{_got(f)}"
        return Reason(why, f"{f.word}(x.clamp_min(1 + {eps}))", f.first, large)
    why = f"the slope of {f.word} is infinite at -1 and 1{_got(f)}"
    return Reason(why, f"{f.word}(x.clamp(-1 + {eps}, 1 - {eps}))", f.first, large)


def _where(f: Facts) -> Reason:
    why = "where sends 0 to the branch not taken, and 0 * inf in that branch is NaN"
    return Reason(why, "make the argument safe first: f(torch.where(ok, x, 1.0)), then select")


def _std(f: Facts) -> Reason:
    x, usual = f.first, "1e-8"
    why = f"the gradient of {f.word} holds 1 / std (0 for a std of 0): over the range where the "
    why += f"values are all but equal{_got(f)}"
    return Reason(why, f"(x.var(correction=0) + {safe_eps(x, usual, '1e-4')}).sqrt()", x)


def _exp(f: Facts) -> Reason:
    limit = exp_limit(f.word, f.dtype)
    why = f"the gradient of {f.word} is {f.word} itself and overflows with it{_got(f)}"
    return Reason(why, f"x.clamp(max={limit - limit % 10:g}) before it", f.first, large)


def _product(f: Facts) -> Reason:
    why = "the gradient of a product is the product of all others (the result / x): over the "
    why += f"range of {short_dtype(f.dtype)} where one is tiny{_got(f, *_zeros(f))}"
    return Reason(why, "add the logarithms: x.log().cumsum(-1).exp()", f.first, zero)


def _hypot(f: Facts) -> Reason:
    why = f"hypot has no direction where both are 0: its gradient is 0 / 0{_got(f, *_zeros(f))}"
    why += rounding_text(f.first, "1e-12")
    eps = safe_eps(f.first, "1e-12", "1e-4")
    return Reason(why, f"(x**2 + y**2 + {eps}).sqrt()", f.first, zero)


def _logsumexp(f: Facts) -> Reason:
    why = f"the gradient of {f.word} is a softmax, and a row that is -inf throughout has none"
    return Reason(why, "let every row keep one element that is not -inf", f.first)


def _decomposition(f: Facts) -> Reason:
    shape = f.first.shape or ()
    if "svd" in f.word:
        why = "the gradient holds 1 / (a**2 - b**2) for each two singular values a and b, "
        why += "infinite where they are equal"
        if len(shape) > 1 and shape[-1] != shape[-2]:
            why += ", and 1 / a, as the matrix is not square"
    else:
        why = "the gradient holds 1 / (a - b) for each two eigenvalues a and b, "
        why += "infinite where they are equal"
    return Reason(f"{why}{_got(f)}", "use the values only, or add a small random diagonal before",
                  f.first)  # fmt: skip


def _inverse(f: Facts) -> Reason:
    what = next((told for words, told in _INVERTED.items() if f.word in words.split()),
                "the matrix")  # fmt: skip
    why = f"the gradient holds the inverse of {what}, which is not finite where the matrix is "
    why += f"singular or nearly so{_got(f)}"
    return Reason(why, jitter_text(f.first), f.first)


def _product_of(f: Facts) -> Reason:
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    why = "the gradient times what went in is over the range of "
    why += range_text(f.dtype) + (f"; it got {told}" if told else "")
    return Reason(why, _SHORTER, max(f.inputs, key=large, default=None), large)


def _xlogy(f: Facts) -> Reason:
    y = f.inputs[-1] if f.inputs else f.first
    if f.word == "xlog1py":
        why = "the gradient of x * log1p(y) holds log1p(y) and x / (1 + y): infinite at y = -1; "
        fix = f"torch.special.xlog1py(x, y.clamp_min(-1 + {from_one(y)}))"
        return Reason(f"{why}y is {values_text(y)}", fix, y, negative)
    why = "the gradient of x * log(y) holds log(y) and x / y: infinite at y = 0; y is "
    why += values_text(y) + rounding_text(y, "1e-8")
    return Reason(why, f"torch.xlogy(x, y.clamp_min({safe_eps(y, '1e-8', '1e-4')}))", y, zero)


def _target_of_kl(f: Facts) -> Reason | None:
    """The target of kl_div gets a gradient of its own, which has its logarithm."""
    y = f.inputs[1] if f.word == "kldiv" and len(f.inputs) > 1 else None
    if y is None or not y.requires_grad or f.arguments.get("log_target") or not may_be_zero(y):
        return None
    zeros = f"{counted(y.zeros, 'zero')} of {y.numel} " if y.zeros else ""
    why = ("the target y gets a gradient too, log(y) + 1 - x, and where y is 0 that is NaN; "
           f"the target has {zeros}({values_text(y)})")  # fmt: skip
    fix = ("y.detach() as the target, if it is not to be trained; else the logarithms of it: "
           "F.kl_div(x, z.log_softmax(-1), log_target=True)")  # fmt: skip
    return Reason(why, fix, y, zero)


def _general(f: Facts) -> Reason:
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    why = "finite gradients went in, others came out: its slope there is infinite or over the "
    why += "range, or a hook changed them"
    return Reason(f"{why}; in the forward pass it got {told}" if told else why, None,
                  f.inputs[0] if f.inputs else None, negative)  # fmt: skip


_NORMS = "norm linalgvectornorm linalgnorm dist cdist pairwisedistance"
_SELECTS = "where maskedfill"
_PRODUCTS, _DIVISIONS = frozenset(PRODUCTS.split()), frozenset(DIVISIONS.split())
_SELECTING = frozenset(_SELECTS.split())
# Of these a finite slope overflows, or the slope at 0 is 0: no infinity for a 0 to meet.
_FINITE = frozenset(f"{PRODUCTS} {_NORMS} {_SELECTS} std stdmean normalize".split())
_INVERTED = {
    "cholesky linalgcholesky linalgcholeskyex": "its factor L",
    "qr linalgqr": "its factor R",
    "lu linalglu linalglufactor linalglufactorex": "its factors L and U",
    "linalgsolvetriangular triangularsolve choleskysolve choleskyinverse": "the triangular matrix",
}
_BY_WORD: dict[str, Callable[[Facts], Reason]] = {
    word: explain_
    for explain_, words in (
        (_root, "sqrt rsqrt"), (_log, "log log2 log10"), (_log1p, "log1p"), (_logit, "logit"),
        (_xlogy, "xlogy xlog1py"), (_normalize, "normalize"),
        (_norm, _NORMS),
        (_div, DIVISIONS), (_pow, "pow floatpower"),
        (_arc, "acos asin arccos arcsin atanh arctanh erfinv acosh arccosh"),
        (_where, _SELECTS), (_std, "std stdmean"),
        (_exp, "exp expm1 exp2 sinh cosh"), (_product, "prod cumprod"),
        (_hypot, "hypot"), (_logsumexp, "logsumexp logaddexp logcumsumexp"),
        (_decomposition, "svd eigh linalgsvd linalgeigh eig linalgeig"),
        (_inverse, "inverse inv linalginv linalginvex linalgsolve linalgsolveex slogdet "
                   "linalgslogdet logdet " + " ".join(_INVERTED)),
        (_product_of, PRODUCTS),
    )
    for word in words.split()
}  # fmt: skip
