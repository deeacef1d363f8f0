"""What a check is, what checks share, and how they are found: by listing this folder.

A check is a pure function over a `StepView`; the file it lives in is its documentation. The same
`engine` runs it live and over a saved log.

What a check keeps from one step to the next may come only from records that every step writes:
`step`, `action`, `optimizer`, `module`, and the findings so far; from `call` and `param` lines only
in a step whose own line says `full`. Thinned steps do not write them, so anything remembered from
those would differ between live and saved. A step with a new finding is always written in full, so a
check may look at all of its own step.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import math
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tensortrace.causes import plain_op
from tensortrace.errors import UsageError
from tensortrace.records import (
    Action,
    ChainLink,
    Location,
    Module,
    Phase,
    Scalar,
    Severity,
    Step,
    Tensor,
)
from tensortrace.step_view import (
    MOVED,
    Column,
    StepView,
    completion_order,
    finite,
    has_matrix,
    is_damage,
    is_left_by,
    is_own_backward,
)

__all__ = [
    "CODE", "FILLS", "MOVED", "SECTIONS", "Check", "Draft", "Page", "StepView", "all_checks",
    "check", "clears", "closest", "completion_order", "count_text", "depth_profile", "finite",
    "has_matrix", "held_by", "is_damage", "is_left_by", "is_own_backward", "plain_op", "rates_rise",
    "select", "steadiness", "unheld",
]  # fmt: skip

# Narrowing, section 3 item 7: what fills with a literal is no origin, and memory from `empty` is
# whatever was there.
_FILLS = (
    "full fulllike newfull fill fillslice filldiagonal maskedfill where triu tril setitem "
    "scalartensor tensor astensor asarray fromnumpy frombuffer indexfill maskedscatter scatter "
    "pad constantpadnd copy generatesquaresubsequentmask empty emptylike newempty emptystrided "
    "newemptystrided resize resizeas load"
)
FILLS = frozenset(_FILLS.split())
# What a docstring of a check tells in prose; and what is code, and keeps its lines.
SECTIONS = ("Symptom", "Threshold", "Source", "Fix", "Misses")
CODE = ("Example", "Fixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a check saw, before the engine makes a finding of it.

    `cause` tells two findings of one check apart: the same cause is reported once and counted
    after that, unless it has become more severe, or `place`, where a replay found that it began,
    is another one. `follows` is the id of the finding that this is a mere consequence of: it is
    then only counted. Left out, `severity`, `explanation` and `fix` are the check's own.
    """

    message: str
    cause: str = ""
    place: str = ""
    follows: str | None = None
    severity: Severity | None = None
    phase: Phase | None = None
    module: str | None = None
    op: str | None = None
    param: str | None = None
    seq: int | None = None
    tensor: int | None = None
    value: Scalar | None = None
    limit: Scalar | None = None
    location: Location | None = None
    explanation: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    chain: tuple[ChainLink, ...] = ()
    fix: str | None = None


# At each gate and when a step ends, when a step ends, when a full step ends.
When = Literal["gate", "step", "full"]
# A check gets the step, a dict of its own that lives as long as the run, and its thresholds.
Rule = Callable[..., Iterator[Draft]]


