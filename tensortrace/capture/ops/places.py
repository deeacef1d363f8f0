"""Ops in loops outside modules: which of their executions are recorded.

An op that is called again and again in one step from one place is recorded like a source line that
runs over and over: the first three times, then at powers of two (`turns` has the rule), and
where lines are followed in the executions of its line that are recorded, too. The others are
counted, but for those with news: another shape or dtype, a NaN or infinity, an exception. Never
passed over is an op that writes in place, for its inputs would have to be described before, one
whose output requires grad, and one whose output cannot be asked at once whether it is finite.

Hot: `Places.find`, `Place.takes` and `Place.repeats` are all that an op costs that is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensortrace.capture import compiled
from tensortrace.capture.active import here
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.ops.names import REVERSED
from tensortrace.capture.source import SourceLines
from tensortrace.capture.stats.queue import StatsQueue, summarize
from tensortrace.capture.tensors import LARGEST_WITHOUT_GRAD, versions_of
from tensortrace.capture.turns import is_taken
from tensortrace.records import Location

if TYPE_CHECKING:
    from tensortrace.capture.lines.frames import FrameTrace

_WRITES = frozenset((
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
))  # fmt: skip
# These change running statistics, which no version tells.
_WRITES_UNSEEN = ("batch_norm", "instance_norm")

Outline = tuple[tuple[torch.Size, torch.dtype], ...]
_Key = tuple[str, int, "int | None"]


def writes(name: str) -> bool:
    """Whether a function of torch's changes its first argument, by its name."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


_HOT = ("_dtype", "_is_bad", "_line", "_outline", "_shape", "_step", "_turns", "runs")
_OWN = (
    "checked", "has_turned", "is_compiled", "is_generated", "is_own", "location", "reverses",
    "writes",
)  # fmt: skip
# The modules that inductor writes are called after the one that loads them.
_GENERATED = "torch._inductor."
_CALL = nn.Module._wrapped_call_impl.__code__


class Place(compiled.base_of("Place", _HOT)):  # type: ignore[misc] # compiled where it can be
    """What one place in the user's code calls, and how that went in the step in flight.

    Args:
        location: its line.
        is_own: whether that is in no installed package; else it has another caller each time.
        writes: whether what is called there changes what it is given.
        reverses: whether it gets its right operand first.

    Attributes:
        is_compiled: whether a module does it that is compiled in place.
        is_generated: whether code does it that a compiler wrote: the kernels that it runs besides,
            nobody sees.
    """

    __slots__ = tuple(_OWN)

    def __init__(
        self, location: Location | None, is_own: bool, writes: bool, reverses: bool
    ) -> None:
        self.location, self.is_own, self.writes = location, is_own, writes
        self.reverses, self.is_compiled, self.is_generated = reverses, False, False
        # Whether its inputs were compared, before and after, so that `writes` is right.
        self.checked = writes
        self._step = self._line = -1
        self.runs = self._turns = 0
        # Of the last execution with news: whether it was the first with that.
        self.has_turned = False
        self._is_bad = False
        # Of what came out last: None where nothing is passed over.
        self._outline: Outline | None = None
        # Of the one plain tensor that most ops make.
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None

    def takes(self, step: int, line: FrameTrace | None) -> bool:
        """Count an execution; returns whether it is recorded, whatever comes out of it. Hot.

        Args:
            step: in flight.
            line: the frame whose lines are recorded that it happens in.
        """
        if self._step != step:
            self._step, self._line, self.runs, self._turns = step, -1, 0, 0
            self._outline = self._shape = None
            self._is_bad = False
        self.runs += 1
        if line is not None and self._line != line.began:
            self._line, self._turns = line.began, 0
        self._turns = turn = self._turns + 1
        if self._outline is None:
            return True
        return (line is None or line.recorded) and is_taken(turn - 1)

    def learn(self, outputs: list[tuple[str, torch.Tensor]], queue: StatsQueue) -> None:
        """Remember what came out of an execution that is recorded."""
        self._shape = None
        self._outline = _outline(outputs) if self.checked and not self.writes else None
        if self._outline is not None and len(self._outline) == 1 and queue.measures:
            shape, dtype = self._outline[0]
            if shape.numel() <= LARGEST_WITHOUT_GRAD:
                self._shape, self._dtype = shape, dtype

    def repeats(self, result: Any, queue: StatsQueue) -> bool:
        """Whether a result is one like that before, of which nothing needs to be said. Hot."""
        if self._shape is not None and not self._is_bad:
            kernel = compiled.kernel
            if kernel is not None and kernel.is_quiet(result, self._shape, self._dtype):
                return True
        outputs = outputs_of(result)
        outline = _outline(outputs)
        self.has_turned = outline is None or outline != self._outline
        if self.has_turned:
            return False
        finite = [_is_finite(tensor, queue) for _, tensor in outputs]
        if None in finite:
            self._outline = self._shape = None  # nobody can tell: all are recorded
            return False
        was_bad, self._is_bad = self._is_bad, False in finite
        self.has_turned = was_bad != self._is_bad
        return not self._is_bad and not was_bad


