"""What a check is, how checks are found, and the engine that runs them over records.

A check is a pure function over a `StepView`; the file it lives in is its documentation. The same
engine runs live and over a saved log: it is fed the records in log order and decides at gates
(`optimizer` lines, `action` lines named "gate") and when a `step` line closes a step.

What a check keeps from one step to the next may come only from records that every step writes:
`step`, `action`, `optimizer`, `module`, and the findings so far; from `call` and `param` lines only
in a step whose own line says `full`. Thinned steps do not write them, so anything remembered from
those would differ between live and saved. A step with a new finding is always written in full, so a
check may look at all of its own step.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import math
import pkgutil
import re
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
from msgspec import structs

from tensortrace.errors import UsageError
from tensortrace.records import (
    Action,
    Call,
    ChainLink,
    Finding,
    Location,
    Module,
    Optimizer,
    Param,
    Phase,
    Record,
    Scalar,
    Severity,
    Source,
    Step,
    Tensor,
)

__all__ = [
    "Check", "Draft", "Engine", "Page", "StepView", "all_checks", "check", "completion_order",
    "count_text", "explain", "finite", "plain_op", "select", "steadiness", "unheld",
]  # fmt: skip

# Design "Steps": a step is flushed in parts after this many records, so this much is held here too.
HELD = 20_000
# Findings of one code and severity in one run; what comes after is counted under the last of them.
FINDINGS_PER_CODE = 50
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
_SECTIONS = ("Symptom", "Threshold", "Source", "Fix", "Misses")
# Sections that are code, and keep their lines.
_CODE = ("Example", "Fixed")


@dataclass(slots=True)
class StepView:
    """A step as far as it has come: what a check may look at.

    `fresh` indexes the first call that no earlier gate of this step has shown. `replayed` are the
    ops of calls that were run again to find the one to blame. `tensors` are those
    of this step by id, `bad` the ids of those with a NaN or infinite element, in log order;
    `modules` and `findings` are of the whole run so far. `causes` are the findings made or met
    again in this step; `poisoned` is the id of the finding after which an optimizer wrote
    non-finite parameters, so that all that is non-finite since then follows from it. `summary` is
    the step line, None until the step closes. Of a step with more than 20,000 calls the older ones
    are dropped after a gate.
    """

    number: int
    update: int = 0
    calls: list[Call] = field(default_factory=list)
    fresh: int = 0
    replayed: list[Call] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)
    summary: Step | None = None
    modules: Mapping[str, Module] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    causes: list[Finding] = field(default_factory=list)
    poisoned: str | None = None

    def blamed(self) -> str | None:
        """Name the finding that a non-finite value of this step follows from, if one is known."""
        if self.poisoned:
            return self.poisoned
        return next((f.id for f in self.causes if _is_damage(f)), None)

    def narrowed(self, seq: int | None, phase: Phase) -> tuple[str | None, Call | None]:
        """Tell what a replay came to: how sure the place is, and the op to blame if it is known.

        Args:
            seq: a forward call inside the replayed one; None takes any replay of the phase.
            phase: what was replayed.
        """
        up = {seq}
        by_seq = {c.seq: c for c in self.calls}
        while seq is not None:
            seq = by_seq[seq].parent if seq in by_seq else None
            up.add(seq)
        placed = None
        for action in self.actions:
            detail = action.detail
            if action.action != "replay" or detail.get("phase") != phase:
                continue
            if (None in up and len(up) == 1) or detail.get("forward") in up:
                placed = detail.get("placed")
                op = next((c for c in self.replayed if c.seq == detail.get("seq")), None)
                if op is not None:
                    return placed, op
        return placed, None

    def happened(self) -> list[Action | Optimizer]:
        """List actions and optimizer steps in the order in which they happened."""
        return sorted([*self.actions, *self.optimizers], key=lambda record: record.seq)

    def scaled(self) -> bool:
        """Tell whether a GradScaler watches the gradients of this step and skips if it must."""
        return any(a.action in ("scale", "unscale") for a in self.actions)

    def damage(self) -> Literal["loss", "gradient", "output"] | None:
        """Tell what a non-finite value has reached; None while all that counts is clean.

        A loss is the judge where there is one. Without one it is the output of an outermost
        module, unless what consumed it made something finite of it.
        """
        losses = [a for a in self.actions if a.action == "loss"]
        if any(not finite(a.detail.get("value")) for a in losses):
            return "loss"
        if not self.bad:
            return None
        backward = [c for c in self.calls if c.phase == "backward"]
        if not self.scaled() and any(self.nonfinite(c.outputs) for c in backward):
            return "gradient"
        return None if losses or backward else self._unhealed()

    def profile(self) -> list[tuple[str, float]]:
        """List the layers of the commonest class with the rms of their parameter gradients.

        In order of first call, so from input to output. One class only, since an embedding, a
        convolution and a norm do not compare; layers without weights of two dims, and those
        without gradient or with none but zeros, are left out.
        """
        if self.summary is None:
            return []
        columns = self.summary.modules
        families: dict[str, list[tuple[str, float]]] = {}
        for path, rms in zip(columns.path, columns.param_grad_rms, strict=False):
            module = self.modules.get(path)
            if module and rms and any(len(p.shape) > 1 for p in module.parameters):
                families.setdefault(module.cls, []).append((path, rms))
        return max(families.values(), key=len, default=[])

    def carried(self) -> Iterator[tuple[Call, str, Tensor]]:
        """List what modules got from earlier steps with a graph, outermost modules first.

        Returns:
            The call that got it first, the name of the input there, and the tensor.
        """
        # Nearly always there are none: one look at each tensor must do.
        old = {id: t for id, t in self.tensors.items()
               if t.from_step is not None and t.grad_fn is not None and not t.is_leaf}  # fmt: skip
        calls = [c for c in self.calls if old and c.phase == "forward" and c.op is None]
        for call in sorted(calls, key=lambda c: (c.parent is not None, c.seq)):
            for name, id in call.inputs if not call.recompute else ():
                if id in old:
                    yield call, name, old.pop(id)

    def _unhealed(self) -> Literal["output"] | None:
        """Follow what outermost modules spoilt to where nothing finite was made of it.

        An index or a count of NaN (argmax, eq) heals nothing.
        """
        outer = (c for c in self.calls if c.parent is None and c.phase == "forward")
        bad: set[int] = set()
        used: set[int] = set()
        for call in sorted(outer, key=lambda c: c.seq):
            got = {id for _, id in call.inputs if id in bad}
            made = {tensor.id for tensor in self.hurt(call.outputs)}
            if call.op is None or got:
                bad |= made
            if any(self._is_float(id) for _, id in call.outputs):
                used |= got - made
        return "output" if bad - used else None

    def _is_float(self, id: int) -> bool:
        tensor = self.tensors.get(id)
        return tensor is not None and tensor.dtype.startswith(("float", "bfloat", "complex"))

    def nonfinite(self, names: Iterable[tuple[str, int]]) -> list[Tensor]:
        """Pick those of a call's tensors that have any NaN or infinity."""
        found = (self.tensors.get(id) for _, id in names)
        return [t for t in found if t is not None and (t.nan or t.posinf or t.neginf)]

    def hurt(self, names: Iterable[tuple[str, int]]) -> list[Tensor]:
        """Pick those of a call's tensors that have NaN or +inf; -inf alone is a mask."""
        return [t for t in self.nonfinite(names) if t.nan or t.posinf]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a check saw, before the engine makes a finding of it.

    `cause` tells two findings of one check apart: the same cause is reported once and counted
    after that, unless it has become more severe. `follows` is the id of the finding that this is a
    mere consequence of: it is then only counted. Left out, `severity`, `explanation` and `fix` are
    the check's own.
    """

    message: str
    cause: str = ""
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


When = Literal["gate", "step"]
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
    """

    code: str
    name: str
    severity: Severity
    when: When
    rule: Rule
    after: tuple[str, ...] = ()

    @property
    def thresholds(self) -> dict[str, Any]:
        """The keyword-only parameters of the rule with their defaults."""
        parameters = inspect.signature(self.rule).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def doc(self) -> Page:
        """The sections of the rule's docstring: prose as one line of text, code as it is."""
        sections = "|".join((*_SECTIONS, *_CODE))
        summary, *rest = re.split(rf"^({sections}):", inspect.getdoc(self.rule) or "",
                                  flags=re.MULTILINE)  # fmt: skip
        # Code may begin beside its title: indented as far as it then is, it dedents as one block.
        texts = {name.lower(): textwrap.dedent(" " * len(f"{name}:") + text).strip()
                 if name in _CODE else " ".join(text.split())
                 for name, text in zip(rest[::2], rest[1::2], strict=True)}  # fmt: skip
        return Page(" ".join(summary.split()), **texts)


