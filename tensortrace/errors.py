"""The errors that a user of tensortrace can meet.

TensortraceError
├── UsageError          an option or argument that makes no sense; the command line exits with 2
├── LogError            a file that cannot be read as a log
│   └── NoLogYetError   it may be one soon: it is not there, or nothing was written to it
└── TraceStoppedError   ``stop_on`` met what it was told to stop on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensortrace.records import Finding


class TensortraceError(Exception):
    """Base of every error that tensortrace raises on purpose."""


class UsageError(TensortraceError):
    """An option, path or name that cannot be what was meant; says what to write instead."""


class LogError(TensortraceError):
    """A file that is not a log, or not one that this version reads; says what it is."""


class NoLogYetError(LogError):
    """A place where nothing was recorded so far: whoever follows a run waits for it."""


class TraceStoppedError(TensortraceError):
    """Raised in the user's program when ``stop_on`` meets a finding, before the weights move.

    Args:
        finding: what was found; its text is the message.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.code} {finding.message}")
        self.finding = finding
