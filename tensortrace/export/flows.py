"""What flowed through source lines: the shapes of each name, in order of first sight.

A flow is small however much flowed: of each dim it keeps the first few values and the range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tensortrace.records import Finding, Source, Tensor
from tensortrace.text import escape, number_text, short_dtype, shorten

# So many are told one by one: values of a dim or a text, kinds of tensors, and of a line the names
# of one group, exceptions and findings.
LISTED = 3
# Variables that are no news.
UNTOLD = ("self", "cls")
_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?(?:e[+-]\d{1,3})?")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NAN = re.compile(r"(?<![\w'\".])nan(?![\w'\"])")
_FLOAT = re.compile(r"-?\d{1,300}\.\d{4,20}(?:e[+-]\d{1,3})?")
DEFINED = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.M)
# Of one text, and of all texts that a value had.
LONGEST_TEXT, LONGEST_TEXTS = 24, 40


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
        texts: the first few different ones, in order of first sight.
        low, high: of those that are numbers the smallest and the largest.
        bad: by "nan" and "inf", where it first was so; a number that is infinite is no fault.
    """

    name: str
    kinds: dict[tuple[str, int | None], list[Dim]] = field(default_factory=dict)
    first: str | None = None
    last: str | None = None
    texts: list[str] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf
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
            self.say(number_text(tensor.mean), step, tensor.mean)
        if tensor.nan and "nan" not in self.bad:
            self.bad["nan"] = Bad(step, tensor.nan, tensor.numel)
        if (tensor.posinf or tensor.neginf) and "inf" not in self.bad:
            self.bad["inf"] = Bad(step, tensor.posinf + tensor.neginf, tensor.numel)

    def say(self, text: str, step: int, number: float | None = None) -> None:
        """Take in the text of one value, and its number if it is one."""
        if self.first is None:
            self.first = text
        self.last = text
        if len(self.texts) <= LISTED and text not in self.texts:
            self.texts.append(text)
        if number is None and _NUMBER.fullmatch(text):
            number = float(text)
        if number is not None and math.isfinite(number):
            self.low, self.high = min(self.low, number), max(self.high, number)
        elif number is not None:
            self.bad.setdefault("nan" if math.isnan(number) else "inf", Bad(step, 1, 1))
        elif "nan" in text and "nan" not in self.bad and _NAN.search(_QUOTED.sub("", text)):
            self.bad["nan"] = Bad(step, 1, 1)


@dataclass(slots=True)
class LineFlow:
    """One source line over all steps that were read.

    Attributes:
        executions: how often it ran; of a log without line records, how many calls it made.
        recorded: how many of those are in the log, with their time.
        entered: how often a function, a block or a step within one began here; `followed` counts
            those whose lines were recorded.
        host_ns: the time of those that are.
        variables: what it changed or returned, by name; `calls` is what the calls that it made gave
            back, by module path or op; `unnamed` counts names beyond the first 64 of each.
        flags: "nonfinite" and "broadcast" with the first step that had it.
        gradient: "nan" and "inf" with the first step in which a gradient here was so.
        raised: exceptions that passed through the line, with their number.
        findings: those at this line, by code in order of first sight, with their number.
    """

    number: int
    executions: int = 0
    recorded: int = 0
    entered: int = 0
    followed: int = 0
    host_ns: int = 0
    variables: dict[str, Flow] = field(default_factory=dict)
    calls: dict[str, Flow] = field(default_factory=dict)
    unnamed: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    gradient: dict[str, int] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)
    findings: dict[str, tuple[Finding, int]] = field(default_factory=dict)
    code: str | None = None

    def join(self, other: LineFlow, *, counting: bool) -> None:
        """Take in what was seen of the same line in other code, its executions if `counting`."""
        if counting:
            self.executions += other.executions
            self.recorded += other.recorded
            self.entered += other.entered
            self.followed += other.followed
            self.host_ns += other.host_ns
        self.variables = {**other.variables, **self.variables}
        self.calls = {**other.calls, **self.calls}
        self.unnamed += other.unnamed
        self.flags = {**other.flags, **self.flags}
        self.gradient = {**other.gradient, **self.gradient}
        self.raised = {**other.raised, **self.raised}
        self.findings = {**other.findings, **self.findings}
        self.code = self.code or other.code

    @property
    def time_ns(self) -> int:
        """The time of all executions, estimated where not all were recorded."""
        if not self.recorded or self.recorded >= self.executions:
            return self.host_ns
        return self.host_ns * self.executions // self.recorded

    @property
    def flows(self) -> list[Flow]:
        """What to tell: the variables, or where none of them holds a tensor what calls made.

        What was not finite in a call is told in any case: not every execution has its variables.
        """
        variables, calls = list(self.variables.values()), list(self.calls.values())
        if not any(flow.kinds for flow in variables):
            return [*calls, *variables]
        told = {name for flow in variables for name in flow.bad}
        return [*variables, *(flow for flow in calls if flow.bad.keys() - told)]