def check(
    code: str,
    name: str,
    *,
    severity: Severity = "warning",
    when: When = "step",
    after: tuple[str, ...] = (),
) -> Callable[[Rule], Check]:
    """Make a check of a rule ``(step, memory, *, thresholds)``, a generator of drafts."""

    def wrap(rule: Rule) -> Check:
        return Check(code, name, severity, when, rule, after)

    return wrap


class Engine:
    """Run checks over records, live or from a saved log, and find the same in both.

    A check that raises is not run again; `problems` has one line for each. Findings and step lines
    of earlier runs of the engine that come with a saved log are not looked at.

    Args:
        checks: those to run; `all_checks()` by default.
        settings: ``{"TT202.ratio": 100.0}``; an unknown name is a `UsageError`.
    """

    def __init__(
        self, checks: Iterable[Check] | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        chosen = all_checks() if checks is None else list(checks)
        self.problems: list[str] = []
        self._thresholds = _configure(chosen, settings or {})
        self._checks = _in_order(chosen)
        self._memory: dict[str, dict[str, Any]] = {c.code: {} for c in self._checks}
        self._modules: dict[str, Module] = {}
        self._sources: dict[str, list[Source]] = {}
        self._findings: list[Finding] = []
        self._reported: dict[tuple[Any, ...], Finding] = {}
        self._counts: Counter[str] = Counter()
        self._last: dict[tuple[str, Severity], tuple[int, str]] = {}
        self._repeats: Counter[str] = Counter()
        self._step: StepView | None = None
        self._poisoned: str | None = None

    def feed(self, record: Record) -> list[Finding]:
        """Take the next record in log order; returns what became certain with it."""
        # Hot path: runs for every record of a live run.
        kind = type(record)
        if kind is Module:
            self._modules[record.path] = record  # type: ignore[assignment,attr-defined]
        elif kind is Source:
            self._sources.setdefault(record.file, []).append(record)  # type: ignore[arg-type,attr-defined]
        elif kind in (Call, Param, Optimizer, Action, Step):
            return self._take(record)  # type: ignore[arg-type]
        return []

    @property
    def step_in_flight(self) -> StepView | None:
        """The step as far as it has been fed; None between steps."""
        return self._step

    def take_repeats(self) -> dict[str, int]:
        """Hand over, by finding id, what was only counted since the last call."""
        repeats, self._repeats = dict(self._repeats), Counter()
        return repeats

    def _take(self, record: Call | Param | Optimizer | Action | Step) -> list[Finding]:
        step = self._step
        if step is None or step.number != record.step:
            step = StepView(record.step, modules=self._modules, findings=self._findings,
                            poisoned=self._poisoned)  # fmt: skip
            self._step = step
        step.update = max(step.update, record.update)
        gate = False
        if isinstance(record, Call) and record.replay:
            step.replayed.append(record)
            step.tensors.update((tensor.id, tensor) for tensor in record.tensors)
        elif isinstance(record, Call):
            step.calls.append(record)
            for tensor in record.tensors:
                _describe(step, tensor)
            # Without a gate nothing would ever be let go.
            gate = len(step.calls) >= 2 * HELD
        elif isinstance(record, Param):
            step.params.append(record)
            _describe(step, record.value)
            if record.grad is not None:
                _describe(step, record.grad)
        elif isinstance(record, Action):
            step.actions.append(record)
            gate = record.action in ("gate", "exception")
            if record.action == "load_state_dict":
                self._poisoned = step.poisoned = None
        elif isinstance(record, Optimizer):
            step.optimizers.append(record)
            found = self._gate(step)
            if not record.skipped and not finite(record.grad_norm):
                # From the findings of the run, not of the step: a thinned step has no calls to
                # meet a known cause in, and must poison all the same.
                errors = [f.id for f in self._findings if _is_damage(f)]
                self._poisoned = step.poisoned = errors[-1] if errors else None
            return found
        else:
            step.summary, self._step = record, None
            found = self._run(step, "gate") + self._run(step, "step")
            written = [f.id for f in found if f.code == "TT104" and f.severity == "error"]
            self._poisoned = self._poisoned or (written[0] if written else None)
            return found
        return self._gate(step) if gate else []

    def _gate(self, step: StepView) -> list[Finding]:
        found = self._run(step, "gate")
        if len(step.calls) > HELD:
            step.calls.clear()
        for records in (step.params, step.actions, step.optimizers, step.bad, step.replayed):
            if len(records) > HELD:
                del records[:-HELD]
        for old in list(step.tensors)[: -2 * HELD]:
            del step.tensors[old]
        step.fresh = len(step.calls)
        return found

    def _run(self, step: StepView, when: When) -> list[Finding]:
        found: list[Finding] = []
        for one in [c for c in self._checks if c.when == when]:
            try:
                for draft in one.rule(step, self._memory[one.code], **self._thresholds[one.code]):
                    found += self._judge(one, step, draft)
            except Exception as error:
                self._checks.remove(one)
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.problems.append(
                    f"check {one.code} {one.name} stopped at step {step.number}: "
                    f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
                )
        return found

    def _judge(self, one: Check, step: StepView, draft: Draft) -> list[Finding]:
        """Make a finding of a draft, or only count it."""
        if draft.follows is not None:
            self._repeats[draft.follows] += 1
            return []
        severity = draft.severity or one.severity
        key = (one.code, draft.cause or (draft.module, draft.op, draft.param))
        earlier = self._reported.get(key)
        if earlier and SEVERITIES.index(severity) <= SEVERITIES.index(earlier.severity):
            self._repeats[earlier.id] += 1
            if earlier not in step.causes:
                step.causes.append(earlier)
            return []
        count, last = self._last.get((one.code, severity), (0, ""))
        if count >= FINDINGS_PER_CODE:
            self._repeats[last] += 1
            return []
        self._counts[one.code] += 1
        draft = replace(
            draft,
            location=self._with_code(draft.location),
            chain=tuple(
                structs.replace(link, location=self._with_code(link.location))
                for link in draft.chain
            ),
        )
        finding = _finding(one, step, draft, f"{one.code}-{self._counts[one.code]}")
        self._last[one.code, severity] = (count + 1, finding.id)
        self._reported[key] = finding
        self._findings.append(finding)
        step.causes.append(finding)
        return [finding]

    def _with_code(self, location: Location | None) -> Location | None:
        """Add the text of a line, if its function was stored."""
        if location is None or location.code is not None:
            return location
        for source in self._sources.get(location.file, ()):
            lines = source.text.splitlines()
            if 0 <= (at := location.line - source.first_line) < len(lines):
                return structs.replace(location, code=lines[at].strip()[:200])
        return location


def completion_order(calls: Iterable[Call]) -> list[Call]:
    """Sort calls as they ended: children before their parent, siblings by seq."""
    children: dict[int | None, list[Call]] = {}
    ordered = sorted(calls, key=lambda c: c.seq)
    here = {c.seq for c in ordered}
    for call in ordered:
        children.setdefault(call.parent if call.parent in here else None, []).append(call)
    # Parents first and siblings from the last, then all of it backwards.
    order: list[Call] = []
    stack = list(children.get(None, []))
    while stack:
        call = stack.pop()
        order.append(call)
        stack += children.get(call.seq, [])
    return order[::-1]


def _is_damage(finding: Finding) -> bool:
    return finding.code.startswith("TT1") and finding.severity != "note"


def _describe(step: StepView, tensor: Tensor) -> None:
    step.tensors[tensor.id] = tensor
    if tensor.nan or tensor.posinf or tensor.neginf:
        step.bad.append(tensor.id)


def _finding(one: Check, step: StepView, draft: Draft, id: str) -> Finding:
    page = one.doc
    return Finding(
        id=id, step=step.number, update=step.update, code=one.code, check=one.name,
        severity=draft.severity or one.severity, phase=draft.phase, module=draft.module,
        op=draft.op, param=draft.param, seq=draft.seq, tensor=draft.tensor, message=draft.message,
        value=draft.value, limit=draft.limit, location=draft.location,
        explanation=page.symptom if draft.explanation is None else draft.explanation,
        # As the log will give it back: a tuple would differ between live and saved.
        evidence=msgspec.json.decode(msgspec.json.encode(draft.evidence)), chain=list(draft.chain),
        fix=page.fix if draft.fix is None else draft.fix,
    )  # fmt: skip


def finite(x: Scalar | None) -> bool:
    """Tell whether a scalar of the log is a finite number, or absent."""
    return x is None or (not isinstance(x, str) and math.isfinite(x))


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


def unheld(step: StepView, memory: dict[str, Any]) -> dict[str, tuple[int, list[str]]]:
    """Count for how many optimizer steps running parameters had gradients and no optimizer.

    Call it once in every step. ``memory["held"]`` is what each optimizer holds: names by index.

    Returns:
        By module that ran in training mode: that count, and the full names of the parameters.
    """
    held: dict[int, set[str]] = memory.setdefault("held", {})
    taken = [o for o in step.optimizers if not o.skipped]
    held.update((o.index, set(o.parameters)) for o in taken if o.parameters is not None)
    if step.summary is None or not taken or not held:
        return {}
    everything = set().union(*held.values())
    streaks: dict[str, int] = memory.setdefault("unheld", {})
    found: dict[str, tuple[int, list[str]]] = {}
    columns = step.summary.modules
    for path, rms in zip(columns.path, columns.param_grad_rms, strict=False):
        module = step.modules.get(path)
        if not rms or module is None or not module.training:
            continue
        own = ((f"{path}.{p.name}" if path else p.name) for p in module.parameters
               if p.requires_grad)  # fmt: skip
        names = [name for name in own if name not in everything]
        streaks[path] = streaks.get(path, 0) + 1 if names else 0
        if names:
            found[path] = (streaks[path], names)
    return found


def plain_op(op: str | None) -> str:
    """Reduce ``torch.Tensor.log_`` and ``LogBackward0`` alike to ``log``."""
    word = (op or "").rsplit(".", 1)[-1].lower().replace("_", "")
    return re.sub(r"backward\d*$", "", word)


def count_text(tensor: Tensor) -> str:
    """Count what is not finite: ``12 NaN and 3 inf of 640``."""
    counts = {"NaN": tensor.nan, "inf": tensor.posinf, "-inf": tensor.neginf}
    return " and ".join(f"{n} {what}" for what, n in counts.items() if n) + f" of {tensor.numel}"


def _in_order(checks: Iterable[Check]) -> list[Check]:
    """Order by code, each after those it looks at."""
    by_code = {c.code: c for c in sorted(checks, key=lambda c: c.code)}
    ordered: dict[str, Check] = {}

    def place(one: Check) -> None:
        for code in one.after:
            if code in by_code and code not in ordered:
                place(by_code[code])
        ordered[one.code] = one

    for one in by_code.values():
        if one.code not in ordered:
            place(one)
    return list(ordered.values())


def _configure(checks: Iterable[Check], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give every check its thresholds; what is set for a known check that does not run is fine."""
    known = {c.code: c for c in [*all_checks(), *checks]}
    thresholds = {code: c.thresholds for code, c in known.items()}
    codes = {c.name: c.code for c in known.values()}
    for name, value in settings.items():
        prefix, _, key = name.partition(".")
        code = codes.get(prefix, prefix)
        if key not in thresholds.get(code, {}):
            own = ", ".join(f"{prefix}.{k}" for k in thresholds.get(code, {}))
            if code in known and not key:
                raise UsageError(f"no setting named {name!r}. {prefix} has {own or 'none'}.")
            names = [f"{p}.{k}" for p, c in [*codes.items(), *zip(known, known, strict=True)]
                     for k in thresholds[c]]  # fmt: skip
            raise UsageError(f"no setting named {name!r}.{_closest(name, names)}")
        thresholds[code][key] = _cast(name, value, thresholds[code][key])
    return thresholds


def _cast(name: str, value: Any, default: Any) -> Any:
    """Read a setting as the type of its default; text comes from the command line."""
    words = {"true": True, "false": False, "1": True, "0": False}
    try:
        if isinstance(default, bool):
            return words[str(value).lower()]
        cast = type(default)(value)
    except (KeyError, TypeError, ValueError) as error:
        kind = type(default).__name__
        raise UsageError(
            f"{name} is {value!r}, not a value of type {kind} (default {default!r})."
        ) from error
    return cast


def _closest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.4)
    hint = f" Closest: {', '.join(map(repr, near))}." if near else ""
    return f"{hint} List all with `tensortrace explain`."


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
                raise UsageError(f"no check named {word!r}.{_closest(word, names)}")
            codes |= hits
        return codes

    wanted = {c.code for c in everything} if choice is None else matching(choice)
    wanted -= matching(ignore)
    return [c for c in everything if c.code in wanted]


def explain(one: Check) -> str:
    """Write a check's page as plain text: what it says, when, why, and its settings."""
    page = one.doc
    moment = "before the optimizer steps" if one.when == "gate" else "when a step ends"
    lines = [f"{one.code} {one.name} ({one.severity}, decided {moment})", page.summary]
    for name in _SECTIONS:
        text = getattr(page, name.lower())
        lines += ["", name, *textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="  ")]
    for name in _CODE:
        if code := getattr(page, name.lower()):
            lines += ["", name, *textwrap.indent(code, "  ").splitlines()]
    if one.thresholds:
        lines += ["", "Settings"]
        lines += [f"  {one.code}.{key} = {value}" for key, value in one.thresholds.items()]
    return "\n".join(lines) + "\n"
