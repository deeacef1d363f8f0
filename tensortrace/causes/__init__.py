"""Why an op made what is not finite: what it was given, what that does, where it came from.

Functions of the records only. `forward` and `backward` hold one explanation for each kind of op;
here is what they share.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensortrace.records import Call, Tensor
from tensortrace.text import number_text, shape_text, short_dtype

__all__ = [
    "MOVES", "Carries", "Facts", "Reason", "counted", "exp_limit", "first_index", "first_text",
    "follow", "from_one", "jitter_text", "large", "largest", "limit_of", "masked", "may_be_zero",
    "negative", "plain_op", "power_eps", "range_text", "rounding_text", "safe_eps", "selector",
    "values_text", "zero",
]  # fmt: skip

# The largest finite number of a dtype as one tells it, rounded down: 1.8e308 is infinite.
_LIMITS = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.79e308,
           "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # fmt: skip
# What each part of a complex number is.
_PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
# Where exp leaves the range of a dtype: the logarithm of its largest number.
_EXP_LIMITS = {"float16": 11.1, "float64": 709.8}
_EXP2_LIMITS = {"float16": 16, "float64": 1024}
# The first power of ten that 1 + it and 1 - it do not round away.
_FROM_ONE = {"float16": "1e-3", "bfloat16": "1e-2"}
# Ops that hand values on without computing any: what they return was made before them.
_MOVING = (
    "view reshape transpose t permute getitem cat concat stack hstack vstack clone contiguous "
    "detach expand expandas squeeze unsqueeze flatten unflatten chunk split select gather "
    "indexselect unbind flip roll narrow to float double cpu cuda repeat repeatinterleave tile "
    "swapaxes movedim ravel viewas reshapeas takealongdim maskedselect diagonal mt"
)
MOVES = frozenset(_MOVING.split())
# What stands before a dot and is no op.
_SPACES = frozenset({"torch", "Tensor", "autograd"})
_SELECTS = frozenset({"where", "maskedfill", "nantonum", "maskedscatter"})

# As the log writes them; the order of a norm may be infinite.
_STRAY = {"NaN": "NaN", "Infinity": "inf", "-Infinity": "-inf"}
_ORDERS = ("p", "ord", "norm_type")

# How much of a tensor is of the kind to blame: 0 none, 1 all.
Carries = Callable[[Tensor], float]


@dataclass(frozen=True, slots=True)
class Facts:
    """One forward call of an op: its plain name, what went in and came out, its arguments."""

    word: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Tensor:
        """The first tensor that went in, or a stand-in without values."""
        return self.inputs[0] if self.inputs else Tensor(-1, ())

    @property
    def dtype(self) -> str:
        """The dtype of the result."""
        return self.outputs[0].dtype if self.outputs else self.first.dtype

    def came_out(self, what: str) -> int:
        """How many elements of the results are "nan", "posinf" or "neginf"."""
        return sum(getattr(t, what) for t in self.outputs)

    @property
    def stray(self) -> tuple[str, str] | None:
        """The first argument that is the number NaN or infinite, and how it is written."""
        for name, value in self.arguments.items():
            if isinstance(value, str) and value in _STRAY and name not in _ORDERS:
                return name, _STRAY[value]
        return None

    def number(self, *names: str) -> float | None:
        """The first of these arguments that is a number."""
        found = (self.arguments.get(name) for name in names)
        return next((float(v) for v in found if isinstance(v, (int, float))), None)


@dataclass(frozen=True, slots=True)
class Reason:
    """In one sentence why, and what to write instead; `blamed` went in, `carries` what is wrong."""

    why: str
    fix: str | None = None
    blamed: Tensor | None = None
    carries: Carries | None = None


def zero(t: Tensor) -> float:
    """The share of zeros."""
    return t.zeros / t.numel if t.numel else 0.0


def may_be_zero(t: Tensor) -> bool:
    """Whether there are zeros, or may be: with stats="minmax" only the extremes are known."""
    if t.zeros or t.norm is not None or t.min is None or t.max is None:
        return t.zeros > 0
    return t.min <= 0 <= t.max


def negative(t: Tensor) -> float:
    """Whether there are negative elements: how many is not recorded."""
    return float(t.min is not None and t.min < 0)


def masked(t: Tensor) -> float:
    """The share of -inf."""
    return t.neginf / t.numel if t.numel else 0.0


def large(t: Tensor) -> float:
    """How far the largest element goes in the range of its dtype."""
    return largest(t) / limit_of(t.dtype)


def largest(t: Tensor) -> float:
    """The largest magnitude among the finite elements, 0 if there are none."""
    return max((abs(x) for x in (t.min, t.max) if x is not None), default=0.0)


def limit_of(dtype: str) -> float:
    """The largest finite number of a dtype; of a complex one, of each part."""
    return _LIMITS.get(_PARTS.get(dtype, dtype), 3.4e38)


def range_text(dtype: str) -> str:
    """Name a dtype with its largest number: ``f16 (largest 65504)``."""
    return f"{short_dtype(dtype)} (largest {limit_of(dtype):g})"


def exp_limit(word: str, dtype: str) -> float:
    """Where exp, expm1, sinh, cosh or exp2 leaves the range of a dtype."""
    limits, usual = (_EXP2_LIMITS, 128) if word == "exp2" else (_EXP_LIMITS, 88.7)
    return limits.get(_PARTS.get(dtype, dtype), usual)


def safe_eps(t: Tensor, usual: str, half: str) -> str:
    """The eps to advise for a tensor: `usual`, or `half` in float16, where that rounds to 0.

    With `half` the slope next to 0 has to stay under 65504 as well: 1e-4 for a log or a root.
    """
    return half if t.dtype == "float16" else usual


def rounding_text(t: Tensor, usual: str) -> str:
    """Say of float16 that an eps that is written for float32 does nothing in it."""
    return f"; an eps of {usual} rounds to 0 in f16" if t.dtype == "float16" else ""


def power_eps(t: Tensor, p: float | None) -> str:
    """The eps to advise under the power p, whose slope there has to stay in the range too."""
    if t.dtype != "float16":
        return "1e-8"
    fits = (e for e in ("1e-4", "1e-3", "1e-2")
            if p is not None and abs(p) * float(e) ** (p - 1) < limit_of(t.dtype) / 10)  # fmt: skip
    return next(fits, "1e-1" if p is None or p < 0 else "1e-2")


def from_one(t: Tensor) -> str:
    """How far from 1 or -1 to stay, for the dtype of a tensor."""
    return _FROM_ONE.get(t.dtype, "1e-6")


def jitter_text(t: Tensor) -> str:
    """Advise what to add to the diagonal of a matrix: 1e-6 of its largest element, or of 1."""
    size = largest(t)
    power = math.ceil(math.log10(max(1.0, size))) - 6 if math.isfinite(size) else -6
    return f"A + {f'1e{power}' if power else '1'} * torch.eye(n), more if that is too little"


def counted(n: int, word: str) -> str:
    """Count in words: ``1 zero``, ``3 zeros``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def values_text(t: Tensor) -> str:
    """What a tensor holds: ``f32 [32, 10] from -0.1 to 1``."""
    told = f"{short_dtype(t.dtype)} {shape_text(t.shape)}"
    if t.min is None:
        return told
    if t.min == t.max:
        return f"{told}, all {number_text(t.min)}"
    return f"{told} from {number_text(t.min)} to {number_text(t.max)}"


