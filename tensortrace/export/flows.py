"""What flowed through a source line under one name: its shapes, in order of first sight.

A flow is small however much flowed: of each dim it keeps the first few values and the range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tensortrace.records import Tensor
from tensortrace.text import escape, number_text, short_dtype, shorten

# Values of a dim, of a text and kinds of tensors that are told one by one.
LISTED = 3
LONGEST_TEXT = 24


@dataclass(slots=True)
class Dim:
    """The lengths that one dim had: the first four, in order of first sight, and their range."""

    values: list[int]
    low: int
    high: int

    def add(self, length: int) -> None:
        """Take in one more length."""
        if length not in self.values:
            if len(self.values) <= LISTED:
                self.values.append(length)
            self.low, self.high = min(self.low, length), max(self.high, length)

    def text(self, arrow: str) -> str:
        """Write it as ``8``, ``128→97`` or ``16..512``."""
        if len(self.values) > LISTED:
            return f"{self.low}..{self.high}"
        return arrow.join(map(str, self.values))


@dataclass(slots=True)
class Bad:
    """Where a name first held what is not finite: the step, how many elements, of how many."""

    step: int
    count: int
    numel: int


@dataclass(slots=True)
class Flow:
    """All that was seen under one name at one line.

    Attributes:
        kinds: by dtype and number of dims (None: a tensor that has none), the dims.
        first: the text of a value that is no tensor, or the number of a tensor of one element,
            when it was seen first; `last` is the last one.
        bad: by "nan" and "inf", where it first was so.
    """

    name: str
    kinds: dict[tuple[str, int | None], list[Dim]] = field(default_factory=dict)
    first: str | None = None
    last: str | None = None
    bad: dict[str, Bad] = field(default_factory=dict)

    def add(self, tensor: Tensor, step: int) -> None:
        """Take in one tensor. Hot."""
        shape = tensor.shape
        key = (tensor.dtype, None if shape is None else len(shape))
        dims = self.kinds.get(key)
        if dims is None:
            if len(self.kinds) <= LISTED:
                self.kinds[key] = [Dim([n], n, n) for n in shape or ()]
        else:
            for dim, length in zip(dims, shape or (), strict=True):
                if length != dim.values[-1]:
                    dim.add(length)
        if tensor.numel == 1 and tensor.mean is not None:
            self.say(number_text(tensor.mean))
        if tensor.nan and "nan" not in self.bad:
            self.bad["nan"] = Bad(step, tensor.nan, tensor.numel)
        if (tensor.posinf or tensor.neginf) and "inf" not in self.bad:
            self.bad["inf"] = Bad(step, tensor.posinf + tensor.neginf, tensor.numel)

    def say(self, text: str) -> None:
        """Take in the text of one value."""
        if self.first is None:
            self.first = text
        self.last = text


def kind_texts(flow: Flow, arrow: str = "→") -> list[str]:
    """Write each kind of tensor of a flow: ``[8, 128→97, 64] f32``; escaped."""
    texts = []
    for (dtype, dims), lengths in list(flow.kinds.items())[:LISTED]:
        shape = "?" if dims is None else ", ".join(dim.text(arrow) for dim in lengths)
        texts.append(f"[{shape}] {short_dtype(dtype)}")
    return texts


def value_text(flow: Flow, arrow: str = "→") -> str:
    """Write the first and the last value that were seen: ``2.31→0.412``; empty if none; escaped."""
    if flow.first is None or flow.last is None:
        return ""
    ends = [flow.first] if flow.first == flow.last else [flow.first, flow.last]
    return arrow.join(escape(shorten(text, LONGEST_TEXT)) for text in ends)


def flow_text(flow: Flow, arrow: str = "→") -> str:
    """Write a flow without its name: ``[8, 128→97, 64] f32``, ``[] f32 = 2.31→0.412``, ``= 3``."""
    kinds = " | ".join(kind_texts(flow, arrow))
    if len(flow.kinds) > LISTED:
        kinds += " | more"
    value = value_text(flow, arrow)
    return " ".join(part for part in (kinds, f"= {value}" if value else "") if part)


def bad_text(flow: Flow) -> str:
    """Say what was not finite, and where first: ``x nan (step 7)``; empty if all was finite."""
    marks = [f"x {name} (step {bad.step})" for name, bad in sorted(flow.bad.items(), reverse=True)]
    return " ".join(marks)


def grouped(flows: Sequence[Flow], arrow: str = "→") -> list[tuple[list[Flow], str]]:
    """Put the flows together that would be written alike, in order of first sight."""
    groups: dict[tuple[str, str], list[Flow]] = {}
    for flow in flows:
        groups.setdefault((flow_text(flow, arrow), bad_text(flow)), []).append(flow)
    return [(group, text) for (text, _), group in groups.items()]
