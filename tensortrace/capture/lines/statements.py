"""Which source lines are one statement, so that its executions can be counted.

Python's trace function is told of lines: of a call over three lines it hears of the first one
twice, of a ``with`` once more when it is left.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType

_BOUND = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Statements:
    """What a function is made of, by line number.

    Attributes:
        starts: of each line of a statement, or of the head of one, over several lines its first.
        withs: of each line of the head of a ``with`` the first and last line of its body.
        special: the lines of these.
    """

    starts: dict[int, int] = field(default_factory=dict)
    withs: dict[int, tuple[int, int]] = field(default_factory=dict)
    special: set[int] = field(default_factory=set)

    def begun_by(self, line: int) -> int:
        """The first line of the statement over several lines that holds a line; 0 for none."""
        return self.starts.get(line, 0)

    def leaves(self, last: int, line: int) -> bool:
        """Whether a line that comes after another one is that of a ``with`` that is left."""
        body = self.withs.get(line)
        return body is not None and body[0] <= last <= body[1]


def read_statements(code: CodeType) -> Statements:
    """The statements of a function or file; none where its source cannot be read."""
    found = Statements()
    try:
        lines, first = _source(code)
        text = "".join(lines)
        if text[:1].isspace():  # a method
            text, first = "if 1:\n" + text, first - 1
        tree = ast.parse(text)
    except (OSError, TypeError, IndexError, ValueError, SyntaxError, RecursionError, MemoryError):
        return found
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        begin, end = _head(node)
        if end > begin:
            found.starts.update((n + first - 1, begin + first - 1) for n in range(begin, end + 1))
        if isinstance(node, (ast.With, ast.AsyncWith)):
            body = node.body[0].lineno + first - 1, (node.end_lineno or begin) + first - 1
            found.withs.update((n + first - 1, body) for n in range(begin, end + 1))
    found.special.update(found.starts, found.withs)
    return found


def _source(code: CodeType) -> tuple[list[str], int]:
    if code.co_filename == "<string>":
        raise OSError("Python 3.13 gives the text of `python -c` for any such code")
    if code.co_name == "<module>":
        return linecache.getlines(code.co_filename), 1
    return inspect.getsourcelines(code)


def _head(node: ast.stmt) -> tuple[int, int]:
    """The first and last line of a simple statement, or of what stands before a block."""
    begin = node.lineno
    if isinstance(node, _BOUND):
        return min([begin, *(one.lineno for one in node.decorator_list)]), begin
    if not isinstance(getattr(node, "body", None) or getattr(node, "cases", None), list):
        return begin, node.end_lineno or begin
    return begin, max([begin, *(one.end_lineno or begin for one in _before_block(node))])


def _before_block(node: ast.stmt) -> Iterator[ast.expr]:
    for name in ("target", "iter", "test", "subject", "items"):
        part = getattr(node, name, None)
        parts: Iterable[ast.AST] = part if isinstance(part, list) else [part] if part else []
        for one in parts:
            yield from (found for found in ast.walk(one) if isinstance(found, ast.expr))
