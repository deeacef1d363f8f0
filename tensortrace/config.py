"""The `[tool.tensortrace]` table of a project's pyproject.toml: which checks run, and how.

```toml
[tool.tensortrace]
select = ["TT1", "TT2"]        # codes, prefixes, names; all checks by default
ignore = ["vanishing-gradient"]

[tool.tensortrace.set]
"TT201.ratio" = 50.0
```
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensortrace.checks import Check, select
from tensortrace.engine import Engine
from tensortrace.errors import UsageError

_KEYS = ("select", "ignore", "set")


@dataclass(frozen=True, slots=True)
class Config:
    """What a project asks for; empty where there is no such table."""

    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self != Config()

    def checks(
        self, chosen: Iterable[str] | None = None, ignored: Iterable[str] | None = None
    ) -> list[Check]:
        """Choose the checks; what is given by hand wins over the project.

        Args:
            chosen: replaces both `select` and `ignore` of the project.
            ignored: replaces `ignore`.
        """
        if chosen is not None:
            return select(chosen, ignored or ())
        return select(self.select, self.ignore if ignored is None else ignored)


def load_config(folder: Path | None = None) -> Config:
    """Read the nearest pyproject.toml that has the table, from a folder upwards.

    Args:
        folder: where to look first; the working folder by default.
    Raises:
        UsageError: the table has a key, check or setting that does not exist, or is no TOML.
    """
    try:
        start = Path.cwd() if folder is None else folder.absolute()
    except OSError:  # the working folder was deleted
        return Config()
    for parent in (start, *start.parents):
        path = parent / "pyproject.toml"
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        # Most have no such table; parsing is left for those that may, a broken one included.
        if "tensortrace" not in text:
            continue
        table = _table(path, text)
        if table is not None:
            try:
                return _parse(table)
            except UsageError as error:
                raise UsageError(f"{path}, [tool.tensortrace]: {error}") from error
    return Config()


def _table(path: Path, text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tool = tomllib.loads(text).get("tool", {})
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    return tool.get("tensortrace") if isinstance(tool, dict) else None


def _parse(table: Any) -> Config:
    if not isinstance(table, dict):
        raise UsageError(f"it is {table!r:.80}, not a table.")
    unknown = [key for key in table if key not in _KEYS]
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}. It takes {', '.join(_KEYS)}.")
    chosen = _words(table, "select") if "select" in table else None
    ignored = _words(table, "ignore") if "ignore" in table else ()
    settings = table.get("set", {})
    if not isinstance(settings, dict):
        raise UsageError(f'set is {settings!r:.80}, not a table such as "TT201.ratio" = 50.0.')
    settings = _flat(settings)
    select(chosen, ignored)
    Engine([], settings)
    return Config(chosen, ignored, settings)


def _words(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    words = table[key]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(f'{key} is {words!r:.80}, not a list such as ["TT1", "TT202"].')
    return tuple(words)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read `TT201.ratio = 50.0` without quotes, a table in a table, as "TT201.ratio" too."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            flat[name] = value
    return flat