def first_text(t: Tensor) -> str:
    """Where the first element that is not finite lies: ``, the first at [17, 4]``, if known."""
    index = first_index(t)
    return f", the first at {index}" if index else ""


def first_index(t: Tensor) -> list[int] | None:
    """The index of the first element that is not finite, one number for each dim; None if unknown.

    Of one element there is nothing to say.
    """
    if t.first_bad is None or not t.shape or t.numel < 2:
        return None
    if t.numel != math.prod(t.shape):
        return None  # inside vmap the shape is that of one sample
    at, index = t.first_bad, []
    for n in reversed(t.shape):
        at, here = divmod(at, n)
        index.append(here)
    return index[::-1]


def follow(
    call: Call, reason: Reason, calls: Iterable[Call], tensors: Mapping[int, Tensor], most: int
) -> list[Call]:
    """Follow what is wrong with the input back to the op that made it so; the cause comes first.

    A call is a link if it made a tensor that carries what is to blame. The last one is the op none
    of whose inputs carried it, or that computes its result from them.

    Args:
        call: the call to explain; not in the result.
        reason: what is wrong with its input.
        calls: forward calls in order of completion, so that the first maker is the innermost.
        tensors: by id.
        most: calls to return at most.
    """
    if reason.blamed is None or reason.carries is None or not reason.carries(reason.blamed):
        return []
    makers: dict[int, Call] = {}
    for other in calls:
        for _, id in other.outputs:
            makers.setdefault(id, other)
    links: list[Call] = []
    at: int | None = reason.blamed.id
    before = call.seq
    while at is not None and len(links) < most:
        maker = makers.get(at)
        if maker is None or maker.seq >= before:
            break
        links.append(maker)
        before = maker.seq
        at = _carrier(maker, tensors[at], reason.carries, tensors) if at in tensors else None
    return links[::-1]


def selector(call: Call, calls: Iterable[Call]) -> Call | None:
    """Find the op that picked from the result of a call; what it left out gets a gradient of 0."""
    made = {id for _, id in call.outputs}
    return next((c for c in calls if plain_op(c.op) in _SELECTS and not c.recompute
                 and any(id in made for _, id in c.inputs)), None)  # fmt: skip


@functools.lru_cache(4096)
def plain_op(op: str | None) -> str:
    """Reduce ``torch.Tensor.log_``, ``LogBackward0`` and ``log.default`` alike to ``log``.

    The last is what `torch.ops.aten.log.default` is called, whose dot is before its overload. No op
    gives no text.
    """
    first, *rest = (op or "").split(".")
    overload = len(rest) == 1 and first not in _SPACES
    word = (first if overload else rest[-1] if rest else first).lower().replace("_", "")
    return re.sub(r"backward\d*$", "", word)


def _carrier(
    maker: Call, made: Tensor, carries: Carries, tensors: Mapping[int, Tensor]
) -> int | None:
    """The input of a call from which the result has what is to blame; None if it made that."""
    moves = plain_op(maker.op) in MOVES
    if not moves and carries not in (zero, masked):
        return None  # a computed number is a new one
    share = carries(made)
    for _, id in maker.inputs:
        tensor = tensors.get(id)
        if tensor is None or id == made.id or not carries(tensor):
            continue
        # A few zeros in a batch do not explain that half of what an op computes from it is zero.
        if moves or carries(tensor) >= share / 2:
            return id
    return None
