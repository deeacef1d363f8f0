"""Several ranks of one run, each with a log of its own.

A step, its calls and its tensors belong to one rank: `seq` and tensor ids begin anew in each
process. So a reader stands at one rank, a `Run` as any other, and what concerns the whole is merged
by (step, rank): the findings, each with its rank in `evidence`, how much was read, what changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import msgspec

from tensortrace.errors import LogError
from tensortrace.records import Finding
from tensortrace.run.folder import newest_log, open_run, rank_files, start_run
from tensortrace.run.run import Run
from tensortrace.text import escape

RANK = "rank"


class Ranks:
    """The ranks of a run that are open; one rank alone is the usual case.

    `runs` has them, lowest first.

    Args:
        runs: one or more, of different ranks.
        unread: a sentence for each log of another rank that cannot be read.

    Raises:
        LogError: two of them are of the same rank, or of as many ranks as the others are not, so
            not of one run.
    """

    def __init__(self, runs: Iterable[Run], unread: Sequence[str] = ()) -> None:
        self.runs = sorted(runs, key=lambda run: run.header.rank)
        self.unread = unread
        for one, other in zip(self.runs, self.runs[1:], strict=False):
            if one.header.rank == other.header.rank:
                names = f"{escape(str(one.path))} and {escape(str(other.path))}"
                raise LogError(
                    f"{names} are both of rank {one.header.rank}, so not of one run: open one"
                )
            if one.header.world_size != other.header.world_size:
                raise LogError(
                    f"{_of_how_many(one)}, {_of_how_many(other)}: open those of one run by their "
                    "names, or move the others away"
                )
        self._merged: tuple[list[list[Finding]], list[Finding]] = ([], [])

    @property
    def beside(self) -> list[Path]:
        """Logs of other ranks that lie beside those that are open."""
        mine = {run.path for run in self.runs}
        found = {path for run in self.runs for path in run.ranks.values()} - mine
        return sorted(found)

    def look_beside(self) -> None:
        """Look again which logs lie beside those that are open."""
        for run in self.runs:
            found = rank_files(run.path)
            if run.path in found.values():
                run.ranks = found

    @property
    def findings(self) -> list[Finding]:
        """Findings of all ranks by (step, rank); where there are several, evidence says `rank`."""
        if len(self.runs) == 1:
            return self.runs[0].findings
        held = [run.findings for run in self.runs]
        if not _same(held, self._merged[0]):
            marked = chain.from_iterable(map(_marked, self.runs, held))
            self._merged = (held, sorted(marked, key=lambda f: (f.step, f.evidence[RANK])))
        return self._merged[1]

    def of(self, finding: Finding) -> Run | None:
        """The run that a finding of `findings` is from; None of a finding of another rank."""
        if len(self.runs) == 1:
            return self.runs[0]
        return next(
            (run for run in self.runs if run.header.rank == finding.evidence.get(RANK)), None
        )

    @property
    def indexed(self) -> float:
        """How much of all logs `index` has read, 0 to 1."""
        return sum(run.indexed for run in self.runs) / len(self.runs)

    def index(self, first: Run, cancelled: Callable[[], bool] | None = None) -> Iterator[float]:
        """Read the rest of all logs, that of one rank first; see `Run.index`."""
        for run in (first, *(run for run in self.runs if run is not first)):
            for _ in run.index(cancelled=cancelled):
                yield self.indexed

    def refresh(self) -> bool:
        """Look at all files again; True if any changed."""
        changed = [run.refresh() for run in self.runs]  # all of them, not up to the first
        return any(changed)

    def close(self) -> None:
        """Close all of them."""
        for run in self.runs:
            run.close()


def _of_how_many(run: Run) -> str:
    return f"{escape(str(run.path))} is of a run of {run.header.world_size} ranks"


def _same(held: list[list[Finding]], before: list[list[Finding]]) -> bool:
    # A run makes a new list when it has found something.
    same = zip(held, before, strict=False)
    return len(held) == len(before) and all(one is other for one, other in same)


def _marked(run: Run, found: list[Finding]) -> list[Finding]:
    rank = run.header.rank
    replace = msgspec.structs.replace
    return [replace(finding, evidence={**finding.evidence, RANK: rank}) for finding in found]


def named_logs(paths: Sequence[Path]) -> list[Path]:
    """Find the logs that a user named, the lowest rank first.

    Args:
        paths: one log; several, of the ranks of one run; a folder, for the newest run in it with
            all its ranks; a name that stands for ``<stem>.rank0.jsonl`` and so on; nothing, for the
            newest run in the working folder.

    Raises:
        LogError: there is no log.
    """
    if len(paths) > 1:
        return list(paths)
    path = paths[0] if paths else Path()
    if not paths or path.is_dir():
        path = newest_log(path)
    elif path.exists() or str(path) == "-":
        return [path]
    ranks = rank_files(path)
    if path.exists() and path not in ranks.values():
        return [path]
    return [found for _, found in sorted(ranks.items())] or [path]


def open_ranks(paths: Sequence[Path], open_one: Callable[[Path], Run] = open_run) -> Ranks:
    """Open all logs of a run; see `named_logs`.

    A rank that has died before its log began leaves a file that is none. Unless it was named, it
    does not keep anybody from the others: `Ranks.unread` says what became of it.

    Args:
        paths: as in `named_logs`.
        open_one: opens one log.

    Raises:
        LogError: a file that was named is no log, or none of them is, or two are of the same rank.
    """
    found = named_logs(paths)
    unread: list[LogError] = []
    with ExitStack() as opened:
        runs = []
        for path in found:
            try:
                runs.append(open_one(path))
            except LogError as error:
                if len(paths) > 1 or len(unread) + 1 == len(found):
                    raise
                unread.append(error)
            else:
                opened.callback(runs[-1].close)
        ranks = Ranks(runs, [f"{error}; the other ranks are shown" for error in unread])
        opened.pop_all()
        return ranks


def start_ranks(paths: Sequence[Path]) -> Ranks:
    """Open all logs of a run for a screen; see `open_ranks` and `start_run`."""
    return open_ranks(paths, start_run)
