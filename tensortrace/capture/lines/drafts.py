"""Source lines in the making: all is known but the statistics of the tensors in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensortrace.records import Line, Location, Variable

if TYPE_CHECKING:
    from tensortrace.capture.lines.reader import Words
    from tensortrace.capture.tensors import TensorDraft

Tell = Callable[["TensorDraft"], str]


class VariableDraft:
    """A variable whose words may hold tensors that are still being measured."""

    __slots__ = ("name", "was", "words")

    def __init__(self, name: str, words: Words, was: Words | None) -> None:
        self.name, self.words, self.was = name, words, was

    def finish(self, tell: Tell) -> Variable:
        """The finished variable; one that was carried over has no ids in this step."""
        words, was = self.words, self.was
        text = words.say(tell)
        before = was.say(tell) if was is not None else None
        if was is words:
            return Variable(self.name, text, before)
        others = words.others if words.tensors else []
        return Variable(self.name, text, before, words.tensors, others)


class LineDraft:
    """One executed line, or the entry, return or exception of a frame; as `records.Line`.

    `first` is the first seq that a call inside it may have, which is its own but for a line in
    which a step began, `end` the first one that none has; `since` is the first seq of the
    executions that were passed over before it.
    """

    __slots__ = (
        "changed", "depth", "end", "first", "flags", "frame", "host_ns", "location", "nth",
        "parent", "passed_over", "seq", "since", "step", "tell", "tensors", "thread", "update",
        "value", "what",
    )  # fmt: skip

    def __init__(self, what: Any, step: int, seq: int, location: Location, tell: Tell) -> None:
        self.what, self.step, self.seq, self.location, self.tell = what, step, seq, location, tell
        self.end = self.first = self.since = seq
        self.update = self.frame = self.depth = self.thread = self.nth = 0
        self.passed_over = self.host_ns = 0
        self.parent: int | None = None
        self.changed: list[VariableDraft] = []
        self.value: VariableDraft | None = None
        self.tensors: list[TensorDraft] = []
        self.flags: list[Any] = []

    def record(self) -> Line:
        """The finished line."""
        tell = self.tell
        return Line(
            step=self.step,
            seq=self.seq,
            update=self.update,
            what=self.what,
            frame=self.frame,
            depth=self.depth,
            parent=self.parent,
            thread=self.thread,
            location=self.location,
            changed=[variable.finish(tell) for variable in self.changed],
            value=self.value.finish(tell) if self.value is not None else None,
            tensors=[draft.record() for draft in self.tensors],
            nth=self.nth,
            passed_over=self.passed_over,
            since=self.since if self.since != self.seq else None,
            host_ns=self.host_ns,
            flags=self.flags,
        )
