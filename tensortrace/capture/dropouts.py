"""Dropouts that eval() does not reach: F.dropout without `training=`, by the text of forward.

Inside modules no op is seen at module level. That what stands there has run, the random state
tells.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

# Those whose `training` is True where it is left out.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_NAMES = frozenset(each.__name__ for each in _DROPOUTS)
# Its place among the arguments.
_TRAINING = 2


def dropout_line(module: nn.Module) -> tuple[CodeType, int] | None:
    """The line of a module's forward that drops in eval mode too, and the code that it is in.

    None where the mode is asked or given anywhere in forward, and where its text is not known.
    """
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, FunctionType):
        return None
    if _NAMES.isdisjoint(forward.__code__.co_names):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward.__code__)))
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    nodes = list(ast.walk(tree))
    if any(getattr(node, "attr", getattr(node, "arg", None)) == "training" for node in nodes):
        return None
    lines = (node.lineno for node in nodes
             if isinstance(node, ast.Call) and _always_drops(node, forward))  # fmt: skip
    line = min(lines, default=None)
    if line is None:
        return None
    return forward.__code__, forward.__code__.co_firstlineno + line - 1


def _always_drops(call: ast.Call, forward: FunctionType) -> bool:
    named = _named(call.func, forward)
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    unpacked = any(keyword.arg is None for keyword in call.keywords)
    given = starred or unpacked or len(call.args) > _TRAINING
    return not given and any(named is each for each in _DROPOUTS)


def _named(node: ast.expr, forward: FunctionType) -> Any:
    """What `F.dropout` stands for where it is written; None if that is no global of modules."""
    if isinstance(node, ast.Name):
        return forward.__globals__.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    of = _named(node.value, forward)
    # Of a module alone: to ask anything else may run code of the user's.
    return vars(of).get(node.attr) if inspect.ismodule(of) else None
