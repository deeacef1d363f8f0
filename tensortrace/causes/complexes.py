"""Ops on complex numbers, which have no order: nothing can be clamped, and no sign be wrong."""

from __future__ import annotations

from dataclasses import replace

from tensortrace.causes import Facts, Reason, counted, exp_limit, large, values_text, zero
from tensortrace.text import short_dtype

_EXPONENTIALS = frozenset(["exp", "exp2", "expm1", "sinh", "cosh"])
_LOGARITHMS = frozenset(["log", "log2", "log10"])
# Infinite at 0, themselves or their slope.
_AT_ZERO = _LOGARITHMS | frozenset(["sqrt", "rsqrt", "pow", "floatpower"])


def explain(f: Facts) -> Reason | None:
    """Say why an op made what is not finite of complex numbers; None where the kind is no matter.

    The values are moduli: it is the real part that decides over an exponential.
    """
    x = f.first
    if not is_complex(f):
        return None
    if f.word in _EXPONENTIALS:
        limit = exp_limit(f.word, x.dtype)
        both = " or below its negative" if f.word in ("sinh", "cosh") else ""
        why = f"{f.word} is over the range of {short_dtype(x.dtype)} where the real part of what "
        return Reason(f"{why}goes in is above {limit}{both}; it got {values_text(x)} by modulus",
                      _bounded(f.word, limit), x, large)  # fmt: skip
    if f.word in _LOGARITHMS and x.zeros:
        why = f"{f.word} of 0 is infinite; it got {counted(x.zeros, 'zero')} of {x.numel}"
        return Reason(f"{why} ({values_text(x)})", _kept_off_0(f.word), x, zero)
    return None


def repair(f: Facts, reason: Reason) -> Reason:
    """Advise nothing that torch refuses for complex numbers."""
    if not is_complex(f) or "clamp" not in (reason.fix or ""):
        return reason
    if f.word in _EXPONENTIALS:
        return replace(reason, fix=_bounded(f.word, exp_limit(f.word, f.first.dtype)))
    return replace(reason, fix=_kept_off_0(f.word) if f.word in _AT_ZERO else None)


def is_complex(f: Facts) -> bool:
    """Whether complex numbers went in."""
    return f.first.dtype.startswith("complex")


def _bounded(word: str, limit: float) -> str:
    most = limit - limit % 10
    ends = f"-{most:g}, {most:g}" if word in ("sinh", "cosh") else f"max={most:g}"
    return f"torch.complex(x.real.clamp({ends}), x.imag).{word}()"


def _kept_off_0(word: str) -> str:
    call = "pow(p)" if word in ("pow", "floatpower") else f"{word}()"
    return f"torch.where(x == 0, 1e-8, x).{call}"
