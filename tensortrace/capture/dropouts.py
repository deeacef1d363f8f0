"""Dropouts that eval() does not reach: F.dropout without `training=`, by the text of forward.

Inside modules no op is seen at module level. So only a call counts that each call of forward comes
to: under no condition, behind no `return`, with a share to drop that is known and not 0.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

# Those whose `training` is True where it is left out.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_NAMES = frozenset(each.__name__ for each in _DROPOUTS)
_SHARE, _TRAINING = 1, 2
# What may be left out, run later, or not at all.
_CONDITIONS = (
    ast.If, ast.IfExp, ast.While, ast.Try, ast.BoolOp, ast.With, ast.Lambda, ast.FunctionDef,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Match,
)  # fmt: skip
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)


def dropout_line(module: nn.Module) -> tuple[CodeType, int] | None:
    """The line of a module's forward that drops in eval mode too, and the code that it is in.

    None where the mode is asked or given anywhere in forward, and where its text is not known.
    """
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, FunctionType) or "forward" in vars(module):
        return None
    code = forward.__code__
    if _NAMES.isdisjoint(code.co_names):
        return None
    for call in _read(code):
        if _always_drops(call, forward, module):
            return code, code.co_firstlineno + call.lineno - 1
    return None


@functools.lru_cache(256)
def _read(code: CodeType) -> tuple[ast.Call, ...]:
    """The calls that a forward comes to each time; none of one that asks for the mode."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return ()
    if not isinstance(function, ast.FunctionDef) or any(map(_asks_for_mode, ast.walk(function))):
        return ()
    return tuple(_certain_calls(function.body))


def _asks_for_mode(node: ast.AST) -> bool:
    named = getattr(node, "attr", getattr(node, "arg", getattr(node, "value", None)))
    return type(named) is str and named == "training"


def _certain_calls(body: list[ast.stmt]) -> Iterator[ast.Call]:
    """List the calls that a function comes to whatever it is given."""
    for statement in body:
        inside = list(ast.walk(statement))
        if isinstance(statement, ast.For):
            yield from _certain_calls(statement.body)
        elif not any(isinstance(node, _CONDITIONS) for node in inside):
            yield from (node for node in inside if isinstance(node, ast.Call))
        if any(isinstance(node, _LEAVING) for node in inside):
            return


def _always_drops(call: ast.Call, forward: FunctionType, module: nn.Module) -> bool:
    named = _named(call.func, forward)
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    unpacked = any(keyword.arg is None for keyword in call.keywords)
    if starred or unpacked or len(call.args) > _TRAINING:
        return False
    shares = [*call.args[_SHARE:], *(each.value for each in call.keywords if each.arg == "p")]
    return any(named is each for each in _DROPOUTS) and all(
        _is_above_0(share, module) for share in shares
    )


def _is_above_0(share: ast.expr, module: nn.Module) -> bool:
    value: Any = share.value if isinstance(share, ast.Constant) else _held(share, module)
    return type(value) in (int, float) and value > 0


def _held(node: ast.expr, module: nn.Module) -> Any:
    """What `self.config.dropout` is now, of what the objects themselves hold; None if unknown."""
    if isinstance(node, ast.Name):
        return module if node.id == "self" else None
    if not isinstance(node, ast.Attribute):
        return None
    return getattr(_held(node.value, module), "__dict__", {}).get(node.attr)


def _named(node: ast.expr, forward: FunctionType) -> Any:
    """What `F.dropout` stands for where it is written; None if that is no global of modules."""
    if isinstance(node, ast.Name):
        return None if node.id in _locals(forward.__code__) else forward.__globals__.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    of = _named(node.value, forward)
    # Of a module alone: to ask anything else may run code of the user's.
    return vars(of).get(node.attr) if inspect.ismodule(of) else None


def _locals(code: CodeType) -> tuple[str, ...]:
    return (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