@dataclass(slots=True)
class FunctionFlow:
    """A function of the user's: its lines by number, and its text where the log has it."""

    file: str
    name: str
    source: Source | None = None
    lines: dict[int, LineFlow] = field(default_factory=dict)

    @property
    def entered(self) -> int:
        """How often it was called. What runs in a block or over several steps is met elsewhere."""
        return sum(line.entered for line in self._heads())

    @property
    def followed(self) -> int:
        """How many of these calls were recorded line by line."""
        return sum(line.followed for line in self._heads())

    def _heads(self) -> list[LineFlow]:
        if self.source is None:
            return []
        begins = DEFINED.search(self.source.text)
        above = self.source.text.count("\n", 0, begins.start()) if begins else 0
        head = range(self.first_line, self.first_line + above + 1)
        return [line for number, line in self.lines.items() if number in head]

    @property
    def first_line(self) -> int:
        """Where it begins, as far as is known."""
        return self.source.first_line if self.source else min(self.lines, default=0)

    @property
    def time_ns(self) -> int:
        """The time of all its lines."""
        return sum(line.time_ns for line in self.lines.values())

    def code(self, number: int) -> str | None:
        """The text of a line; None where the log does not have it."""
        stored = self.source.line(number) if self.source is not None else None
        if stored is not None:
            return stored
        line = self.lines.get(number)
        return line.code if line else None


def kind_texts(flow: Flow, arrow: str = "→") -> list[str]:
    """Write each kind of tensor of a flow: ``[8, 128→97, 64] f32``; escaped."""
    texts = []
    for (dtype, dims), lengths in list(flow.kinds.items())[:LISTED]:
        shape = "?" if dims is None else ", ".join(dim.text(arrow) for dim in lengths)
        texts.append(f"[{shape}] {short_dtype(dtype)}")
    return texts


def value_text(flow: Flow, arrow: str = "→") -> str:
    """Write the values that were seen: ``0→1→2``, ``2.31→..→0.412``; empty if none; escaped.

    If one in between was smaller or larger than both ends, the range follows: ``(0.1..9)``.
    """
    if flow.first is None or flow.last is None:
        return ""
    last = [] if flow.texts[-1] == flow.last else [flow.last]
    texts = [escape(shorten(_rounded(text), LONGEST_TEXT)) for text in [*flow.texts, *last]]
    # What differs beyond the digits that are shown is the same here.
    told = [text for i, text in enumerate(texts) if not i or text != texts[i - 1]]
    if len(told) <= 2 or (
        len(flow.texts) <= LISTED and len(arrow.join(told)) <= LONGEST_TEXTS
    ):  # fmt: skip
        return arrow.join(told)
    text = f"{told[0]}{arrow}..{arrow}{told[-1]}"
    if not flow.low < flow.high:
        return text
    ends = [float(end) for end in (flow.first, flow.last) if _NUMBER.fullmatch(end)]
    low, high = number_text(flow.low), number_text(flow.high)
    inside = ends and low in map(number_text, ends) and high in map(number_text, ends)
    return text if inside else f"{text} ({low}..{high})"


def _rounded(text: str) -> str:
    """Give a float three digits, as tensors of one element have."""
    return number_text(float(text)) if _FLOAT.fullmatch(text) else text


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
