"""Runs checks over records, live or from a saved log.

It is fed the records in log order and decides at gates (`optimizer` lines, `action` lines named
"gate") and when a `step` line closes a step.

What checks need of every step is in its actions, optimizers and step line. After the first steps of
a thinned run they look at the calls and parameters of one step in ten, past step 1000 of one in
fifty, and of the next with an update where not every step has one; those of the other steps are put
aside, and looked at after all if anything in the step is not finite or an exception ends it. So a
fault that builds up is found some steps later, a NaN at once; and a live run need not finish the
records that nobody looks at.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import msgspec
from msgspec import structs

from tensortrace.checks import Check, Draft, Rule, When, all_checks, closest
from tensortrace.errors import UsageError
from tensortrace.records import (
    SEVERITIES,
    Action,
    Call,
    Finding,
    Header,
    Line,
    Location,
    Module,
    Optimizer,
    Param,
    Record,
    Severity,
    Source,
    Step,
    Tensor,
)
from tensortrace.signal_handlers import is_of_handler
from tensortrace.step_view import UPDATED, StepView, finite, is_damage
from tensortrace.text import is_installed

# Design "Steps": a step is flushed in parts after this many records, so this much is held here too.
HELD = 20_000
# Findings of one code and severity in one run; what comes after is counted under the last of them.
FINDINGS_PER_CODE = 50
# Of a thinned run the calls of the first steps are looked at, then those of one step in so many,
# and from `LATE` on of one in more: of an LSTM looks were a third of what tracing cost by then.
CLOSELY = 20
SELDOM = 10
LATE = 1000
RARELY = 50
_NOTHING = frozenset[str]()
_CALLS = frozenset({"calls"})
_FULL = frozenset({"full"})
_INNER = frozenset({"inner"})
# When checks are asked: at each gate, as a step ends, and as a full one does; those of a gate too,
# first, since a step that ends is one.
_Moment = Literal["gate", "step", "full"]
_ASKED: dict[_Moment, tuple[tuple[When, ...], ...]] = {
    "gate": (("gate",),), "step": (("gate",), ("step",)), "full": (("gate",), ("step", "full")),
}  # fmt: skip
_Asked = tuple[Check, Rule, dict[str, Any], dict[str, Any]]


class Engine:
    """Run checks over records, live or from a saved log, and find the same in both.

    A check that raises is not run again; `problems` has one line for each. Findings and step lines
    of earlier runs of the engine that come with a saved log are not looked at.

    Args:
        checks: those to run; `all_checks()` by default.
        settings: ``{"TT201.ratio": 50}``; an unknown name is a `UsageError`.
    """

    def __init__(
        self, checks: Iterable[Check] | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        chosen = all_checks() if checks is None else list(checks)
        self.problems: list[str] = []
        self._thresholds = _configure(chosen, settings or {})
        self._checks = _in_order(chosen)
        # By moment and by what a step has: the checks to ask, each with its memory and thresholds.
        self._running: dict[tuple[_Moment, frozenset[str]], list[_Asked]] = {}
        self._tags = _tags(self._checks)
        # What `Check.since` and `Check.until` name: as far as no step has had it yet, and what some
        # step has had.
        self._awaited = {tag for c in self._checks for tag in c.since + c.until}
        self._met: set[str] = set()
        self._shared: dict[str, Any] = {}
        self._memory: dict[str, dict[str, Any]] = {c.code: {} for c in self._checks}
        self._modules: dict[str, Module] = {}
        self._sources: dict[str, list[Source]] = {}
        self._findings: list[Finding] = []
        self._reported: dict[tuple[Any, ...], Finding] = {}
        self._placed: dict[tuple[Any, ...], dict[str, Finding]] = {}
        self._counts: Counter[str] = Counter()
        self._last: dict[tuple[str, Severity], tuple[int, str]] = {}
        self._repeats: Counter[str] = Counter()
        self._step: StepView | None = None
        self._closed: Step | None = None
        self._late: list[Finding] = []
        self._every = self._world_size = 1
        # By optimizer: the last step with an update, and how many steps after the one before.
        self._rhythms: dict[int, tuple[int, int]] = {}
        # The quiet calls and parameters of the step in flight; None while all are looked at.
        self._aside: list[Call | Param] | None = None
        self._poisoned: str | None = None
        # The last steps that are over with an update, one left out, and a finite loss.
        self._updated: deque[int] = deque(maxlen=UPDATED)
        self._skipped = self._healthy = -1

    def looks_at(self, step: int) -> bool:
        """Whether the calls of a step are looked at even if all in it is finite. Hot."""
        stride = SELDOM if step < LATE else RARELY
        if step < CLOSELY or step % stride == 0 or step % self._every == 0:
            return True
        return self.brings_update(step, stride)

    def brings_update(self, step: int, stride: int) -> bool:
        """Whether a step is the first with an update since one in so many. Hot.

        Where gradients accumulate over four steps, none whose number ten divides may have the
        update: parameters would never be looked at. False of an optimizer that always steps.

        Args:
            step: that is about to begin.
            stride: the distance of the steps that are looked at in any case.
        """
        for last, apart in self._rhythms.values():
            if apart > 1 and step % stride < apart and (step - last) % apart == 0:
                return True
        return False

    def feed(self, record: Record) -> list[Finding]:
        """Take the next record in log order; returns what became certain with it."""
        # Hot path: runs for every record of a live run.
        kind = type(record)
        if kind is Call:
            return self._take_call(record)  # type: ignore[arg-type]
        if kind is Module:
            self._take_module(record)  # type: ignore[arg-type]
        elif kind is Source:
            self._sources.setdefault(record.file, []).append(record)  # type: ignore[arg-type,attr-defined]
        elif kind is Line:
            # A check looks at no line, but at tensors that a line was the first to meet.
            for tensor in record.tensors:  # type: ignore[attr-defined]
                _describe(self._view(record.step), tensor)
        elif kind is Action:
            return self._take_action(record)  # type: ignore[arg-type]
        elif kind is Optimizer:
            return self._take_optimizer(record)  # type: ignore[arg-type]
        elif kind is Step:
            return self._close(record)  # type: ignore[arg-type]
        elif kind is Param:
            return self._take_values(record)  # type: ignore[arg-type]
        elif kind is Header:
            self._every = _every(record)  # type: ignore[arg-type]
            self._world_size = record.world_size  # type: ignore[attr-defined]
        return []

    @property
    def step_in_flight(self) -> StepView | None:
        """The step as far as it has been fed; None between steps."""
        return self._step

    def take_repeats(self) -> dict[str, int]:
        """Hand over, by finding id, what was only counted since the last call."""
        repeats, self._repeats = dict(self._repeats), Counter()
        return repeats

    def _take_module(self, module: Module) -> None:
        before = self._modules.get(module.path)
        if before is not None and before.training and not module.training:
            self._view(module.step).evaluated.add(module.path)
        if before is not None:
            required = self._view(module.step).required.setdefault(module.path, set())
            required.update(p.name for p in before.parameters if p.requires_grad)
        self._modules[module.path] = module
        if module.frozen:
            self._meet(self._view(module.step), "frozen")
        if module.places:
            self._meet(self._view(module.step), "repeated")

    def _view(self, number: int) -> StepView:
        step = self._step
        if step is None or step.number != number:
            self._look_at_late_lines()
            aside: list[Call | Param] | None = None if self.looks_at(number) else []
            step = StepView(number, modules=self._modules, findings=self._findings,
                            poisoned=self._poisoned, trained=tuple(self._updated),
                            skipped=self._skipped, healthy=self._healthy,
                            world_size=self._world_size, before=self._closed,
                            has=_CALLS if aside is None else _NOTHING,
                            shared=self._shared)  # fmt: skip
            self._step, self._aside = step, aside
        return step

    def _look_at_late_lines(self) -> None:
        """Look at calls that a log has only after the line of their step.

        They were written when the step after it went wrong; the live run saw them in time.
        """
        step, closed = self._step, self._closed
        if step is None or closed is None or step.number != closed.step or self._aside is not None:
            return
        step.summary = closed
        self._late = self._run(step, "gate")

    def attend(self) -> None:
        """Look at the calls of the step in flight: not all is finite, and no record says so yet."""
        if self._step is not None:
            self._look_at(self._step)

    def _look_at(self, step: StepView) -> None:
        aside, self._aside = self._aside or (), None
        step.has |= _CALLS
        for earlier in aside:
            _file(step, earlier)

    def _take_call(self, call: Call) -> list[Finding]:
        """As the others, of what most records are. Hot."""
        step = self._of(call)
        if self._aside is not None or call.replay:
            return self._take_values(call)
        _file(step, call)
        return self._gate(step) if len(step.calls) >= 2 * HELD else []

    def _of(self, record: Call | Param | Optimizer | Action | Step) -> StepView:
        """The step that a record belongs to. Hot."""
        step = self._step
        if step is None or step.number != record.step:
            step = self._view(record.step)
        step.update = max(step.update, record.update)
        return step

    def _take_values(self, record: Call | Param) -> list[Finding]:
        step = self._of(record)
        if self._aside is not None and not is_quiet(record):
            self._look_at(step)
        if self._aside is None:
            _file(step, record)
        else:
            self._aside.append(record)
            del self._aside[: -2 * HELD]
        # Without a gate nothing would ever be let go.
        return self._gate(step) if len(step.calls) >= 2 * HELD else []

    def _take_action(self, action: Action) -> list[Finding]:
        step, found = self._of(action), list[Finding]()
        if self._aside is not None and not is_quiet(action):
            self._look_at(step)
        step.actions.append(action)
        name = action.action
        if name == "loss":
            step.losses.append(action)
        elif name == "load_state_dict":
            # What was called before it had the weights that were spoilt.
            found = self._gate(step) if step.poisoned else []
            self._poisoned = step.poisoned = None
        for key, tag in self._tags.get(name, ()):
            if key is None or key in action.detail:
                self._meet(step, tag)
        return self._gate(step) if name in ("gate", "exception") else found

    def _take_optimizer(self, optimizer: Optimizer) -> list[Finding]:
        step = self._of(optimizer)
        if self._aside is not None and not is_quiet(optimizer):
            self._look_at(step)
        step.optimizers.append(optimizer)
        if not optimizer.skipped:
            step.taken.append(optimizer)
        if optimizer.parameters is not None or optimizer.eps:
            self._meet(step, "holds")
        self._keep_time(optimizer)
        found = self._gate(step)
        if not optimizer.skipped and not finite(step.norm_of(optimizer)):
            # From the findings of the run, not of the step: a thinned step has no calls to
            # meet a known cause in, and must poison all the same.
            errors = [f.id for f in self._findings if is_damage(f)]
            self._poisoned = step.poisoned = errors[-1] if errors else None
        return found

    def _meet(self, step: StepView, tag: str) -> None:
        """Note that a step has what some check asks for."""
        step.has |= {tag}
        if tag in self._awaited:
            self._awaited.remove(tag)
            self._met.add(tag)
            self._running = {}

    def _close(self, record: Step) -> list[Finding]:
        step = self._of(record)
        step.summary, self._step, self._closed = record, None, record
        if record.full:
            step.has |= _FULL
        if not record.rested:
            step.has |= _INNER
        found = self._run(step, "full" if record.full else "step")
        self._note_health(step)
        # An optimizer may have taken what is told only now.
        spoilt = any(not finite(step.norm_of(o)) for o in step.taken)
        by_hand = step.wrote_by_hand()
        if spoilt or by_hand:
            written = [f.id for f in found if f.severity == "error" and is_damage(f)]
            cause = written[0] if written else step.blamed() if by_hand else None
            self._poisoned = self._poisoned or cause
        self._poisoned = self._poisoned or self._moved_by(step)
        return found

    def _moved_by(self, step: StepView) -> str | None:
        """The error that an optimizer took which evaluates its closure more than once.

        The norm in its record is of the first evaluation: a later one may have met what was bad.
        """
        if not step.params:
            return None
        begun = {o.index: o.seq for o in step.taken}
        inside = [(begun[p.optimizer], p.seq) for p in step.params if p.optimizer in begun]
        spoilt = any(not finite(p.update_norm) for p in step.params) or any(
            start < a.seq < end for a in step.losses
            if not finite(a.detail.get("value")) for start, end in inside
        )  # fmt: skip
        errors = (f.id for f in reversed(self._findings) if is_damage(f))
        return next(errors, None) if spoilt else None

    def _note_health(self, step: StepView) -> None:
        if step.taken:
            self._updated.append(step.number)
        if len(step.taken) < len(step.optimizers):
            self._skipped = step.number
        if step.losses and all(finite(loss.detail.get("value")) for loss in step.losses):
            self._healthy = step.number

    def _keep_time(self, optimizer: Optimizer) -> None:
        last, _ = self._rhythms.get(optimizer.index, (optimizer.step - 1, 1))
        if optimizer.step > last and not optimizer.skipped:
            self._rhythms[optimizer.index] = optimizer.step, optimizer.step - last

    def _gate(self, step: StepView) -> list[Finding]:
        # Of a step that is put aside all is finite so far: nothing that cannot wait for its end.
        found = self._run(step, "gate") if self._aside is None else []
        if len(step.calls) > HELD:
            step.calls.clear()
        for records in (step.params, step.actions, step.optimizers, step.bad, step.replayed):
            if len(records) > HELD:
                del records[:-HELD]
                step.losses = [a for a in step.actions if a.action == "loss"]
                step.taken = [o for o in step.optimizers if not o.skipped]
        if len(step.tensors) > 2 * HELD:
            for old in list(step.tensors)[: -2 * HELD]:
                del step.tensors[old]
        step.fresh = len(step.calls)
        return found

    def _run(self, step: StepView, moment: _Moment) -> list[Finding]:
        """Ask the checks of a moment what they find in a step. Hot."""
        found, self._late = self._late, []
        asked = self._running.get((moment, step.has))
        if asked is None:
            asked = self._running[moment, step.has] = self._asked(moment, step.has)
        for one, rule, memory, thresholds in asked:
            try:
                for draft in rule(step, memory, **thresholds):
                    found += self._judge(one, step, draft)
            except Exception as error:
                if is_of_handler(error):
                    raise
                self._checks.remove(one)
                self._running = {}
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.problems.append(
                    f"check {one.code} {one.name} stopped at step {step.number}: "
                    f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
                )
        return found

    def _asked(self, moment: _Moment, has: frozenset[str]) -> list[_Asked]:
        """List the checks to ask of a step at a moment, by what it has."""
        return [
            (c, c.rule, self._memory[c.code], self._thresholds[c.code])
            for when in _ASKED[moment] for c in self._checks
            if c.when in when and self._met.isdisjoint(c.until) and (
                not (c.of or c.since)
                or not has.isdisjoint(c.of)
                or not self._met.isdisjoint(c.since)
            )
        ]  # fmt: skip

    def _judge(self, one: Check, step: StepView, draft: Draft) -> list[Finding]:
        """Make a finding of a draft, or only count it."""
        if draft.follows is not None:
            self._repeats[draft.follows] += 1
            met = (f for f in reversed(self._findings) if f.id == draft.follows)
            if (earlier := next(met, None)) is not None and earlier not in step.causes:
                step.causes.append(earlier)
            return []
        severity = draft.severity or one.severity
        key = (one.code, draft.cause or (draft.module, draft.op, draft.param))
        placed = self._placed.setdefault(key, {}) if draft.place else {}
        earlier = placed.get(draft.place) if placed else self._reported.get(key)
        if earlier and SEVERITIES.index(severity) >= SEVERITIES.index(earlier.severity):
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
            location=self._with_code(_with_caller(step, draft)),
            chain=tuple(
                structs.replace(link, location=self._with_code(link.location))
                for link in draft.chain
            ),
        )
        finding = _finding(one, step, draft, f"{one.code}-{self._counts[one.code]}")
        self._last[one.code, severity] = (count + 1, finding.id)
        self._reported[key] = finding
        if draft.place:
            placed[draft.place] = finding
        self._findings.append(finding)
        if one.code == "TT104" and severity == "error":
            self._poisoned = self._poisoned or finding.id
        step.causes.append(finding)
        return [finding]

    def _with_code(self, location: Location | None) -> Location | None:
        """Add the text of a line and of its caller, if their functions were stored."""
        if location is not None and location.caller is not None:
            location = structs.replace(location, caller=self._with_code(location.caller))
        if location is None or location.code is not None:
            return location
        for source in self._sources.get(location.file, ()):
            code = source.line(location.line)
            if code is not None:
                return structs.replace(location, code=code.strip()[:200])
        return location


def is_quiet(record: Record) -> bool:
    """Tell whether all in a record is finite: no reason to look at the calls of its step. Hot."""
    kind = type(record)
    if kind is Call:
        call: Call = record  # type: ignore[assignment]
        return (
            not call.replay
            and call.exception is None
            and not any(t.nonfinite for t in call.tensors)
        )
    if kind is Param:
        param: Param = record  # type: ignore[assignment]
        tensors = [param.value] if param.grad is None else [param.value, param.grad]
        return finite(param.update_norm) and not any(t.nonfinite for t in tensors)
    if kind is Action:
        action: Action = record  # type: ignore[assignment]
        detail = action.detail
        return (
            action.action != "exception"
            and finite(detail.get("value"))
            and finite(detail.get("total_norm"))
        )
    return kind is not Optimizer or finite(record.grad_norm)  # type: ignore[attr-defined]


def _every(header: Header) -> int:
    """How many steps apart those are that are full because somebody said so by hand."""
    if header.options.get("steps") is not None:
        return 1
    every = header.options.get("every", "auto")
    if every == "auto":
        return RARELY  # all its full steps after the first are looked at anyway
    return every if type(every) is int and every > 0 else 1


def _file(step: StepView, record: Call | Param) -> None:
    if isinstance(record, Param):
        step.params.append(record)
        _describe(step, record.value)
        if record.grad is not None:
            _describe(step, record.grad)
    elif record.replay:
        step.replayed.append(record)
        step.tensors.update((tensor.id, tensor) for tensor in record.tensors)
    else:
        step.calls.append(record)
        known, bad = step.tensors, step.bad
        for tensor in record.tensors:
            known[tensor.id] = tensor
            if tensor.nan or tensor.posinf or tensor.neginf:
                bad.append(tensor.id)


def _describe(step: StepView, tensor: Tensor) -> None:
    step.tensors[tensor.id] = tensor
    if tensor.nonfinite:
        step.bad.append(tensor.id)


def _with_caller(step: StepView, draft: Draft) -> Location | None:
    """The place of a draft, with the user's own line that led to it if it is in a package."""
    location = draft.location
    if location is None or location.caller is not None or not is_installed(location.file):
        return location
    return structs.replace(location, caller=step.caller(draft.seq))


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


def _tags(checks: Iterable[Check]) -> dict[str, list[tuple[str | None, str]]]:
    """List, by action, what checks ask for: the action itself, or a key that its detail has."""
    tags: dict[str, list[tuple[str | None, str]]] = {}
    for tag in sorted({tag for c in checks for tag in c.of + c.since + c.until}):
        action, _, key = tag.partition(".")
        tags.setdefault(action, []).append((key or None, tag))
    return tags


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
            page = prefix if code in known else "CHECK"
            raise UsageError(f"no setting named {name!r}.{closest(name, names, page)}")
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
    if isinstance(cast, float) and math.isnan(cast):  # nothing is above or below it
        raise UsageError(f"{name} is {value!r}, which no value can reach (default {default!r}).")
    if isinstance(cast, float | int) and cast < 0 <= default:
        raise UsageError(f"{name} is {value!r}, below 0 (default {default!r}).")
    return cast
