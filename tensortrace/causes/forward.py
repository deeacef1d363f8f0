"""Why the result of an op is not finite: one explanation for each kind of op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tensortrace.causes import (
    Facts,
    Reason,
    complexes,
    counted,
    exp_limit,
    from_one,
    jitter_text,
    large,
    largest,
    limit_of,
    masked,
    may_be_zero,
    negative,
    power_eps,
    range_text,
    rounding_text,
    safe_eps,
    values_text,
    zero,
)
from tensortrace.records import Tensor
from tensortrace.text import number_text, shape_text, short_dtype

_FLOAT32 = "compute this in float32: x.float(), inside torch.autocast(..., enabled=False)"
_MASK = (
    "let every row keep one position, or fill with torch.finfo(x.dtype).min instead of -inf"
)  # fmt: skip
_ORIGIN = (
    "look where the number comes from: a mean of nothing, a division by 0 in Python or NumPy, a "
    "missing value in the data"
)
# Losses that take the mean over all elements, as functions and as modules.
_MEAN_LOSSES = (
    "l1loss mseloss smoothl1loss huberloss binarycrossentropy binarycrossentropywithlogits bce "
    "crossentropy nllloss nll kldiv cosineembeddingloss tripletmarginloss "
    "tripletmarginwithdistanceloss gaussiannllloss poissonnllloss softmarginloss "
    "multilabelsoftmarginloss hingeembeddingloss marginrankingloss"
)
_LOSSES = frozenset(_MEAN_LOSSES.split())
_LOGARITHMS = frozenset(("log", "log2", "log10"))
_SUMS = frozenset(("sum", "mean"))
_PRODUCTS = frozenset(("mul", "multiply", "imul", "rmul"))
# What takes a tensor and a number as well as two tensors.
_WITH_NUMBER = _PRODUCTS | {"add", "iadd", "radd", "sub", "isub", "rsub"}
# What multiplies, and so rounds to 0 what becomes too small.
_SHRINK = _PRODUCTS | {"matmul", "rmatmul", "mm", "bmm", "mv", "einsum", "pow", "square"}
_EPS = "keep eps (1e-5) above what the dtype can hold, and normalise in float32"


def explain(facts: Facts) -> Reason:
    """Say why an op made what is not finite out of what it was given."""
    mask = _mask_times_infinity(facts)
    if mask is not None:
        return mask
    if facts.stray is not None:
        return _stray(*facts.stray)
    if facts.word and not facts.inputs and facts.outputs:
        return Reason(
            f"no tensor went in: the number, list or array it was made of held what is "
            f"not finite, or is over the range of {range_text(facts.dtype)}",
            _ORIGIN,
        )
    reason = _nothing(facts) or complexes.explain(facts)
    return reason or complexes.repair(facts, _BY_WORD.get(facts.word, _general)(facts))


def known(word: str) -> bool:
    """Whether there is an explanation of its own for an op."""
    return word in _BY_WORD


def with_chain(reason: Reason, facts: Facts, links: Sequence[Facts]) -> Reason:
    """Add what only the ops tell that made what went in.

    The logarithm of a sum of exponentials is infinite where all of them are rounded to 0, and so is
    that of a product of many factors.

    Args:
        reason: what is known without them.
        facts: the op to blame.
        links: the ops before it on the way back to the cause, which comes first.
    """
    if facts.word not in _LOGARITHMS or not facts.came_out("neginf") or facts.came_out("nan"):
        return reason
    before = [link.word for link in links]
    rounded = _rounded(facts, links)
    if rounded is not None:
        return replace(reason, why=f"{reason.why}; {rounded[0]}", fix=rounded[1])
    since = before[len(before) - before[::-1].index("exp") :] if "exp" in before else []
    if not set(since) & _SUMS or not set(since) <= _SUMS | {"mul", "div"}:
        return reason
    why = f"{reason.why}; what it is the sum of, exp(z), is rounded to 0 where z is far below 0"
    fix = ("torch.logsumexp(z, dim) for exp(z).sum(dim).log(); of a mean subtract log(n), and a "
           "factor w of exp(z) becomes z + w.log()")  # fmt: skip
    return replace(reason, why=why, fix=fix)


def _rounded(f: Facts, links: Sequence[Facts]) -> tuple[str, str] | None:
    """Say of what a logarithm is taken of why it is 0, and what to take instead."""
    if not links:
        return None
    log, last = f.word, links[-1].word
    if last in ("prod", "cumprod"):
        # A zero makes one product 0, and of running ones all that follow.
        if links[-1].first.zeros >= (f.first.zeros if last == "prod" else 1):
            return None
        total = last.replace("prod", "sum")
        return ("a product of many factors below 1 is rounded to 0",
                f"p.{log}().{total}(dim) for p.{last}(dim).{log}()")  # fmt: skip
    if last in ("det", "linalgdet"):
        return ("a determinant is a product, and rounded to 0 where that is too small",
                "torch.linalg.slogdet(A).logabsdet for torch.det(A).log()")  # fmt: skip
    if last == "exp" and log == "log":
        return "it is exp(z), rounded to 0 where z is far below 0", "z itself: exp(z).log() is z"
    if f.first.numel != f.first.zeros or not f.first.zeros:
        return None
    products = [link for link in links if link.word in _SHRINK]
    none = next((p.word for p in products if _is_of_zeros(p)), None)
    if none is not None and all(link.word != "exp" for link in links):
        return (
            f"all of it is 0, as a factor of {none} is",
            f"for a mask x.{log}() * mask: (x * mask).{log}() is -inf wherever that is 0",
        )
    shrank = next((p.word for p in products if _rounds(p)), None)
    if none is None and shrank is not None:
        return (
            f"all of it is 0: {shrank} rounded to 0 what became too small",
            "keep logarithms from the start: x.log() + y.log() for a product, torch.logsumexp "
            "for a sum of such; or divide by the sum in each round, while it is large enough",
        )
    return None


def _is_of_zeros(product: Facts) -> bool:
    """Whether a factor is 0 everywhere: what is multiplied, or a number."""
    number = product.number("other", "0") if product.word in _PRODUCTS else None
    return number == 0 or any(zero(t) == 1 for t in product.inputs)


def _rounds(product: Facts) -> bool:
    """Whether a product has zeros that no factor had: more than all of these together.

    So many at most are 0 for that, of a matrix product too: a whole row and column have to cancel.
    """
    had = sum(map(zero, product.inputs)) + 1e-9
    known = not any(t.unmeasured for t in product.inputs)
    return known and any(zero(t) > had for t in product.outputs)


def _nothing(f: Facts) -> Reason | None:
    """NaN of what has no element: the mean over an empty batch."""
    empty = [t for t in f.inputs if t.shape is not None and not t.numel]
    # A loss has the elements of its inputs together: an empty one leaves none.
    if not empty or (len(empty) < len(f.inputs) and f.word not in _LOSSES):
        return None
    if f.outputs and not f.came_out("nan"):
        return None
    got, skip = ", ".join(values_text(t) for t in f.inputs[:3]), "skip an empty batch"
    why = f"the mean of nothing is 0 / 0; it got {got}"
    if f.word in _LOSSES:
        fix = f"{skip}, or take reduction='sum' and divide by max(n, 1)"
        return Reason(f"it takes the mean, and {why}", fix, empty[0])
    if f.word in ("mean", "nanmean"):
        return Reason(why, f"{_safe_mean(f)}, or {skip}", empty[0])
    named = f.word in ("median", "nanmedian", "std", "var")
    what = f"the {f.word.removeprefix('nan')} of" if named else "what it makes of"
    return Reason(f"{what} nothing is NaN: no element went in; it got {got}", skip, empty[0])


def _safe_mean(f: Facts) -> str:
    """Write a mean that is 0 where there is nothing, over the dims that it was taken over."""
    over = f.arguments.get("dim", f.arguments.get("axis"))
    dims = over if isinstance(over, (list, tuple)) else [] if over is None else [over]
    if not dims:
        return "x.sum() / max(x.numel(), 1)"
    count = " * ".join(f"x.shape[{dim}]" for dim in dims)
    told = f"{dims[0]}" if len(dims) == 1 else f"({', '.join(map(str, dims))})"
    told += ", keepdim=True" * (f.arguments.get("keepdim") is True)
    return f"x.sum({told}) / max({count}, 1)"


def _mask_times_infinity(f: Facts) -> Reason | None:
    """A mask of 0 and 1 times -inf: NaN wherever it is 0."""
    x, stray = f.first, f.stray
    if f.word not in _PRODUCTS or stray is None or not stray[1].endswith("inf"):
        return None
    if len(f.inputs) != 1 or not x.zeros or f.came_out("nan") < x.zeros or x.min is None:
        return None
    why = f"0 * {stray[1]} is NaN, not 0; {_got(x, counted(x.zeros, 'zero'))}"
    if x.min < 0 or largest(x) > 1:
        return Reason(why, f"torch.where(x != 0, x * {stray[1]}, 0.0)", x)
    return Reason(why, f"scores.masked_fill(mask.bool(), float('{stray[1]}')) for scores + mask * "
                  f"float('{stray[1]}')", x)  # fmt: skip


def _stray(name: str, value: str) -> Reason:
    told = f" ({name}={value})" if name.isidentifier() else ""
    why = f"an argument of it is the number {value}{told}: the tensors are not to blame"
    return Reason(why, _ORIGIN)


def _got(t: Tensor, *told: str) -> str:
    return f"it got {' and '.join(told)} of {t.numel} ({values_text(t)})" if told else (
        f"it got {values_text(t)}")  # fmt: skip


def _log(f: Facts) -> Reason:
    x, nan = f.first, f.came_out("nan")
    told = [counted(x.zeros, "zero")] if x.zeros else []
    told += [counted(nan, "negative")] if nan and negative(x) else []
    why = f"{f.word} of 0 is -inf and of a negative number NaN; {_got(x, *told)}"
    why += rounding_text(x, "1e-8")
    fix = (f"x.clamp_min({safe_eps(x, '1e-8', '1e-4')}).{f.word}(), or log_softmax / logsigmoid "
           "for a probability")  # fmt: skip
    return Reason(why, fix, x, zero if x.zeros else negative)


def _log1p(f: Facts) -> Reason:
    x = f.first
    why = f"log1p of -1 is -inf and below it NaN; {_got(x)}"
    return Reason(why, f"x.clamp_min(-1 + {from_one(x)}).log1p()", x, negative)


def _xlogy(f: Facts) -> Reason:
    y = f.inputs[-1] if f.inputs else f.first
    if f.word == "xlog1py":
        why = f"x * log1p(y) is infinite for y = -1 and NaN below; as y {_got(y)}"
        fix = f"torch.special.xlog1py(x, y.clamp_min(-1 + {from_one(y)}))"
        return Reason(why, fix, y, negative)
    told = [counted(y.zeros, "zero")] if y.zeros else []
    why = f"x * log(y) is infinite for y = 0 and NaN below; as y {_got(y, *told)}"
    why += rounding_text(y, "1e-8")
    fix = f"torch.xlogy(x, y.clamp_min({safe_eps(y, '1e-8', '1e-4')}))"
    return Reason(why, fix, y, zero if y.zeros else negative)


def _logit(f: Facts) -> Reason:
    why = f"logit is infinite at 0 and 1 and NaN outside of them; {_got(f.first)}"
    return Reason(why, f"torch.logit(x, eps={from_one(f.first)})", f.first, zero)


def _sqrt(f: Facts) -> Reason:
    x = f.first
    told = [counted(f.came_out("nan"), "negative")] if f.came_out("nan") and negative(x) else []
    why = f"the root of a negative number is NaN; {_got(x, *told)}"
    fix = f"x.clamp_min({safe_eps(x, '1e-12', '1e-4')}).sqrt()"
    return Reason(why, f"{fix}: also keeps the gradient at 0 finite", x, negative)


def _rsqrt(f: Facts) -> Reason:
    x, nan = f.first, f.came_out("nan")
    told = [counted(x.zeros, "zero")] if x.zeros else []
    told += [counted(nan, "negative")] if nan and negative(x) else []
    why = f"1 / sqrt(x) is infinite at 0 and NaN for a negative number; {_got(x, *told)}"
    why += rounding_text(x, "1e-8") if x.zeros else ""
    eps = safe_eps(x, "1e-8", "1e-3")
    fix = f"x.clamp_min({eps}).rsqrt()" if negative(x) else f"(x + {eps}).rsqrt()"
    return Reason(why, fix, x, zero if x.zeros else negative)


def _div(f: Facts) -> Reason:
    """The divisor is the second tensor or `other`, or the only tensor where `self` is a number."""
    number = f.number("other", "1")
    if len(f.inputs) == 1 and number == 0 and f.first.zeros and f.first.zeros == f.first.numel:
        return Reason(f"0 / 0 is NaN: it is divided by the number 0, and {_got(f.first)}",
                      "max(n, 1) for a count as divisor")  # fmt: skip
    # 0 / x is 0 elsewhere.
    bad = sum(t.nonfinite for t in f.outputs)
    if len(f.inputs) == 1 and number == 0 and bad == f.first.numel:
        return Reason(f"x / 0 is infinite and 0 / 0 NaN: it is divided by the number 0, and "
                      f"{_got(f.first)}", "max(n, 1) for a count as divisor")  # fmt: skip
    if len(f.inputs) == 1 and number and largest(f.first) > abs(number) * limit_of(f.dtype):
        why = f"the quotient by {number_text(number)} is over the range of {range_text(f.dtype)}"
        return Reason(f"{why}; {_got(f.first)}", "scale the inputs down before it", f.first, large)
    y = f.inputs[-1] if f.inputs else f.first
    fix = (f"x / (y + {safe_eps(y, '1e-8', '1e-2')}), or torch.where on the divisor before and on "
           "the result after")  # fmt: skip
    if may_be_zero(y) and (y.grad_fn or "").startswith("Sqrt"):
        # Added after the root it would leave its gradient NaN: the slope at 0 is infinite.
        fix = f"add eps before the root, not after: x / (s + {safe_eps(y, '1e-12', '1e-4')}).sqrt()"
        fix += "; for a norm F.normalize(x, dim=-1)"
    if may_be_zero(y):
        told = (f"has {counted(y.zeros, 'zero')} out of {y.numel} ({values_text(y)})" if y.zeros
                else f"is {values_text(y)}")  # fmt: skip
        why = f"x / 0 is infinite and 0 / 0 is NaN; the divisor {told}{rounding_text(y, '1e-8')}"
        return Reason(why, fix, y, zero)
    why = f"the quotient is over the range of {range_text(f.dtype)}"
    why += f"; the divisor is {values_text(y)}"
    return Reason(why, fix, y)


def _pow(f: Facts) -> Reason:
    x, p, base = f.first, f.number("exponent", "1"), f.number("base")
    if base is not None and len(f.inputs) == 1:
        return _pow_of(base, f)
    if p is None and len(f.inputs) == 1:  # of a number that is not known
        return _general(f) if f.came_out("nan") else _overflow(f)
    power = "a negative power" if p is None else f"the power {number_text(p)}"
    fix = f"x.clamp_min({power_eps(x, p)}).pow(p)"
    if may_be_zero(x) and f.came_out("posinf") and (p is None or p < 0):
        zeros = [counted(x.zeros, "zero")] if x.zeros else []
        return Reason(f"0 to {power} is infinite; {_got(x, *zeros)}", fix, x, zero)
    if f.came_out("nan") and negative(x):
        told = counted(f.came_out("nan"), "negative")
        power = "a fractional power" if p is None else power
        return Reason(f"a negative number to {power} is NaN; {_got(x, told)}", fix, x, negative)
    return _overflow(f)


def _pow_of(base: float, f: Facts) -> Reason:
    """A number to the power of a tensor."""
    x, told = f.first, number_text(base) if base >= 0 else f"({number_text(base)})"
    if f.came_out("nan") and base < 0:
        why = f"{told} to a fractional power is NaN: the base is a negative number; {_got(x)}"
        return Reason(why, "a positive base, or whole exponents: x.round()", x)
    if base == 0 and f.came_out("posinf"):
        why = f"0 to a negative power is infinite: the base is the number 0; {_got(x)}"
        return Reason(why, "a base above 0, or x.clamp_min(0)", x, negative)
    if f.came_out("nan") or not base or abs(base) == 1:
        return _general(f)
    most = math.log(limit_of(f.dtype)) / math.log(abs(base))
    # Half of it, as what comes of it is summed and squared.
    side, bound = (
        ("above", f"max={most // 2:g}") if most > 0 else ("below", f"min={-(-most // 2):g}")
    )
    why = f"{told} to the power x is over the range of {range_text(f.dtype)} {side} {most:.4g}"
    return Reason(f"{why}; {_got(x)}", f"{told} ** x.clamp({bound})", x, large)


def _exp(f: Facts) -> Reason:
    limit, x = exp_limit(f.word, f.dtype), f.first
    why = f"{f.word} is over the range of {short_dtype(f.dtype)} above {limit}; {_got(x)}"
    first = "x.float() before it, " if f.dtype == "float16" else ""
    fix = (f"{first}subtract the maximum first, x.clamp(max={limit - limit % 10:g}), or use "
           "logsumexp / softmax / softplus")  # fmt: skip
    return Reason(why, fix, x, large)


def _arc(f: Facts) -> Reason:
    eps = from_one(f.first)
    if f.word in ("acosh", "arccosh"):
        return Reason(f"{f.word} is defined from 1 on; {_got(f.first)}",
                      f"{f.word}(x.clamp_min(1 + {eps}))", f.first, large)  # fmt: skip
    ends = "infinite at -1 and 1 and NaN beyond" if f.word in (
        "atanh", "arctanh", "erfinv") else "defined between -1 and 1 only"  # fmt: skip
    why = f"{f.word} is {ends}; {_got(f.first)}"
    return Reason(why, f"{f.word}(x.clamp(-1 + {eps}, 1 - {eps}))", f.first, large)


def _softmax(f: Facts) -> Reason:
    x = f.first
    if not x.neginf:
        return _overflow(f)
    why = ("a row that is -inf throughout gives 0 / 0: its mask hides every position; "
           f"{_got(x, f'{x.neginf} -inf')}")  # fmt: skip
    return Reason(why, _MASK, x, masked)


def _attention(f: Facts) -> Reason:
    """The masks come after query, key and value: one, or one of the padding and one more."""
    hidden = [(t, n) for t in f.inputs[3:] if (n := _hidden(f, t))]
    hides = [f"{n} of {t.numel} ({short_dtype(t.dtype)} {shape_text(t.shape)})" for t, n in hidden]
    if hidden:
        mask = hidden[-1][0]
        why = f"a row of the mask that hides every position gives 0 / 0; it hides {hides[0]}"
        fix = _MASK
        if len(hidden) > 1:
            why = ("a row that the masks hide every position of, all of them together, gives 0 / "
                   f"0; they hide {' and '.join(hides)}")  # fmt: skip
            fix = ("let every row keep one position that no mask hides, or fill each with -1e4 "
                   "instead of -inf (twice torch.finfo(x.dtype).min is -inf again)")  # fmt: skip
        return Reason(why, fix, mask, masked if mask.neginf else zero)
    told = ", ".join(values_text(t) for t in f.inputs[:2])
    query, key = (f.inputs * 2)[:2] if f.inputs else (f.first, f.first)
    products = query.shape[-1] * largest(query) * largest(key) if query.shape else math.inf
    if query.min is not None and key.min is not None and products < limit_of(f.dtype):
        return _general(f)
    why = f"query times key is over the range of {short_dtype(f.dtype)}; it got {told}"
    return Reason(why, "normalise query and key (layer_norm) or scale them down before", f.first,
                  large)  # fmt: skip


def _hidden(f: Facts, mask: Tensor) -> int:
    """How many positions a mask hides: those of -inf, of booleans what the op takes for that."""
    if mask.dtype != "bool":
        return mask.neginf
    # What is True takes part in scaled_dot_product_attention, and does not in the other.
    return mask.zeros if f.word.startswith("scaled") else mask.numel - mask.zeros


def _loss(f: Facts) -> Reason:
    """Inputs are logits (or logarithms of probabilities), target, weight."""
    x = f.first
    target = f.inputs[1] if len(f.inputs) > 1 else None
    ignored = f.number("ignore_index")
    ignored = -100 if ignored is None else ignored
    if target is not None and target.min == target.max == ignored:
        why = (f"all {target.numel} targets are {number_text(ignored)}, which is ignored, and the "
               "mean over no target at all is 0 / 0")  # fmt: skip
        given = "" if ignored == -100 else f"ignore_index={number_text(ignored)}, "
        return Reason(why, f"loss = F.cross_entropy(x, y, {given}reduction='sum') / "
                      f"(y != {number_text(ignored)}).sum().clamp_min(1)", target)  # fmt: skip
    weight = f.inputs[2] if len(f.inputs) > 2 else None
    integer = target is not None and target.dtype == "int64"
    most = largest(x) if x.min is not None else math.inf if x.norm is None else x.norm
    safe = not x.neginf and most < limit_of(x.dtype) / 4
    if integer and safe and weight is not None and weight.zeros and f.came_out("nan"):
        why = ("the mean is over the weights of the targets, and those are 0 for every target that "
               f"is not ignored: 0 / 0; weight has {counted(weight.zeros, 'zero')} of "
               f"{weight.numel}")  # fmt: skip
        return Reason(why, "F.cross_entropy(x, y, weight=w, reduction='sum') / "
                      "w[y].sum().clamp_min(1e-8), or a small weight for 0", weight)  # fmt: skip
    why = ("a class of probability 0 costs infinity, and the mean over no target at all (all of "
           f"them ignored) is 0 / 0; {_got(x)}")  # fmt: skip
    return Reason(why, "pass logits, not probabilities or -inf, to the loss", x,
                  masked if x.neginf else large)  # fmt: skip


def _kl(f: Facts) -> Reason:
    """Inputs are logarithms of probabilities, and a target of probabilities."""
    target = f.inputs[1] if len(f.inputs) > 1 else None
    if target is None or not negative(target) or f.arguments.get("log_target"):
        return _loss(f)
    why = ("it takes the logarithm of the target, which holds negative numbers, as logarithms are: "
           f"NaN; as target it got {values_text(target)}")  # fmt: skip
    return Reason(why, "F.kl_div(x, y, log_target=True), or y.exp() as the target", target)


def _dropout(f: Facts) -> Reason:
    x = f.first
    if not x.neginf or not f.came_out("nan"):
        return _general(f)
    why = f"what it drops it multiplies by 0, and 0 * -inf is NaN; {_got(x, f'{x.neginf} -inf')}"
    return Reason(why, "drop after the softmax: F.dropout(scores.softmax(-1), p)", x, masked)


def _gate(f: Facts) -> Reason:
    """Of gelu, silu and the like: x times what is 0 far below 0."""
    x = f.first
    if not x.neginf or not f.came_out("nan"):
        return _general(f)
    why = f"{f.word} of -inf is -inf * 0, which is NaN; {_got(x, f'{x.neginf} -inf')}"
    return Reason(why, f"mask after {f.word}, not before it", x, masked)


def _ctc(f: Facts) -> Reason:
    """Inputs are logarithms of probabilities, targets, and lengths if those are tensors."""
    x = f.first
    if x.neginf:
        return _loss(f)
    why = ("a target with more labels than frames of its input (two equal labels in a row need one "
           f"more) cannot be aligned and costs infinity; it got {values_text(x)}")  # fmt: skip
    if len(f.inputs) == 4:
        frames, labels = f.inputs[2:]
        why += f", input_lengths {values_text(frames)}, target_lengths {values_text(labels)}"
    return Reason(why, "leave such samples out (less subsampling before, shorter targets), or "
                  "F.ctc_loss(..., zero_infinity=True)", x)  # fmt: skip


def _derivative(f: Facts) -> Reason:
    why = ("an op between what it was given has an infinite slope there, as roots and norms have "
           "at 0")  # fmt: skip
    fix = ("eps inside roots and norms of what is differentiated, a logarithm or a division kept "
           "off 0; a smaller range where it is exponentials")  # fmt: skip
    return Reason(why, fix)


def _overflow(f: Facts) -> Reason:
    bad = [t for t in f.inputs if t.neginf]
    if bad and not f.came_out("nan"):
        return _general(f)
    if bad:
        return Reason(f"0 * -inf and -inf + inf are NaN; it got {bad[0].neginf} -inf of "
                      f"{bad[0].numel}", _MASK, bad[0], masked)  # fmt: skip
    if _is_far(f) and f.came_out("nan") and not (f.came_out("posinf") or f.came_out("neginf")):
        return _undefined(f)
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    number = f.number("other", "1", "0") if f.word in _WITH_NUMBER and len(f.inputs) == 1 else None
    if number is not None:
        told += f" and the number {number_text(number)}"
    largest = max(f.inputs, key=large, default=f.first)
    fix = _FLOAT32 if f.dtype in ("float16", "bfloat16") else "scale the inputs down before it"
    why = f"the result is over the range of {range_text(f.dtype)}; it got {told}"
    return Reason(why, fix, largest, large)


def _arithmetic(f: Facts) -> Reason:
    """Sums and products: over the range only if all the largest together are."""
    return _general(f) if _is_far(f) else _overflow(f)


def _is_far(f: Facts) -> bool:
    """Whether what went in is known, and all the largest together are not over the range."""
    if any(t.nonfinite or t.min is None for t in f.inputs) or not f.inputs:
        return False
    numbers = [abs(n) for n in f.arguments.values() if isinstance(n, (int, float))]
    most = math.prod(max(1.0, n) for n in (*map(largest, f.inputs), *numbers))
    terms = 4 * max(t.numel for t in f.inputs)
    # Of one input, and of the difference of two, the square may be meant.
    return terms * most * most <= limit_of(f.dtype)


def _undefined(f: Facts) -> Reason:
    """NaN, and no infinity, of numbers far from the largest of the dtype."""
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    why = (f"NaN came out of finite numbers, and none of them is near the largest of "
           f"{short_dtype(f.dtype)}: outside its domain; it got {told}")  # fmt: skip
    return Reason(why, None, f.first)


def _mul(f: Facts) -> Reason:
    """NaN of finite numbers and -inf can only be 0 * -inf."""
    bad = next((t for t in f.inputs if t.neginf), None)
    if bad is None or not f.came_out("nan"):
        return _arithmetic(f)
    why = f"0 * -inf is NaN, not 0; it got {bad.neginf} -inf of {bad.numel} ({values_text(bad)})"
    fix = ("to leave elements out, select instead of multiplying: torch.where(ok, x, 0.0) on what "
           "goes in, before the product (after it the gradient is NaN all the same)")  # fmt: skip
    return Reason(why, fix, bad, masked)


def _determinant(f: Facts) -> Reason:
    x = f.first
    if f.word in ("det", "linalgdet"):
        why = f"the determinant is over the range of {range_text(f.dtype)}; {_got(x)}"
        return Reason(why, "torch.linalg.slogdet(A): its sign and its logarithm", x, large)
    if f.came_out("nan") and f.word == "logdet":
        why = f"the logarithm of a negative determinant is NaN; {_got(x)}"
        return Reason(why, "torch.linalg.slogdet(A), or a matrix that is positive definite", x)
    if not f.came_out("neginf"):
        return _general(f)
    why = f"the matrix is singular: its determinant is 0, the logarithm of which is -inf; {_got(x)}"
    return Reason(why, jitter_text(x), x)


def _inverse(f: Facts) -> Reason:
    """The matrix is the first input; of a large one the products inside may be over the range."""
    x = f.first
    if any(largest(t) * largest(t) > limit_of(t.dtype) for t in f.inputs):
        return _overflow(f)
    what = "the solution" if "solve" in f.word else "its inverse"
    why = f"the matrix is singular or so nearly that {what} is over the range; {_got(x)}"
    return Reason(why, f"{jitter_text(x)}, or torch.linalg.lstsq / pinv", x)


def _cholesky(f: Facts) -> Reason:
    why = f"the matrix is not positive definite, or too nearly singular to tell; {_got(f.first)}"
    return Reason(why, jitter_text(f.first), f.first)


def _triangular(f: Facts) -> Reason:
    """What went in by name: L of cholesky_solve comes second, A of solve_triangular first."""
    told = ", ".join(values_text(t) for t in f.inputs[:2])
    why = ("it divides by the diagonal of the triangular matrix, on which there is 0 or nearly: "
           "what that was decomposed from is singular, or not positive definite, or the result is "
           f"over the range; it got {told}")  # fmt: skip
    return Reason(why, f"{jitter_text(f.first)}, before it is decomposed", f.first)


def _spread(f: Facts) -> Reason:
    x = f.first
    given = f.arguments.get("dim")
    listed = given if isinstance(given, (list, tuple)) else [given]
    shape = x.shape or ()
    # True for `unbiased`, in the place of dim, is no dim.
    dims = [d for d in listed if type(d) is int and -len(shape) <= d < len(shape)]
    n = math.prod(shape[d] for d in dims) if dims else x.numel
    if n > 1:
        return _overflow(f)
    why = f"{f.word} of {counted(n, 'element')} with correction 1 is 0 / 0; {_got(x)}"
    if dims:
        why += f" over dim {', '.join(map(str, dims))}"
    return Reason(why, f"x.{f.word}(correction=0), or a batch of at least two", x)


def _normalize(f: Facts) -> Reason:
    x, eps = f.first, f.number("eps")
    eps = 1e-12 if eps is None else eps
    if not x.zeros or eps > (3e-8 if x.dtype == "float16" else 0):
        return _overflow(f)
    told = [counted(x.zeros, "zero")]
    small = f"eps {number_text(eps)}"
    small += f" rounds to 0 in {short_dtype(x.dtype)}" if eps else ""
    why = f"a vector of zeros has the norm 0, and {small}: 0 / 0; {_got(x, *told)}"
    half = "F.normalize(x.float(), eps=1e-3), or skip the vectors of zeros"
    fix = half if x.dtype == "float16" else half.replace("1e-3", "1e-6")
    return Reason(why, fix, x, zero)


def _layer_norm(f: Facts) -> Reason:
    x, eps = f.first, f.number("eps")
    if eps is not None and eps < 1e-12:
        why = (f"equal elements have the variance 0, and with eps {number_text(eps)} that is "
               f"0 / 0; {_got(x)}")  # fmt: skip
        return Reason(why, _EPS, x)
    return _overflow(f)


def _batch_norm(f: Facts) -> Reason:
    """With statistics of its own: input, running mean and running variance come first.

    The functions of `torch` itself take those two last, and the mode as their sixth argument.
    """
    place = 2 if False in (f.arguments.get("training"), f.arguments.get("use_input_stats")) else -1
    if (place < 0 and f.arguments.get("5") is not False) or len(f.inputs) < 3:
        return _layer_norm(f)
    var, eps = f.inputs[place], f.number("eps", "7") or 0.0
    if not f.came_out("nan") or var.min is None or var.min >= -eps:
        return _layer_norm(f)
    why = (f"the running variance is negative, its smallest value {number_text(var.min)}, and "
           f"sqrt(var + {number_text(eps)}) is NaN; as running_var {_got(var)}")  # fmt: skip
    fix = ("load the buffers of one model (a difference of weights, or one step beyond them, "
           "leaves buffers out), momentum up to 1, or learn them anew with "
           "torch.optim.swa_utils.update_bn(loader, model)")  # fmt: skip
    return Reason(why, fix, var, negative)


def _cast(f: Facts) -> Reason:
    why = f"it does not fit in {range_text(f.dtype)}; {_got(f.first)}"
    return Reason(why, "use bfloat16, or scale before the cast", f.first, large)


def _product(f: Facts) -> Reason:
    reason = _overflow(f)
    return Reason(reason.why.replace("the result", "the product"),
                  "keep its logarithm, x.log().sum(), or multiply in float64",
                  reason.blamed)  # fmt: skip


def _general(f: Facts) -> Reason:
    told = ", ".join(values_text(t) for t in f.inputs[:3])
    why = "finite values went in, others came out: outside its domain or over its range"
    bad = next((t for t in f.inputs if t.neginf), None)
    if bad is not None:
        what = "NaN" if f.came_out("nan") else "inf"
        why = f"-inf went in ({bad.neginf} of {bad.numel}) and {what} came out: mask after it"
    return Reason(f"{why}; it got {told}" if told else why, None, f.inputs[0] if f.inputs else None)


_BY_WORD: dict[str, Callable[[Facts], Reason]] = {
    word: explain_
    for explain_, words in (
        (_log, "log log2 log10"), (_log1p, "log1p"), (_xlogy, "xlogy xlog1py"), (_logit, "logit"),
        (_sqrt, "sqrt"), (_rsqrt, "rsqrt"),
        (_div, "div truediv truedivide divide reciprocal floordivide rtruediv rdiv remainder fmod "
               "itruediv"),
        (_pow, "pow rpow floatpower"), (_exp, "exp exp2 expm1 sinh cosh"),
        (_arc, "acos asin arccos arcsin atanh arctanh erfinv acosh arccosh"),
        (_softmax, "softmax logsoftmax softmin"),
        (_attention, "scaleddotproductattention multiheadattentionforward"),
        (_loss, "crossentropy nllloss nll binarycrossentropy bce"), (_kl, "kldiv"),
        (_dropout, "dropout dropout1d dropout2d dropout3d featuredropout alphadropout"),
        (_gate, "gelu silu mish hardswish"), (_ctc, "ctcloss ctc"),
        (_arithmetic, "matmul mm bmm addmm baddbmm linear conv1d conv2d conv3d einsum sum cumsum "
                    "add sub norm linalgvectornorm square rmatmul iadd isub dot mv bilinear "
                    "mseloss l1loss smoothl1loss huberloss"),
        (_mul, "mul multiply imul rmul"),
        (_determinant, "det linalgdet slogdet linalgslogdet logdet"),
        (_inverse, "inverse inv linalginv linalginvex linalgsolve linalgsolveex"),
        (_cholesky, "cholesky linalgcholesky linalgcholeskyex"),
        (_triangular, "choleskysolve linalgsolvetriangular triangularsolve choleskyinverse"),
        (_spread, "std var stdmean varmean"), (_overflow, "mean nanmean"),
        (_normalize, "normalize"),
        (_layer_norm, "layernorm groupnorm rmsnorm"), (_batch_norm, "batchnorm instancenorm"),
        (_derivative, "autogradgrad grad"),
        (_cast, "to half type bfloat16"), (_product, "prod cumprod"),
    )
    for word in words.split()
}  # fmt: skip