@dataclass(frozen=True, slots=True)
class Page:
    """The docstring of a check, by section; `example` and `fixed` are code, faulty and mended."""

    summary: str
    symptom: str = ""
    threshold: str = ""
    source: str = ""
    fix: str = ""
    misses: str = ""
    example: str = ""
    fixed: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A rule with its code, name, moment and the severity of what it finds.

    `after` lists the codes whose findings of the same gate this check looks at; they run first.
    `of` names what a step must have to be worth a question, any of: an action ("clip"), an action
    with a key in its detail ("loss.graph"), "calls", which all steps have but those that the engine
    puts aside, "full" and "inner", which are full and which have not rested, "holds", with an
    optimizer that tells what it holds or its eps, "frozen", with a module that was frozen in vain,
    and "repeated", with one that its container holds several times. Of what `since` names the check
    is asked in the first step that has it and in all after that. A check without both is asked of
    each: there may be a hundred thousand of them, and it is met with empty caches, so its quiet way
    is short. Once a step has had what `until` names, the check is asked no more.
    """

    code: str
    name: str
    severity: Severity
    when: When
    rule: Rule
    after: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    since: tuple[str, ...] = ()
    until: tuple[str, ...] = ()

    @property
    def thresholds(self) -> dict[str, Any]:
        """The keyword-only parameters of the rule with their defaults."""
        parameters = inspect.signature(self.rule).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def doc(self) -> Page:
        """The sections of the rule's docstring: prose as one line of text, code as it is."""
        sections = "|".join((*SECTIONS, *CODE))
        summary, *rest = re.split(rf"^({sections}):", _docstring(self.rule), flags=re.MULTILINE)
        # Code may begin beside its title: indented as far as it then is, it dedents as one block.
        texts = {name.lower(): textwrap.dedent(" " * len(f"{name}:") + text).strip()
                 if name in CODE else " ".join(text.split())
                 for name, text in zip(rest[::2], rest[1::2], strict=True)}  # fmt: skip
        return Page(" ".join(summary.split()), **texts)


def _docstring(rule: Rule) -> str:
    """The docstring of a rule; ``python -OO`` drops it, and then its source has it still."""
    if rule.__doc__ is not None:
        return inspect.getdoc(rule) or ""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(rule))).body
    except (OSError, TypeError, ValueError, SyntaxError):  # no source is installed
        return ""
    return (ast.get_docstring(function) or "") if isinstance(function, ast.FunctionDef) else ""


def check(
    code: str,
    name: str,
    *,
    severity: Severity = "warning",
    when: When = "step",
    after: tuple[str, ...] = (),
    of: tuple[str, ...] = (),
    since: tuple[str, ...] = (),
    until: tuple[str, ...] = (),
) -> Callable[[Rule], Check]:
    """Make a check of a rule ``(step, memory, *, thresholds)``, a generator of drafts."""

    def wrap(rule: Rule) -> Check:
        return Check(code, name, severity, when, rule, after, of, since, until)

    return wrap


def steadiness(values: Sequence[float]) -> tuple[float, float]:
    """Measure how evenly positive values rise: share of rising pairs, largest share of one pair.

    A profile over depth that vanishes or explodes moves in every layer, while two parts of a
    model on different scales differ by one jump.
    """
    steps = [math.log(b / a) for a, b in itertools.pairwise(values)]
    total = sum(step for step in steps if step > 0)
    if total <= 0:
        return 0.0, 1.0
    return sum(step > 0 for step in steps) / len(steps), max(steps) / total


def clears(zero_grad: Action, optimizer: int) -> bool:
    """Tell whether a zero_grad, of an optimizer or a module, reaches gradients of an optimizer."""
    if zero_grad.optimizer is not None:
        return zero_grad.optimizer == optimizer
    reached = zero_grad.detail.get("optimizers")
    return reached is None or optimizer in reached


def rates_rise(step: StepView, memory: dict[str, Any]) -> bool:
    """Tell whether an optimizer steps at a higher learning rate than the last time.

    Each has rates of its own, as the optimizers of a GAN take turns.
    """
    rates: dict[int, float] = memory.setdefault("rates", {})
    rising = False
    for optimizer in step.taken:
        rate = optimizer.highest_lr
        rising = rising or rate > rates.get(optimizer.index, rate)
        rates[optimizer.index] = rate
    return rising


@dataclass(slots=True)
class _Unheld:
    """What `unheld` knows of the run: names held by optimizer, names missing by module.

    `missing` is asked again when a module or what is held has changed; of a module that changes in
    this step in the next one, too.
    """

    asked: Step | None = None
    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    held: dict[int, set[str]] = field(default_factory=dict)
    missing: dict[str, tuple[Module | None, list[str]]] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)
    streaks: dict[str, int] = field(default_factory=dict)


def unheld(step: StepView) -> dict[str, tuple[int, list[str]]]:
    """Count for how many optimizer steps running parameters had gradients and no optimizer.

    Each check that calls it does so in every step: what the first gets is kept for the others.

    Returns:
        By module that ran in training mode: that count, and the full names of the parameters, but
        for those that move all the same.
    """
    known = step.shared.get("unheld")
    if known is None:
        known = step.shared["unheld"] = _Unheld()
    if known.asked is not step.summary:
        known.asked, known.found = step.summary, _count_unheld(step, known)
    found: dict[str, tuple[int, list[str]]] = known.found
    return found


