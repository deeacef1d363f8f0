"""The logs of a folder: the newest one, and the ranks of one run."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tensortrace.errors import LogError, NoLogYetError
from tensortrace.log import LogFile, open_log, start_log, starts_like_a_log
from tensortrace.records import Header
from tensortrace.run.run import Run
from tensortrace.text import escape

_PACKED = re.compile(r"\.(?:gz|zst)$")
_RANK = re.compile(r"(.*)\.rank(\d{1,6})(\.jsonl(?:\.gz|\.zst)?)")


def rank_files(path: Path) -> dict[int, Path]:
    """List by rank the logs that lie beside `path` under the same stem."""
    own = _RANK.fullmatch(path.name)
    stem = own[1] if own else _PACKED.sub("", path.name).removesuffix(".jsonl")
    try:
        names = sorted(os.listdir(path.parent))  # noqa: PTH208 - names, not paths
    except OSError:
        return {}
    found = ((match, name) for name in names if (match := _RANK.fullmatch(name)))
    return {int(match[2]): path.parent / name for match, name in found if match[1] == stem}


def open_run(
    path: str | Path, progress: Callable[[float], object] | None = None, *, index: bool = True
) -> Run:
    """Open a log, plain or compressed (``.gz``, ``.zst``), a pipe, or ``-`` for standard input.

    Where ``log.jsonl`` does not exist but ``log.rank0.jsonl`` does, the lowest rank is opened.

    Args:
        path: the log.
        progress: told the share of a compressed log that is unpacked, while it is waited for.
        index: whether to read through all of it, a second or two for a gigabyte: without it
            `Run.findings`, `modules` and `sources` are not complete until `Run.index` was.

    Raises:
        LogError: it is no log, or not one this version reads; one sentence says what it is.
    """
    path, ranks = _find(Path(path))
    run = _made(path, ranks, *open_log(path, progress))
    if index:
        deque(run.index(), maxlen=0)
    return run


def start_run(path: str | Path) -> Run:
    """As `open_run`, but nothing is waited for: a compressed log or a pipe is unpacked beside.

    For a screen, which shows what is there already, and more after `Run.refresh` and `Run.index`.
    `Run.unpacked` and `Run.indexed` say how much that is.
    """
    path, ranks = _find(Path(path))
    return _made(path, ranks, *start_log(path))


def _find(path: Path) -> tuple[Path, dict[int, Path]]:
    ranks = {} if str(path) == "-" else rank_files(path)
    return (ranks[min(ranks)] if ranks and not path.exists() else path), ranks


def _made(path: Path, ranks: dict[int, Path], file: LogFile, header: Header) -> Run:
    run = Run(path, file, header)
    run.ranks = ranks if path in ranks.values() else {header.rank: path}
    return run


def newest_log(folder: str | Path = ".") -> Path:
    """Find the newest tensortrace log in a folder; of several ranks the lowest.

    Raises:
        LogError: there is none.
    """
    name = escape(str(folder))
    try:
        paths = [p for p in Path(folder).iterdir() if ".jsonl" in p.suffixes and p.is_file()]
        by_age = sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True)
    except OSError as err:
        raise LogError(f"cannot look for logs in {name}: {err.strerror}") from err
    for path in by_age:
        if starts_like_a_log(path):
            ranks = rank_files(path) if _RANK.fullmatch(path.name) else {}
            return ranks[min(ranks)] if ranks else path
    raise NoLogYetError(f"there is no tensortrace log in {name}: give its path")
