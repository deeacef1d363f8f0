"""A copy of a source file with the shapes that flowed through it as comments.

Only comments are added: the copy has the tokens of the original. Where a comment would not be one,
within a string over several lines or after a backslash, it goes to the end of the statement.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import tokenize
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tensortrace.errors import UsageError
from tensortrace.export.flows import FunctionFlow, LineFlow, bad_text, grouped
from tensortrace.export.lines import Listing
from tensortrace.export.margins import margin
from tensortrace.export.steps import range_text
from tensortrace.records import Source
from tensortrace.text import LONGEST_SOURCE, carries, escape, is_installed, shorten

# A comment is no longer, and names no more groups.
LONGEST_COMMENT, MOST_GROUPS, MOST_NAMES = 200, 3, 3
_SIGNED = "by `tensortrace lines --write`"
_LARGEST = 1 << 24
_LINE_ENDS = re.compile(r"(\r\n|\r|\n)")


@dataclass(frozen=True, slots=True)
class Copied:
    """A file and what became of it: the copy, or the reason why there is none."""

    file: str
    copy: Path | None
    reason: str = ""


def write_copies(listing: Listing, folder: Path | None = None) -> list[Copied]:
    """Write an annotated copy of each file that the listing has lines of.

    ``model.py`` becomes ``model.annotated.py`` beside it or in `folder`, which is made. A file
    that is not what it was when its lines were recorded gets no copy; neither does one of an
    installed package, unless there is a folder.

    Raises:
        UsageError: a file that somebody else wrote is in the way.
        OSError: a copy cannot be written.
    """
    by_file: dict[str, list[FunctionFlow]] = {}
    for function in listing.functions:
        by_file.setdefault(function.file, []).append(function)
    taken: set[Path] = set()
    done = []
    for file, functions in by_file.items():
        path = Path(listing.run.header.cwd, file)
        if folder is None and is_installed(str(path)):
            done.append(Copied(file, None, "it is of an installed package; name a folder for it"))
            continue
        try:
            text = _annotated(path, functions, listing)
        except UsageError as error:
            done.append(Copied(file, None, str(error)))
            continue
        copy = _free_name(path, path.parent if folder is None else folder, taken)
        taken.add(copy)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        _replace(copy, text)
        done.append(Copied(file, copy))
    return done


def _free_name(path: Path, folder: Path, taken: set[Path]) -> Path:
    """Name a copy; never after a file that another hand wrote.

    Raises:
        UsageError: such a file is in the way.
    """
    names = [f"{path.stem}.annotated.py"]
    names += [f"{path.stem}-{i}.annotated.py" for i in range(2, len(taken) + 3)]
    copy = next(name for name in (folder / name for name in names) if name not in taken)
    if copy.exists():
        with copy.open("rb") as file:
            file.seek(max(0, copy.stat().st_size - 400))
            if _SIGNED.encode() not in file.read():
                raise UsageError(f"{copy} is in the way, and was not written by this command.")
    return copy


def _replace(path: Path, data: bytes) -> None:
    """Write a file at once: a link in its place is replaced, not followed."""
    handle, name = tempfile.mkstemp(prefix=".annotated", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def _annotated(path: Path, functions: Sequence[FunctionFlow], listing: Listing) -> bytes:
    """Make the text of a copy, in the encoding and with the line ends of the original.

    Raises:
        UsageError: the file is gone, is no Python, or is not what was recorded.
    """
    try:
        # The path stands in the log: no device or pipe is read for it.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise UsageError("it is no file of source text")
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"it cannot be read ({told})") from error
    parts = _LINE_ENDS.split(text)
    lines, ends = parts[::2], [*parts[1::2], ""]
    known = [(function, function.source) for function in functions if function.source is not None]
    if not known:
        raise UsageError("the log does not hold its text, so nobody knows whether it changed since")
    comments: dict[int, str] = {}
    for function, source in known:
        _compare(lines, source, path.name)
        for number, line in function.lines.items():
            parts = [
                comments.get(number, ""),
                _comment(line),
                *_wrong(listing, function.file, line),
            ]
            comments[number] = "; ".join(part for part in parts if part)
    arrow = "→" if carries(encoding, "→") else "->"
    for number, told in _placed(comments, comment_rows("\n".join(lines))).items():
        said = told.replace("→", arrow)
        said = said.encode(encoding, "backslashreplace").decode(encoding)
        lines[number - 1] = f"{lines[number - 1].rstrip()}  # {said}"
    steps = f"steps {range_text(listing.steps)}" if listing.steps else "no steps"
    log = escape(listing.run.path.name).encode(encoding, "backslashreplace").decode(encoding)
    if lines[-1]:
        lines.append("")
        ends[-1:] = [next((end for end in ends if end), "\n"), ""]
    lines[-1] = f"# Shapes of {steps} of {log}, {_SIGNED}."
    ends[-1] = next((end for end in ends if end), "\n")
    return "".join(line + end for line, end in zip(lines, ends, strict=True)).encode(encoding)


def _compare(lines: Sequence[str], source: Source, name: str) -> None:
    """Make sure that a recorded function still stands where it stood.

    Raises:
        UsageError: it does not.
    """
    recorded = _LINE_ENDS.sub("\n", source.text).rstrip("\n").split("\n")
    if len(source.text) >= LONGEST_SOURCE:
        del recorded[-1]  # cut somewhere
    for i, line in enumerate(recorded, source.first_line - 1):
        if not 0 <= i < len(lines) or lines[i] != line:
            raise UsageError(
                f"line {i + 1} of {escape(name)} is not what was recorded: it changed since the run"
            )


def _comment(line: LineFlow) -> str:
    told = []
    groups = grouped(line.flows)
    for flows, text in groups[:MOST_GROUPS]:
        names = ", ".join(escape(shorten(flow.name, 60)) for flow in flows[:MOST_NAMES])
        names += f" +{len(flows) - MOST_NAMES}" if len(flows) > MOST_NAMES else ""
        told.append(" ".join(part for part in (names, text, bad_text(flows[0])) if part))
    return _joined([*told, "..." if len(groups) > MOST_GROUPS else ""])


def _wrong(listing: Listing, file: str, line: LineFlow) -> list[str]:
    """What is wrong at a line, as in the margin of the listing."""
    told = [text for text, _ in margin(listing, file, line)]
    return [shorten(text, LONGEST_COMMENT) for text in told[:MOST_GROUPS]]


def _placed(comments: dict[int, str], rows: dict[int, int]) -> dict[int, str]:
    """Put each comment where it can stand; those of one row are joined."""
    placed: dict[int, str] = {}
    for number, told in sorted(comments.items()):
        row = rows.get(number)
        if told and row is not None:
            placed[row] = f"{placed[row]}; {told}" if row in placed else told
    return placed


def _joined(parts: Iterable[str]) -> str:
    text = "; ".join(part for part in parts if part)
    return shorten(text, LONGEST_COMMENT)


def comment_rows(text: str) -> dict[int, int]:
    """Where a comment on a line of Python source can stand, by its number.

    At its own end; of a line within a string over several or before a backslash at the end of its
    statement.

    Raises:
        UsageError: it is no Python.
    """
    inside: set[int] = set()
    code: set[int] = set()
    opened: list[int] = []
    # By line, the last one of its statement.
    ends: dict[int, int] = {}
    begun = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            name = tokenize.tok_name[token.type]
            first, last = token.start[0], token.end[0]
            if name in ("FSTRING_START", "TSTRING_START"):
                opened.append(first)
            elif name in ("FSTRING_END", "TSTRING_END") and opened:
                inside.update(range(opened.pop(), last))
            elif name == "STRING":
                inside.update(range(first, last))
            if name == "NEWLINE":
                ends.update((n, first) for n in range(begun, first + 1))
                begun = 0
            if name not in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"):
                code.update(range(first, last + 1))
                begun = begun or first
    except (tokenize.TokenError, SyntaxError, IndentationError) as error:
        raise UsageError(f"it is no Python that can be read here ({error})") from error
    slashed = {n for n, line in enumerate(text.split("\n"), 1) if line.rstrip().endswith("\\")}
    free = code - inside - slashed
    return {n: row for n in code for row in (n if n in free else ends.get(n, 0),) if row in free}
