"""Hooks of the user's that may change a gradient, or what modules take and return: where they are.

A replay runs none of them, so where that finds nothing they are what is left. No function is kept:
what it closes over may be large.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
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
# What compilers put between the instructions that do something.
_NOTHING = frozenset({
    "CACHE", "COPY_FREE_VARS", "MAKE_CELL", "NOP", "PRECALL", "PUSH_NULL", "RESUME",
})  # fmt: skip
_SWAPS = ("SWAP", "ROT_TWO")
_OUTSIDE = ("LOAD_GLOBAL", "LOAD_DEREF")
_WRITING = frozenset({"inplace", "out"})
# What a model of transformers is asked for (`output_hidden_states`) hooks of that module gather.
_PARTS_OF_FORWARD = frozenset({"transformers.utils.output_capturing"})


def hooks_of(tree: Tree) -> Iterator[Callable[..., Any]]:
    """The hooks on the modules below a root that see a gradient."""
    for module in tree.modules:
        yield from getattr(module, "_backward_hooks", {}).values()
        yield from getattr(module, "_backward_pre_hooks", {}).values()


def parameter_hooks_of(tree: Tree) -> Iterator[Callable[..., Any]]:
    """Those on its parameters, but for ours: no other backward call takes what they return."""
    for parameter in tree.parameters:
        for hook in (parameter._backward_hooks or {}).values():
            if type(hook) is not ParameterProbe:
                yield hook
        yield from (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()


def changing(hooks: Iterable[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """Those that may change what they are given; first those that return something."""
    return sorted((hook for hook in hooks if not only_looks(hook)), key=_returns_nothing)


def forward_hooks_of(tree: Tree, names: ModuleNames, sources: SourceLines) -> list[dict[str, Any]]:
    """List the forward hooks below a root: where each is, and before and after which modules."""
    found: dict[Location, dict[str, list[str]]] = {}
    for module in tree.modules:
        path = names.known(module)
        for side, table in (("before", "_forward_pre_hooks"), ("after", "_forward_hooks")):
            own = getattr(module, table, {}).values() if path is not None else ()
            theirs = changing(hook for hook in own if not is_of_torch(hook))
            for location in where_defined(theirs, sources):
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

    Keeping what it is given, in a list or under a key of what is not its own, changes nothing; nor
    does an attribute of a plain object whose method it is, or a number there that it counts up.
    """
    code, owner = _code_of(hook)
    if code is None:
        return False
    effects = _effects(code)
    held: dict[str, Any] = {}
    # nn.Module has a way of its own to set attributes; a property is not held like that.
    setting: Any = type(owner).__setattr__
    if not isinstance(owner, FunctionType) and setting is object.__setattr__:
        held = getattr(owner, "__dict__", held)
    kept = all(name in held for name in effects.stored)
    counted = all(isinstance(held.get(name), (int, float)) for name in effects.counted)
    return not (effects.returns or effects.writes) and kept and counted


def _returns_nothing(hook: Callable[..., Any]) -> bool:
    code, _ = _code_of(hook)
    return code is not None and not _effects(code).returns


@dataclass(frozen=True, slots=True)
class _Effects:
    """What code does: it returns something, or writes to what may be a tensor or a module.

    And the attributes of its first argument that it stores, and those of them that it counts up.
    """

    returns: bool
    writes: bool
    stored: frozenset[str]
    counted: frozenset[str]


@functools.lru_cache(256)
def _effects(code: CodeType) -> _Effects:
    returns = False
    # The names of keywords are a constant: F.relu(x, inplace=True).
    writes = any(isinstance(c, tuple) and not _WRITING.isdisjoint(c) for c in code.co_consts)
    stored, counted = set(), set()
    listed = [i for i in dis.get_instructions(code) if i.opname not in _NOTHING]
    for at, instruction in enumerate(listed):
        name, value = instruction.opname, instruction.argval
        if name in ("RETURN_VALUE", "RETURN_CONST"):
            source = instruction if name == "RETURN_CONST" else listed[at - 1]
            is_none = source.argval is None and source.opname.endswith("_CONST")
            returns = returns or not (is_none or _appends(listed))
        elif name == "STORE_SLICE":
            writes = True
        elif name == "STORE_SUBSCR":
            writes = writes or not _is_kept(*listed[at - 2 : at])
        elif name == "STORE_ATTR":
            stored.add(value)
            adds = listed[at - 1].opname in _SWAPS
            counted |= {value} if adds else set()
            owner = _counted(listed[:at], value) if adds else listed[at - 1]
            writes = writes or owner is None or not _is_first(owner, code)
        elif name.startswith("INPLACE_") or (
            name == "BINARY_OP" and instruction.argrepr.endswith("=")
        ):
            onto = [each.opname for each in listed[at + 1 : at + 3]]
            writes = writes or onto[0] not in _SWAPS or onto[1] != "STORE_ATTR"
        elif value == "setattr" or (
            isinstance(value, str) and value.endswith("_") and not value.endswith("__")
        ):
            writes = True  # add_, copy_
    return _Effects(returns, writes, frozenset(stored), frozenset(counted))


def _is_kept(container: dis.Instruction, key: dis.Instruction) -> bool:
    """Whether an item is stored in what is no argument, by a key that is a name or a constant."""
    return container.opname in _OUTSIDE and key.opname in (*_OUTSIDE, "LOAD_CONST", "LOAD_FAST")


def _appends(listed: list[dis.Instruction]) -> bool:
    """Whether all of some code is one call that returns nothing: `kept.append(...)`, `print(...)`.

    Without a jump the last call is of what was loaded first: of nothing else the stack is empty.
    """
    jumps = any(i.opcode in dis.hasjrel or i.opcode in dis.hasjabs for i in listed)
    called = {i.argval for i in listed[:2] if isinstance(i.argval, str)}
    prints = listed[0].argval == "print"
    return not jumps and listed[-2].opname.startswith("CALL") and (prints or "append" in called)


def _counted(before: list[dis.Instruction], name: str) -> dis.Instruction | None:
    """What loaded the object to whose attribute something was added."""
    for at in range(len(before) - 2, 0, -1):
        if before[at].opname in ("COPY", "DUP_TOP") and before[at + 1].argval == name:
            return before[at - 1]
    return None


def _is_first(loaded: dis.Instruction, code: CodeType) -> bool:
    """Whether an instruction loaded the first argument, last of what it loaded."""
    names = loaded.argval if isinstance(loaded.argval, tuple) else (loaded.argval,)
    return loaded.opname.startswith("LOAD_FAST") and names[-1:] == code.co_varnames[:1]


def _code_of(hook: Any) -> tuple[CodeType | None, Any]:
    """The code of a hook, and the object whose method that is; itself if it is a function."""
    while isinstance(hook, functools.partial):
        hook = hook.func  # what it was made of
    of_class = getattr(type(hook), "__call__", None)  # noqa: B004 its code is asked for
    for each in (getattr(hook, "__func__", hook), of_class):
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            return code, getattr(hook, "__self__", hook)
    return None, hook


def where_defined(hooks: Iterable[Callable[..., Any]], sources: SourceLines) -> list[Location]:
    """The lines of the user's at which hooks are defined, each once."""
    found: dict[Location, None] = {}
    for hook in hooks:
        code, _ = _code_of(hook)
        location = sources.locate_code(code) if code is not None else None
        if location is not None:
            found[location] = None
    return list(found)
