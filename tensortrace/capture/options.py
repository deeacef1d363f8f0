"""The options of `trace()`, checked once and in one place."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from tensortrace.capture.lines.options import Lines, parse_lines
from tensortrace.capture.stats.queue import Level
from tensortrace.checks import Check, select
from tensortrace.config import Config, load_config
from tensortrace.errors import UsageError
from tensortrace.records import SEVERITIES, Finding


@dataclass(frozen=True, slots=True)
class Options:
    """What `trace()` was asked for; see there."""

    out: Any
    model: nn.Module | None
    level: Literal["module", "op"]
    lines: Lines | None
    narrow: bool
    every: int | Literal["auto"]
    steps: Container[int] | None
    modules: tuple[str, ...] | None
    stats: Level
    checks: list[Check]
    settings: Mapping[str, Any]
    should_stop: Callable[[Finding], bool]
    compiled: Literal["boundary", "eager"]
    source: bool
    max_bytes: int
    given: Mapping[str, Any]

    def as_given(self) -> dict[str, Any]:
        """The options that were given, but for out, as `parse_options` takes them."""
        given = {name: value for name, value in self.given.items() if name in OPTION_NAMES}
        if self.modules is not None:  # it may have been an iterator
            given["modules"] = self.modules
        return given | ({"model": self.model} if self.model is not None else {})

    def as_json(self) -> dict[str, Any]:
        """The options that were given, for the header."""
        return {
            name: value if isinstance(value, (str, int, float, bool)) else repr(value)[:200]
            for name, value in self.given.items()
        }


def parse_options(
    out: Any = "log.jsonl",
    *,
    model: nn.Module | None = None,
    level: str = "module",
    lines: bool | Lines | Mapping[str, Any] = False,
    every: int | str = "auto",
    steps: int | Container[int] | None = None,
    modules: str | Iterable[str] | None = None,
    stats: str = "full",
    checks: str | Iterable[str] | Mapping[str, Any] | None = None,
    stop_on: str | Callable[[Finding], object] | None = None,
    narrow: bool = True,
    compiled: str = "boundary",
    source: bool = True,
    max_bytes: int = 10**9,
) -> Options:
    """Check the options of `trace()`.

    Raises:
        UsageError: says which option, what it got, and what it takes.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "model")}
    if isinstance(out, nn.Module):  # it is callable, so it would be given the records
        raise UsageError(
            f"out= is where the log goes; write model= to name the {type(out).__name__}"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise UsageError(f"model= takes a torch.nn.Module, not {type(model).__name__}")
    if every != "auto" and (type(every) is not int or every < 1):
        raise UsageError(f'every= takes "auto" or a whole number from 1, not {every!r}')
    if type(max_bytes) is not int or max_bytes < 10_000:
        raise UsageError(f"max_bytes= takes a whole number from 10000, not {max_bytes!r}")
    config = load_config()
    chosen, settings = _checks(checks, config)
    if config:
        given["pyproject"] = str(config)
    return Options(
        out=out,
        model=model,
        level=_choose("level", level, ("module", "op")),  # type: ignore[arg-type]
        lines=parse_lines(lines),
        narrow=bool(narrow),
        every=every,  # type: ignore[arg-type]
        steps=_steps(steps),
        modules=None if modules is None else _strings("modules", modules),
        stats=_choose("stats", stats, get_args(Level)),  # type: ignore[arg-type]
        checks=chosen,
        settings=settings,
        should_stop=_stopper(stop_on),
        compiled=_choose("compiled", compiled, ("boundary", "eager")),  # type: ignore[arg-type]
        source=bool(source),
        max_bytes=max_bytes,
        given={name: value for name, value in given.items() if value != _DEFAULTS.get(name)},
    )


OPTION_NAMES = tuple(parse_options.__kwdefaults__ or ())
_DEFAULTS = {
    name: default
    for name, default in (parse_options.__kwdefaults__ or {}).items()
    if name != "model"
}


def _choose(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        raise UsageError(f"{name}= takes {wanted}, not {value!r}")
    return str(value)


def _strings(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(part, str) for part in strings):
        raise UsageError(f"{name}= takes a string or several, not {value!r:.80}")
    return strings


def _steps(steps: int | Container[int] | None) -> Container[int] | None:
    if steps is None or isinstance(steps, (range, set, frozenset, list, tuple)):
        return steps
    if type(steps) is int:
        return (steps,)
    raise UsageError(f"steps= takes a step number, a range, a list or a set, not {steps!r:.80}")


def _checks(
    checks: str | Iterable[str] | Mapping[str, Any] | None, config: Config
) -> tuple[list[Check], Mapping[str, Any]]:
    if isinstance(checks, Mapping):
        return config.checks(), {**config.settings, **checks}
    chosen = None if checks is None else _strings("checks", checks)
    return config.checks(chosen), config.settings


def _stopper(stop_on: str | Callable[[Finding], object] | None) -> Callable[[Finding], bool]:
    if stop_on is None:
        return lambda finding: False
    if callable(stop_on):
        return lambda finding: bool(stop_on(finding))
    if stop_on in SEVERITIES:
        severe = SEVERITIES[: SEVERITIES.index(stop_on) + 1]
        return lambda finding: finding.severity in severe
    takes = 'stop_on= takes "error", "warning", "note", a code or a callable'
    if not isinstance(stop_on, str):
        raise UsageError(f"{takes}: {stop_on!r}")
    try:
        codes = {check.code for check in select((stop_on,))}
    except UsageError as error:
        raise UsageError(f"{takes}; {error}") from error
    return lambda finding: finding.code in codes
