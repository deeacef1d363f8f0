"""The options of `lines=`: what PySnooper and TorchSnooper take, and three of our own."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, TypeAlias, TypeVar

from tensortrace.errors import UsageError

Output: TypeAlias = Any
CustomRepr: TypeAlias = tuple[tuple[type | Callable[[Any], bool], Callable[[Any], str]], ...]

T = TypeVar("T")
STREAMS = ("stderr", "stdout")
_FLAGS = ("overwrite", "thread_info", "normalize", "relative_time", "statistics", "thin")


def _refusing_strangers(cls: type[T]) -> type[T]:
    """Let a class say in one sentence which option it does not have."""
    make: Any = cls.__init__

    @wraps(make)
    def init(self: Any, *positional: Any, **options: Any) -> None:
        if positional:
            raise UsageError(
                f"Lines() takes options by name, as in Lines(depth=2): got {positional[0]!r:.80}"
            )
        _check_names(options)
        make(self, **options)

    setattr(cls, "__init__", init)  # noqa: B010 mypy lets nobody assign it
    return cls


@_refusing_strangers
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """How source lines are recorded, and whether they are told while they run.

    Those up to `color` mean what they mean in ``pysnooper.snoop``, but for `output`, whose None is
    stderr there, and `depth`, which counts every frame there. All but `depth`, `watch`,
    `watch_explode`, `custom_repr`, `max_variable_length`, `normalize` and `thin` are about the live
    text only.

    Args:
        output: where the live text goes: None for nowhere, "stderr", "stdout", a path, an open text
            file, or a callable that gets each text.
        depth: how many frames of yours deep, 1 being the function or block itself. Frames of torch,
            of the standard library and of installed packages are skipped and not counted.
        watch: expressions such as "self.weight.grad" that are followed like variables.
        watch_explode: expressions whose attributes, keys or items are followed each; or one of
            PySnooper's ``Attrs``, ``Keys``, ``Indices``, ``Exploding``.
        prefix: what each line of text begins with.
        overwrite: whether a path is written anew.
        thread_info: whether each line says which thread ran it.
        custom_repr: pairs of a type, or a function that says whether it is meant, and what makes a
            text of such a value. One pair alone is fine.
        max_variable_length: texts are cut to so many characters, in the middle; None for no limit.
        normalize: whether times and addresses are left out, so that two texts can be compared;
            addresses in the log, too.
        relative_time: whether times count from the start of the function.
        color: whether text has colours; None for on a terminal.
        statistics: whether the text of a tensor has its mean and std. The log has them anyway.
        thin: whether a line that runs over and over is recorded at its first three executions, then
            at powers of two and wherever a shape changes. False records them all, and with them
            all ops outside modules, which are thinned alike.

    Raises:
        UsageError: an option that does not exist or makes no sense.
    """

    output: Output = None
    depth: int = 1
    watch: tuple[Any, ...] = ()
    watch_explode: tuple[Any, ...] = ()
    prefix: str = ""
    overwrite: bool = False
    thread_info: bool = False
    custom_repr: CustomRepr = ()
    max_variable_length: int | None = 100
    normalize: bool = False
    relative_time: bool = False
    color: bool | None = None
    statistics: bool = False
    thin: bool = True

    def __post_init__(self) -> None:
        _check_output(self.output, self.overwrite)
        for name in ("watch", "watch_explode"):
            object.__setattr__(self, name, _expressions(name, getattr(self, name)))
        object.__setattr__(self, "custom_repr", _pairs(self.custom_repr))
        if type(self.depth) is not int or self.depth < 1:
            raise UsageError(
                f"depth= of lines= takes a whole number from 1, not {self.depth!r:.80}"
            )
        longest = self.max_variable_length
        if longest is not None and (type(longest) is not int or longest < 5):
            raise UsageError(
                "max_variable_length= of lines= takes a whole number from 5, or None for no "
                f"limit, not {longest!r:.80}"
            )
        if not isinstance(self.prefix, str):
            raise UsageError(f"prefix= of lines= takes a string, not {self.prefix!r:.80}")
        for name in _FLAGS:
            _check_flag(name, getattr(self, name))
        if self.color is not None:
            _check_flag("color", self.color)
        if self.normalize and self.thread_info:
            raise UsageError(
                "normalize= of lines= leaves out what differs between runs, and thread_info= "
                "names threads by their number: choose one"
            )


_NAMES = tuple(field.name for field in dataclasses.fields(Lines))


def parse_lines(lines: object) -> Lines | None:
    """Read what `lines=` of `trace()` got; None if no lines are wanted.

    Raises:
        UsageError: says what it takes.
    """
    if lines is None or lines is False:
        return None
    if lines is True:
        return Lines()
    if isinstance(lines, Lines):
        return lines
    if not isinstance(lines, Mapping):
        raise UsageError(
            f"lines= takes True, Lines(...) or a dict of its options, not {lines!r:.80}"
        )
    _check_names(lines)
    return Lines(**lines)


def _check_names(options: Iterable[object]) -> None:
    for name in options:
        if name not in _NAMES:
            close = difflib.get_close_matches(str(name), _NAMES, 1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(
                f"lines= has no option {name!r:.80}.{meant} It takes {', '.join(_NAMES)}."
            )


def _check_output(output: object, overwrite: object) -> None:
    is_path = isinstance(output, (str, os.PathLike)) and output not in STREAMS
    if output == "":
        raise UsageError("output= of lines= is an empty path; leave it out for no live text")
    is_open = callable(output) or callable(getattr(output, "write", None))
    if not (output is None or is_path or isinstance(output, str) or is_open):
        raise UsageError(
            'output= of lines= takes "stderr", "stdout", a path, an open text file or a callable, '
            f"not {output!r:.80}"
        )
    if overwrite is True and not is_path:
        raise UsageError("overwrite= of lines= is for an output= that is a path")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name}= of lines= takes True or False, not {value!r:.80}")


def _expressions(name: str, given: Any) -> tuple[Any, ...]:
    one = isinstance(given, str) or not isinstance(given, Iterable)
    expressions = (given,) if one else tuple(given)
    for expression in expressions:
        if isinstance(expression, str):
            try:
                compile(expression, "<watch>", "eval")
            except (SyntaxError, ValueError) as error:
                raise UsageError(
                    f"{name}= of lines= takes expressions, and {expression!r:.80} is none: {error}"
                ) from error
        elif not callable(getattr(expression, "items", None)):
            raise UsageError(
                f'{name}= of lines= takes expressions such as "self.weight", not {expression!r:.80}'
            )
    return expressions


def _pairs(given: Any) -> CustomRepr:
    try:
        pairs = tuple(given)
        if len(pairs) == 2 and not all(isinstance(part, (tuple, list)) for part in pairs):
            pairs = (pairs,)
        pairs = tuple((condition, action) for condition, action in pairs)
    except (TypeError, ValueError):
        pairs = ((None, None),)
    if not all(callable(condition) and callable(action) for condition, action in pairs):
        raise UsageError(
            "custom_repr= of lines= takes pairs of a type, or a function that says whether a value "
            f"is meant, and a function that makes a text of it, not {given!r:.80}"
        )
    return pairs


def is_on_terminal(output: Output) -> bool:
    """Whether live text goes where colours show."""
    stream = getattr(sys, output) if output in STREAMS else output
    isatty = getattr(stream, "isatty", None)
    try:
        return bool(isatty()) if callable(isatty) and "NO_COLOR" not in os.environ else False
    except ValueError:
        return False  # closed