def held_by(step: StepView) -> dict[int, set[str]]:
    """The names of what each optimizer that has stepped holds, after `unheld` of the same step."""
    held: dict[int, set[str]] = step.shared["unheld"].held
    return held


def depth_profile(step: StepView, column: Column) -> list[tuple[str, float]]:
    """List layers from input to output, as `StepView.profile`, of what has one loss.

    Two networks that have an optimizer and a loss each (a GAN) are no chain: the gradients of the
    one are of another size for its own reasons. The larger of them is listed.
    """
    optimizers = {o.index for o in step.taken}
    if len(optimizers) < 2 or len(step.losses) < 2:
        return step.profile(column)
    unheld(step)
    held = held_by(step)
    parts = {name.rpartition(".")[0]: i for i in optimizers for name in held.get(i, ())}
    return step.profile(column, parts)


def _count_unheld(step: StepView, known: _Unheld) -> dict[str, tuple[int, list[str]]]:
    held, taken, missing = known.held, step.taken, known.missing
    if "holds" in step.has:
        new = {o.index: set(o.parameters) for o in taken if o.parameters is not None}
        held.update(new)
        if new:
            missing.clear()
    if step.summary is None or not taken:
        return {}
    if step.summary.full:
        now = {name for o in taken for name in o.moved}
        if now != known.moving:
            known.moving = now
            missing.clear()
    if not held:
        return {}
    everything: set[str] | None = None
    found: dict[str, tuple[int, list[str]]] = {}
    columns = step.summary.modules
    for path, rms in zip(columns.path, columns.param_grad_rms, strict=False):
        if not rms:
            continue
        module = step.modules.get(path)
        if module is None or not step.trains(path):
            continue
        of, names = missing.get(path, (None, []))
        if of is not module:
            everything = set().union(*held.values()) if everything is None else everything
            names = [n for n in step.learned(path)
                     if n not in everything and n not in known.moving]  # fmt: skip
            missing[path] = (None if path in step.required else module, names)
        if names:
            known.streaks[path] = known.streaks.get(path, 0) + 1
            found[path] = (known.streaks[path], names)
        elif known.streaks:
            known.streaks.pop(path, None)
    return found


def count_text(tensor: Tensor) -> str:
    """Count what is not finite: ``12 NaN and 3 inf of 640``."""
    counts = {"NaN": tensor.nan, "inf": tensor.posinf, "-inf": tensor.neginf}
    return " and ".join(f"{n} {what}" for what, n in counts.items() if n) + f" of {tensor.numel}"


def closest(word: str, known: Iterable[str], page: str = "") -> str:
    """Name what is spelt nearly like a word that is not known, for the end of a sentence.

    Args:
        page: of the check whose settings are known; the list of checks by default.
    """
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.4)
    hint = f" Closest: {', '.join(map(repr, near))}." if near else ""
    return f"{hint} List all with `{f'tensortrace explain {page}'.rstrip()}`."


def all_checks() -> list[Check]:
    """List every check in this folder, by code."""
    found: list[Check] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [value for value in vars(module).values() if isinstance(value, Check)]
    return sorted(found, key=lambda c: c.code)


def select(choice: Iterable[str] | None, ignore: Iterable[str] = ()) -> list[Check]:
    """Choose checks by code, name or code prefix ("TT1"); an unknown one is a `UsageError`."""
    everything = all_checks()

    def matching(words: Iterable[str]) -> set[str]:
        codes: set[str] = set()
        for word in words:
            hits = {c.code for c in everything
                    if c.name == word or (word and c.code.startswith(word.upper()))}  # fmt: skip
            if not hits:
                names = [name for c in everything for name in (c.code, c.name)]
                raise UsageError(f"no check named {word!r}.{closest(word, names)}")
            codes |= hits
        return codes

    wanted = {c.code for c in everything} if choice is None else matching(choice)
    wanted -= matching(ignore)
    return [c for c in everything if c.code in wanted]
