"""Hooks of the user's that may change a gradient: where they are defined.

A replay runs none of them, so where that finds nothing they are what is left. No function is kept:
what it closes over may be large.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tensortrace.capture.gradients import ParameterProbe
from tensortrace.records import Location

if TYPE_CHECKING:
    from tensortrace.capture.roots import Tree
    from tensortrace.capture.source import SourceLines

# Of one step and of one verdict; a loop may register thousands.
MOST = 8


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


def where_defined(hooks: Iterable[Callable[..., Any]], sources: SourceLines) -> list[Location]:
    """The lines of the user's at which hooks are defined, each once."""
    found: dict[Location, None] = {}
    for hook in hooks:
        while isinstance(hook, functools.partial):
            hook = hook.func  # noqa: PLW2901 what it was made of
        code = getattr(getattr(hook, "__func__", hook), "__code__", None)
        location = sources.locate_code(code) if code is not None else None
        if location is not None:
            found[location] = None
    return list(found)