class Places:
    """The places of a run.

    Args:
        sources: tells the user's frames from others.
    """

    def __init__(self, sources: SourceLines) -> None:
        self._sources = sources
        # Those of the function that was met last: in a loop it is the next one, too.
        self._last: tuple[CodeType | None, dict[_Key, Place]] = (None, {})
        # Told of a module that is compiled in place, when it was called.
        self.met_compiled: Callable[[nn.Module], None] = lambda module: None

    def find(self, name: str, frame: FrameType) -> Place:
        """The place that calls a function of torch's of this name. Hot.

        Args:
            name: of the function.
            frame: that called torch, or that of torch's which did it for the user's.
        """
        code, places = self._last
        if frame.f_code is not code:
            frame = self._sources.user_frame(frame) or frame
            code = frame.f_code
            places = self._sources.code_of(code).places
            self._last = code, places
        # What a function of the user's does is told apart by where it was called, too: a helper
        # that many lines call is no loop.
        around = frame.f_back
        key = name, frame.f_lasti, around.f_lasti if around is not None else None
        return places.get(key) or self._meet(places, key, frame)

    def _meet(self, places: dict[_Key, Place], key: _Key, user: FrameType) -> Place:
        location, is_own = self._sources.locate_place(user)
        changes = writes(key[0]) or any(part in key[0] for part in _WRITES_UNSEEN)
        place = places[key] = Place(location, is_own, changes, key[0] in REVERSED)
        name = user.f_globals.get("__name__")
        place.is_generated = type(name) is str and name.startswith(_GENERATED)
        module = compiled_around(user)
        if module is not None:
            place.is_compiled = True
            if not here.stack:
                self.met_compiled(module)
        return place


def compiled_around(frame: FrameType) -> nn.Module | None:
    """The module compiled in place that a frame is inside of, which may be of its own code."""
    above: FrameType | None = frame
    while above is not None:
        if above.f_code is _CALL:
            module: nn.Module = above.f_locals["self"]
            if module._compiled_call_impl is not None:
                return module
        above = above.f_back
    return None


def outputs_of(result: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors that came out of an op or a module, by name. Hot."""
    if isinstance(result, torch.Tensor):
        return [("output[0]", result)]
    return tensors_in(result if isinstance(result, (tuple, list)) else (result,), "output")


def versions_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """How often each tensor that an op is given was changed, so that it can be asked again."""
    return versions_of([tensor for _, tensor in tensors_in((*args, *kwargs.values()), "")])


def _outline(outputs: list[tuple[str, torch.Tensor]]) -> Outline | None:
    """Shapes and dtypes; None where there is more to say of an output than these."""
    if any(type(tensor) not in compiled.EXACT or tensor.requires_grad for _, tensor in outputs):
        return None
    try:
        return tuple((tensor.shape, tensor.dtype) for _, tensor in outputs)
    except RuntimeError:
        return None  # nested


def _is_finite(tensor: torch.Tensor, queue: StatsQueue) -> bool | None:
    """Whether a tensor holds no NaN and no infinity; None where only its device knows."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if not queue.measures or (
        tensor.numel() > LARGEST_WITHOUT_GRAD and not torch.is_grad_enabled()
    ):
        return True  # nobody would know of a recorded one either
    if tensor.device.type != "cpu":
        return None
    kernel = compiled.kernel
    quiet = kernel.is_quiet(tensor, tensor.shape, tensor.dtype) if kernel is not None else None
    if quiet is not None:
        return bool(quiet)
    found = queue.look(tensor, -1)
    stats = summarize(tensor) if found is None else found[1]
    if stats[9] is not None:
        return None
    return not any(stats[:3])
