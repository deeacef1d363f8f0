"""What a report says, before it is text or JSON: findings in order of cause, a step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from tensortrace.checks import Check
from tensortrace.engine import Engine
from tensortrace.errors import UsageError
from tensortrace.export.layers import Row, is_whole, module_rows
from tensortrace.log import MAX_STEP
from tensortrace.records import SEVERITIES, Finding, Module, Severity, Step

if TYPE_CHECKING:
    from tensortrace.run import Run

# How many of the last steps are looked at one by one for a whole one, before all step lines are.
NEAR = 100


@dataclass(frozen=True, slots=True)
class Found:
    """What the checks found in one run.

    `later` counts by finding id the later steps in which its cause was seen again, `problems` has
    a line for each check that failed. `again` says that the checks ran now, over the saved log.
    """

    findings: list[Finding]
    later: Mapping[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    again: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A finding as it is reported: the same one on several ranks is shown once."""

    finding: Finding
    run: Run
    later: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a report says about the logs of one run, one per rank.

    `step` is the one that `rows` is about, in the log of `table_run`; None if no step holds a
    module. `lacks` says in words what those have not got.
    """

    runs: list[Run]
    found: list[Found]
    shown: list[Shown]
    table_run: Run
    step: int | None
    lacks: str
    rows: list[Row]

    @property
    def whole(self) -> bool:
        """Whether `rows` lack nothing."""
        return self.step is not None and not self.lacks

    @property
    def counts(self) -> dict[Severity, int]:
        """How many findings of each severity are shown."""
        counts = Counter(one.finding.severity for one in self.shown)
        return {severity: counts[severity] for severity in SEVERITIES}


def gather(
    runs: Sequence[Run],
    found: Sequence[Found] | None = None,
    *,
    step: int | None = None,
    modules: Sequence[str] = (),
) -> Contents:
    """Collect what there is to say.

    Args:
        runs: the logs of one run, one per rank; at least one.
        found: one for each of `runs`; what the logs hold by default.
        step: the step of the module table, in the first log; chosen by default.
        modules: globs over module paths that findings and rows must match; all by default.
    Raises:
        UsageError: the run has no such step.
    """
    found = [logged(run) for run in runs] if found is None else list(found)
    shown = _merge(runs, found, modules)
    if step is None:
        table_run, number = _choose_step(runs, shown)
    else:  # of ranks that are not of one length, the first that came so far
        reached = (run for run in runs if run.steps and step <= run.last_step())
        table_run, number = next(reached, runs[0]), step
    if number is None:
        return Contents(list(runs), list(found), shown, table_run, None, "", [])
    worst = _worst_codes([one.finding for one in shown if one.run is table_run], number)
    rows, lacks = module_rows(table_run, number, worst)
    known = table_run.modules
    rows = [row for row in rows if matches(known, row.path, modules)]
    return Contents(list(runs), list(found), shown, table_run, number, lacks, rows)


def step_lines(run: Run, steps: range | None = None) -> Iterator[Step]:
    """Yield every step line of a run, or those of some steps, with bounded memory."""
    # One pass over the log: asking for 200,000 step lines by number took 16 times as long.
    start, stop = (steps.start, steps.stop) if steps is not None else (0, MAX_STEP)
    found = run.records(start, stop, kinds=("step",))
    return (record for record in found if isinstance(record, Step))


def read_to_the_end(run: Run) -> None:
    """Make the modules, sources and findings of a run complete."""
    deque(run.index(), maxlen=0)


def logged(run: Run) -> Found:
    """Take the findings that the log itself holds; reads it to the end."""
    read_to_the_end(run)
    later: Counter[str] = Counter()
    if run.findings:
        for line in step_lines(run):
            later.update(_seen_again(run.findings, line.step, line.repeats))
    return Found(list(run.findings), later)


def _seen_again(findings: Sequence[Finding], step: int, repeats: Mapping[str, int]) -> list[str]:
    """Name the findings of earlier steps that what happened in this one repeats."""
    if not repeats:
        return []
    earlier = {finding.id for finding in findings if finding.step < step}
    return [id for id in repeats if id in earlier]


def found_again(
    run: Run,
    checks: Sequence[Check],
    settings: Mapping[str, Any],
    tick: Callable[[int], None] = lambda step: None,
) -> Found:
    """Run checks over a saved log.

    Args:
        checks: those to run.
        settings: thresholds that differ from the default, ``{"TT201.ratio": 50}``.
        tick: called with the number of each step that was checked, to show progress.
    Raises:
        UsageError: a setting that no check has.
    """
    engine = Engine(checks, settings)
    findings: list[Finding] = []
    later: Counter[str] = Counter()
    read_to_the_end(run)
    for record in run.records():
        findings += engine.feed(record)
        if isinstance(record, Step):
            tick(record.step)
            later.update(_seen_again(findings, record.step, engine.take_repeats()))
    return Found(findings, later, list(engine.problems), again=True)


def order_of_cause(finding: Finding, *, several: bool = False) -> tuple[int, ...]:
    """Sort key: what first made a value non-finite, then the worst, then the earliest.

    Of `several` ranks each counts seqs of its own, but all step their optimizers together, and what
    a forward of one has spoilt comes to the others in backward.
    """
    severity = SEVERITIES.index(finding.severity)
    nonfinite = finding.code.startswith("TT1") and finding.severity != "note"
    first = -1 if nonfinite else severity
    together = (finding.update, int(finding.phase == "backward")) if several else ()
    return (first, finding.step, *together, -1 if finding.seq is None else finding.seq)


# What ends in an overflow: one of these before a non-finite value is likelier its cause than the op
# that met it.
_LEADING_UP = ("TT201", "TT206", "TT303", "TT402", "TT403", "TT404", "TT501", "TT601")


def in_order_of_cause(findings: Iterable[Finding], *, several: bool = False) -> list[Finding]:
    """Sort findings, of one rank or `several`, so that the cause comes first, and notes last.

    That is what first made a value non-finite, then the worst. Where values or gradients had grown
    in an earlier step, it is what was found first, then what came of it.
    """
    ordered = sorted(findings, key=partial(order_of_cause, several=several))
    told = [finding for finding in ordered if finding.severity != "note"]
    if not told or not told[0].code.startswith("TT1"):
        return ordered
    if not any(f.code in _LEADING_UP and f.step < told[0].step for f in told):
        return ordered
    told.sort(key=lambda f: (f.step, -1 if f.seq is None else f.seq))
    return [*told, *ordered[len(told) :]]


def shown_path(modules: Mapping[str, Module], path: str) -> str:
    """Name a module as people do: the better path learnt later, the class for the root."""
    module = modules.get(path)
    if module is None:
        return path or "(root)"
    return (module.alias or path) or module.cls


def tree_labels(modules: Mapping[str, Module], paths: Sequence[str]) -> list[tuple[int, str]]:
    """Name each path under the nearest one above it that holds it, as (depth, label)."""
    labels: list[tuple[int, str]] = []
    above: list[str] = []
    for path in paths:
        while above and above[-1] and not path.startswith(above[-1] + "."):
            above.pop()
        parent = above[-1] if above else ""
        alias = modules[path].alias if path in modules else None
        name = path[len(parent) + 1 :] if parent else shown_path(modules, path)
        labels.append((len(above), alias or name))
        above.append(path)
    return labels


def matches(modules: Mapping[str, Module], path: str | None, globs: Sequence[str]) -> bool:
    """Whether a module path, as written or as shown, matches one of the globs; none match all."""
    if not globs:
        return True
    if path is None:
        return False
    names = (path, shown_path(modules, path))
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def matching_nothing(runs: Sequence[Run], globs: Sequence[str]) -> list[str]:
    """Those globs that no module, parameter or finding of the runs matches; reads to the end.

    Raises:
        UsageError: none of them matches any, so that nothing would be looked at.
    """
    if not globs:
        return []
    for run in runs:
        read_to_the_end(run)
    names = [(run.modules, name) for run in runs for name in _names(run)]
    missed = [
        glob for glob in globs if not any(matches(known, name, [glob]) for known, name in names)
    ]
    if len(missed) < len(globs):
        return missed
    shown = dict.fromkeys(shown_path(known, name) for known, name in names if name in known)
    near = [n for glob in globs for n in get_close_matches(glob, list(shown), n=3, cutoff=0.4)]
    hint = f"Closest: {', '.join(map(repr, dict.fromkeys(near)))}." if near else (
        "" if names else "It has none.")  # fmt: skip
    told = ", ".join(f"--module {glob!r}" for glob in globs)
    verb = "matches" if len(globs) == 1 else "match"
    raise UsageError(f"{told} {verb} no module of the run. {hint}".rstrip())


def _names(run: Run) -> Iterator[str]:
    for path, module in run.modules.items():
        yield path
        yield from (f"{path}.{p.name}" if path else p.name for p in module.parameters)
    for finding in run.findings:  # of a parameter that belongs to no module that ran
        yield from (name for name in (finding.module, finding.param) if name is not None)


def _merge(runs: Sequence[Run], found: Sequence[Found], globs: Sequence[str]) -> list[Shown]:
    groups: dict[tuple[Any, ...], list[tuple[Run, Finding, int]]] = {}
    for run, one in zip(runs, found, strict=True):
        known = run.modules
        for finding in one.findings:
            # A parameter may belong to no module that ran.
            if any(matches(known, name, globs) for name in (finding.module, finding.param)):
                key = (
                    finding.code, finding.severity, finding.step, finding.phase, finding.module,
                    finding.op, finding.param, finding.id if len(runs) == 1 else None,
                )  # fmt: skip
                groups.setdefault(key, []).append((run, finding, one.later.get(finding.id, 0)))
    merged = [
        Shown(group[0][1], group[0][0], max(later for _, _, later in group),
              tuple(dict.fromkeys(run.header.rank for run, _, _ in group)))
        for group in groups.values()
    ]  # fmt: skip
    by_id = {id(one.finding): one for one in merged}
    causes = in_order_of_cause((one.finding for one in merged), several=len(runs) > 1)
    return [by_id[id(finding)] for finding in causes]


def _choose_step(runs: Sequence[Run], shown: Sequence[Shown]) -> tuple[Run, int | None]:
    for one in shown:
        run, number = one.run, one.finding.step
        # In a damaged log a finding can be of a step that the log does not have.
        known = one.finding.severity != "note" and number in run.steps
        if known and is_whole(run.step(number)):
            return run, number
    run = runs[0]
    near = run.steps[-NEAR:]
    shown_of = {n.step: _updates_shown(n) for n in run.summaries(near.start, near.stop)}
    in_order = sorted(near, key=lambda n: (shown_of.get(n, 0), n), reverse=True)
    best = next((number for number in in_order if is_whole(run.step(number))), None)
    if best is not None and shown_of.get(best) == 2:
        return run, best
    # The last may all be of a validation, which updates nothing.
    far = (line for line in step_lines(run) if line.full and line.modules.path)
    last = {_updates_shown(line): line.step for line in far if line.step in run.steps}
    most = max(last, default=-1)
    return run, best if best is not None and shown_of.get(best, 0) >= most else last.get(most)


def _updates_shown(line: Step) -> int:
    """How much of an update a step has: 2 is one of a module that ran in it, 1 is of another."""
    columns = line.modules
    updated = [ratio is not None for ratio in columns.update_ratio]
    ran = [rms is not None for rms in columns.output_rms]
    return any(updated) + any(a and b for a, b in zip(updated, ran, strict=False))


def _worst_codes(findings: Sequence[Finding], number: int) -> dict[str, str]:
    here = [f for f in findings if f.step == number and f.module is not None]
    here.sort(key=order_of_cause, reverse=True)
    return {f.module: f.code for f in here if f.module is not None and f.severity != "note"}
