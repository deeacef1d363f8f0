"""Hooks of the user's that may change a gradient, or what modules take and return: where they are.

A replay runs none of them, so where that finds nothing they are what is left. No function is kept:
what it closes over may be large.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import msgspec

from tensortrace.capture.gradients import ParameterProbe
from tensortrace.records import Location
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.names import ModuleNames
    from tensortrace.capture.roots import Tree
    from tensortrace.capture.source import SourceLines

# Of one step and of one verdict; a loop may register thousands.
MOST = 8
_MOST_PATHS = 64
# What a model of transformers is asked for (`output_hidden_states`) hooks of that module gather.
_PARTS_OF_FORWARD = frozenset({"transformers.utils.output_capturing"})


def hooks_of(tree: Tree) -> Iterator[Callable[..., Any]]:
    """The hooks on the modules and parameters below a root that see a gradient, but for ours."""
    for module in tree.modules:
        yield from getattr(module, "_backward_hooks", {}).values()
        yield from getattr(module, "_backward_pre_hooks", {}).values()
    for parameter in tree.parameters:
        for hook in (parameter._backward_hooks or {}).values():
            if type(hook) is not ParameterProbe:
                yield hook
        yield from (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()


def forward_hooks_of(tree: Tree, names: ModuleNames, sources: SourceLines) -> list[dict[str, Any]]:
    """List the forward hooks below a root: where each is, and before and after which modules."""
    found: dict[Location, dict[str, list[str]]] = {}
    for module in tree.modules:
        path = names.known(module)
        for side, table in (("before", "_forward_pre_hooks"), ("after", "_forward_hooks")):
            own = getattr(module, table, {}).values() if path is not None else ()
            changing = (h for h in own if not is_of_torch(h) and not only_looks(h))
            for location in where_defined(changing, sources):
                at = found.setdefault(location, {"before": [], "after": []})
                if len(at[side]) < _MOST_PATHS:
                    at[side].append(shorten(path or ""))
    listed = list(found.items())[:MOST]
    return [{"at": msgspec.to_builtins(location), **paths} for location, paths in listed]


def is_of_torch(hook: Any) -> bool:
    """Whether torch itself implements a hook: pruning, old weight and spectral norm.

    Or a library whose forward reads what its hooks have put aside, for the time of that call.
    """
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return str(home).startswith("torch.") or home in _PARTS_OF_FORWARD


def only_looks(hook: Callable[..., Any]) -> bool:
    """Whether a hook returns nothing and writes to no tensor or module, as far as its code tells.

    Keeping what it is given, in a list or under a key of what is not its own, changes nothing.
    """
    code = _code_of(hook)
    if code is None:
        return False
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("RETURN_VALUE", "RETURN_CONST"):
            source = instruction if name == "RETURN_CONST" else before[-1]
            if source.argval is not None or not source.opname.endswith("_CONST"):
                return False
        elif name == "STORE_SUBSCR":
            if len(before) < 2 or before[-2].opname not in ("LOAD_GLOBAL", "LOAD_DEREF"):
                return False
        elif name == "STORE_ATTR" or name.startswith("INPLACE_") or value == "setattr":
            return False
        elif isinstance(value, str) and value.endswith("_") and not value.endswith("__"):
            return False  # add_, copy_
        elif name == "BINARY_OP" and instruction.argrepr.endswith("="):
            return False
        before.append(instruction)
    return True


def _code_of(hook: Any) -> CodeType | None:
    while isinstance(hook, functools.partial):
        hook = hook.func  # what it was made of
    of_class = getattr(type(hook), "__call__", None)  # noqa: B004 its code is asked for
    for each in (getattr(hook, "__func__", hook), of_class):
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None


def where_defined(hooks: Iterable[Callable[..., Any]], sources: SourceLines) -> list[Location]:
    """The lines of the user's at which hooks are defined, each once."""
    found: dict[Location, None] = {}
    for hook in hooks:
        code = _code_of(hook)
        location = sources.locate_code(code) if code is not None else None
        if location is not None:
            found[location] = None
    return list(found)
