"""What a trace says on stderr: findings as they come, warnings once, and one line at the end."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tensortrace.records import Finding
from tensortrace.text import escape, finding_text, shorten

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder


class Notices:
    """Warnings of one trace, each said once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def warn(self, sentence: str) -> None:
        """Say a sentence, unless it was said."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            _say(f"tensortrace: {escape(shorten(sentence, 2000))}")

    def goodbye(self, recorder: Recorder, path: Path | None, decorates: bool) -> None:
        """Say what a run came to, and how to open its log."""
        for pattern in recorder.wanted.matched_nothing():
            self.warn(
                f"modules={pattern!r} matches no module that ran, so it recorded none; "
                "`tensortrace report` lists the paths of a run without modules="
            )
        journal = recorder.journal
        counts = ", ".join(
            f"{n} {severity}{'s' * (n != 1)}" for severity, n in journal.counts.items() if n
        )
        steps = f"{journal.steps} step{'s' * (journal.steps != 1)}"
        line = f"tensortrace: {steps}, {counts or 'nothing found'}"
        if path is not None and journal.writable:
            if _is_there(path):
                line += f"; open with: tensortrace view {_relative(path)}"
            else:
                line += f"; its log is no longer at {_relative(path)}: tensortrace view opens it"
                line += " where it is now"
        if decorates and journal.steps == 1 and recorder.update > 1:
            line += (
                f" ({recorder.update} optimizer steps in 1 step: a decorated call is one step; "
                "decorate what runs once a turn, or call t.step())"
            )
        if recorder.compiled_modules:
            line += (
                f" ({recorder.compiled_modules} compiled modules not visible; "
                'compiled="eager" shows them)'
            )
        _say(line)


def tell(finding: Finding, ranks: tuple[int, int] = (0, 1)) -> None:
    """Say what was found, unless it is a note; and which rank has, if there are several."""
    if finding.severity != "note":
        rank, count = ranks
        _say(f"rank {rank}: " * (count > 1) + finding_text(finding))


def _say(text: str) -> None:
    # stderr may be closed or None: then nobody is there to read it.
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # In one piece: other ranks and threads write there, too.
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _relative(path: Path) -> str:
    try:
        return escape(str(path.resolve().relative_to(Path.cwd())))
    except (ValueError, OSError):
        return escape(str(path))
