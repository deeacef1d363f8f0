"""What is known when an exception leaves the block: one `action` record named "exception".

Facts only, no words: `checks/exception/` makes a sentence of them, live and from the log. The
frames of the traceback are read, nothing of the user's is called: an operand is a plain name, an
attribute that lies in a `__dict__`, or a constant subscript of a builtin container.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import opcode
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType, GetSetDescriptorType, TracebackType
from typing import TYPE_CHECKING, Any

import executing
import torch
from torch import nn

from tensortrace.capture.gradients import own_parameters
from tensortrace.capture.lines.events import message_of
from tensortrace.capture.source import line_text, with_code
from tensortrace.capture.stats.queue import summarize
from tensortrace.capture.tensors import describe
from tensortrace.capture.unwrap import quiet
from tensortrace.errors import TraceStoppedError
from tensortrace.exception_text import said
from tensortrace.records import Location
from tensortrace.signal_handlers import let_through
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder

__all__ = ["explain", "quits_debugger"]

_MISSING = object()
# How much of each thing is worth a place in the log.
_MESSAGE, _TEXT, _LISTED, _KEYS = 4000, 120, 12, 8
_KEPT = ("shape", "dtype", "device", "requires_grad", "is_leaf", "grad_fn")
_CONTROL_FLOW = (TraceStoppedError, StopIteration, StopAsyncIteration)
# By these a debugger, a test, a search or a command says that it goes no further. By name, since
# none of them is imported here.
_QUITS = "bdb.BdbQuit"
_GOES_NO_FURTHER = frozenset({
    _QUITS, "click.exceptions.Abort", "click.exceptions.Exit",
    "hypothesis.errors.UnsatisfiedAssumption", "optuna.exceptions.TrialPruned",
    "unittest.case.SkipTest",
})  # fmt: skip
_OPERATORS: dict[type[ast.AST], str] = {
    ast.MatMult: "matmul", ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div",
    ast.Pow: "pow", ast.FloorDiv: "floor_divide", ast.Mod: "remainder", ast.BitAnd: "and",
    ast.BitOr: "or", ast.BitXor: "xor",
}  # fmt: skip
_INDEX_ERROR = re.compile(r"out of (bounds|range)|Class values must")
# After one of these every touch of the device fails, or hangs.
_DEVICE_DEAD = re.compile(r"CUDA error|device-side assert|HIP error|AcceleratorError")
_ENTRY = "_wrapped_call_impl"  # nn.Module.__call__
_SEQUENCES = (list, tuple, torch.Size)
_VIEWS = frozenset({"t", "transpose", "permute", "view", "unsqueeze", "squeeze"})


def explain(recorder: Recorder, error: BaseException, traceback: TracebackType | None) -> None:
    """Record what an exception tells, unless it is no failure or was recorded before.

    Args:
        recorder: gets one action named "exception".
        error: what leaves the block; neither kept nor changed.
        traceback: its traceback; of its frames only locals are read.
    """
    if not isinstance(error, Exception) or _is_control_flow(error):
        return
    message = _message(error)
    location = with_code(recorder.sources.locate_traceback(traceback))
    # Neither the exception nor its frames may be held: they hold the user's tensors. An exception
    # that is raised again has a longer traceback; another one at its address begins anew.
    key, length = (id(error), message, location), _length(traceback)
    known, before = recorder.explained
    recorder.explained = key, length
    if known == key and length > before:
        return
    entries = _entries(traceback)
    detail: dict[str, Any] = {"type": shorten(type(error).__name__), "message": message}
    inner = [i for i, tb in enumerate(entries) if recorder.sources.is_user(tb.tb_frame.f_code)]
    mine = inner[-1] if inner else -1
    module = _entered(recorder, entries, detail)
    detail["phase"] = _phase(entries)
    seen: dict[int, str] = {}
    if mine >= 0:
        if recorder.sources.keep_text and location is not None:
            detail["lines"] = _neighbours(location)
        _read_line(recorder, entries, mine, detail, seen)
    _read_torch(entries[mine + 1 :], detail, seen)
    _measure_indices(detail, message)
    if message.startswith("Error(s) in loading state_dict"):
        detail["state_dict"] = _state_dict(str(error))
    if not isinstance(error, torch.OutOfMemoryError) and not _DEVICE_DEAD.search(message):
        # Replayed calls come before the record that makes the checks decide.
        recorder.narrow(raised=said(detail["type"], message, location))
    recorder.action(
        "exception",
        of=shorten(type(module).__name__) if module is not None else None,
        location=location,
        detail=_plain(detail),
    )


def _is_control_flow(error: Exception) -> bool:
    return isinstance(error, _CONTROL_FLOW) or not _names(error).isdisjoint(_GOES_NO_FURTHER)


def quits_debugger(error: BaseException | None) -> bool:
    """Whether somebody has left the debugger that the program ran in."""
    return error is not None and _QUITS in _names(error)


def _names(error: BaseException) -> set[str]:
    try:
        return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}
    except Exception as err:
        let_through(err)
        return set()  # a metaclass of the user's may say what it likes


def _message(error: BaseException) -> str:
    text = message_of(error)
    if len(text) <= _MESSAGE:
        return text
    return f"{text[: _MESSAGE - 1000]} ... {text[-1000:]}"


def _length(traceback: TracebackType | None) -> int:
    count = 0
    while traceback is not None:
        traceback, count = traceback.tb_next, count + 1
    return count


def _entries(traceback: TracebackType | None) -> list[TracebackType]:
    found = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found[-500:]


def _phase(entries: list[TracebackType]) -> str | None:
    """The phase by the outermost part of torch that was entered."""
    for tb in entries:
        file = tb.tb_frame.f_code.co_filename
        if "/torch/autograd/" in file:
            return "backward"
        if "/torch/optim/" in file:
            return "optimizer"
        if tb.tb_frame.f_code.co_name == _ENTRY or "/torch/nn/functional" in file:
            return "forward"
    return None


# ---- the module


def _entered(
    recorder: Recorder, entries: list[TracebackType], detail: dict[str, Any]
) -> nn.Module | None:
    """Describe the innermost module, what it was given and what it holds."""
    for tb in reversed(entries):
        if tb.tb_frame.f_code.co_name != _ENTRY:
            continue
        names = _locals_of(tb.tb_frame)
        module = names.get("self")
        if not isinstance(module, nn.Module):
            continue
        path = recorder.names.known(module)
        detail["module"] = path
        detail["entered"] = [
            {"name": name, "tensor": tensor}
            for name, tensor in _tensors((names.get("args"), names.get("kwargs")))
        ][:_LISTED]
        own = {**own_parameters(module), **module.__dict__.get("_buffers", {})}
        detail["parameters"] = [
            {"name": name, "tensor": p} for name, p in own.items() if isinstance(p, torch.Tensor)
        ][:_LISTED]
        detail["settings"] = dict(itertools.islice(_settings(module), _LISTED))
        return module
    return None


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in module.__dict__.items():
        if name.startswith("_") or name == "training":
            continue
        whole = type(value) is tuple and all(type(part) is int for part in value)
        if type(value) is int or whole:
            yield name, value


def _tensors(value: Any, depth: int = 3) -> Iterator[tuple[str, torch.Tensor]]:
    """Find tensors in builtin containers; a container of the user's own stays closed."""
    if type(value) is dict:
        parts: Any = value.items()
    elif type(value) in (tuple, list):
        parts = enumerate(value)
    else:
        return
    for key, part in parts:
        name = str(key) if type(key) in (int, str) else "?"
        if isinstance(part, torch.Tensor):
            yield name, part
        elif depth:
            for deeper, tensor in _tensors(part, depth - 1):
                yield f"{name}.{deeper}", tensor


# ---- the user's line


def _read_line(
    recorder: Recorder,
    entries: list[TracebackType],
    at: int,
    detail: dict[str, Any],
    seen: dict[int, str],
) -> None:
    """Find the expression that failed, and its operands by the names they have in it."""
    frame = entries[at].tb_frame
    node = _failed_node(entries[at])
    if node is None:
        return
    detail["expression"] = _text(node)
    operation, parts = _parts(node)
    if operation:
        detail["operation"] = operation
    names = _locals_of(frame)
    callee = entries[at + 1] if at + 1 < len(entries) else None
    given = _given(callee, node) if isinstance(node, ast.Call) else {}
    operands = []
    for key, part in parts[:_LISTED]:
        value = _evaluate(part, names, frame)
        if value is _MISSING:
            value = given.get(key, _MISSING)
        name = _text(part)
        if isinstance(value, torch.Tensor):
            seen.setdefault(id(value), name)
        for suffix, tensor in itertools.islice(_tensors(value), _KEYS):
            seen.setdefault(id(tensor), f"{name}[{suffix}]")
            operands.append({"name": f"{name}[{suffix}]", "tensor": tensor})
        operands.append(_operand(recorder, name, value))
    if "NoneType" in detail["message"]:
        operands += _without_gradient((part for _, part in parts), names, frame)
    detail["operands"] = operands[: 2 * _LISTED]


def _without_gradient(
    parts: Iterable[ast.expr], names: Mapping[str, Any], frame: FrameType
) -> Iterator[dict[str, Any]]:
    """The ``w`` of each ``w.grad`` that is None because an op made it: only leaves keep one."""
    for part in parts:
        if isinstance(part, ast.Attribute) and part.attr == "grad":
            owner = _evaluate(part.value, names, frame)
            if type(owner) is torch.Tensor and not (owner.is_leaf or owner.retains_grad):
                yield {"name": _text(part.value), "tensor": owner}


def _failed_node(tb: TracebackType) -> ast.AST | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user's source is parsed anew
            found = executing.Source.executing(tb)
    except Exception as err:
        let_through(err)
        return None  # source that has changed or is not there
    node: ast.AST | None = found.node
    return node or _augmented(tb, found.statements or ())


def _augmented(tb: TracebackType, statements: Iterable[ast.stmt]) -> ast.AST | None:
    """The ``x += y`` of the line: before Python 3.11 `executing` does not know its instruction."""
    name = opcode.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]]
    found = [one for one in statements if isinstance(one, ast.AugAssign)]
    return found[0] if name.startswith("INPLACE_") and len(found) == 1 else None


def _parts(node: ast.AST) -> tuple[str | None, list[tuple[Any, ast.expr]]]:
    """Split an expression into its operation and the operands by position or keyword."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS.get(type(node.op)), [(0, node.left), (1, node.right)]
    if isinstance(node, ast.AugAssign):
        return _OPERATORS.get(type(node.op)), [(0, node.target), (1, node.value)]
    if isinstance(node, ast.Compare):
        return "compare", list(enumerate([node.left, *node.comparators]))
    if isinstance(node, ast.UnaryOp):
        return None, [(0, node.operand)]
    if isinstance(node, ast.Subscript):
        return "index", [(0, node.value), (1, node.slice)]
    if isinstance(node, ast.Assign):
        targets = [t for t in node.targets if isinstance(t, ast.Subscript)]
        return ("setitem", [(0, targets[0]), (1, node.value)]) if targets else (None, [])
    if isinstance(node, ast.Attribute):
        return node.attr, [(0, node.value)]
    if not isinstance(node, ast.Call):
        return None, []
    parts: list[tuple[Any, ast.expr]] = []
    operation = None
    if isinstance(node.func, ast.Attribute):
        operation = node.func.attr
        parts.append(("self", node.func.value))
    elif isinstance(node.func, ast.Name):
        operation = node.func.id
    parts += enumerate(arg.value if isinstance(arg, ast.Starred) else arg for arg in node.args)
    parts += [(word.arg, word.value) for word in node.keywords]
    return operation, parts


def _given(callee: TracebackType | None, node: ast.Call) -> dict[Any, Any]:
    """What a call got, from the locals of the function it entered: for operands like ``f(x)``."""
    if callee is None or any(isinstance(arg, ast.Starred) for arg in node.args):
        return {}
    frame = callee.tb_frame
    names, code = _locals_of(frame), frame.f_code
    if code.co_name == _ENTRY:
        args, kwargs = names.get("args"), names.get("kwargs")
        positional = enumerate(args if type(args) is tuple else ())
        return {**dict(positional), **(kwargs if type(kwargs) is dict else {})}
    if "/torch/" not in code.co_filename:
        return {}  # a function of anyone's may have bound its arguments anew
    words = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    found = {word: names[word] for word in words if word in names}
    bound = words[:1] == ("self",)
    ordered = [names.get(word, _MISSING) for word in words[bound : code.co_argcount]]
    return {**dict(enumerate(ordered)), **found}


def _operand(recorder: Recorder, name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"name": name, "tensor": value}
    if value is None or type(value) in (bool, int, float, str):
        return {"name": name, "value": value[:_TEXT] if isinstance(value, str) else value}
    if value is _MISSING:
        return {"name": name}
    known: dict[str, Any] = {"name": name, "cls": shorten(type(value).__name__)}
    if isinstance(value, nn.Module):
        known["module"] = recorder.names.known(value)
    return known


# ---- reading without calling


def _locals_of(frame: FrameType) -> dict[str, Any]:
    """Copy the locals of a frame, and leave no second reference to them in it.

    Before Python 3.13 a function's frame keeps the dict that it hands out, and with it the user's
    tensors until the function ends; one that somebody else holds too is left alone.
    """
    given = frame.f_locals
    names = dict(given)
    optimized = frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if optimized and type(given) is dict and sys.getrefcount(given) <= 3:
        given.clear()
    return names


def _evaluate(node: ast.expr, names: Mapping[str, Any], frame: FrameType) -> Any:
    """The value of an expression that needs no call; `_MISSING` for every other."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        for scope in (names, frame.f_globals):
            if node.id in scope:
                return scope[node.id]
        return _MISSING
    if isinstance(node, ast.Attribute):
        owner = _evaluate(node.value, names, frame)
        return _MISSING if owner is _MISSING else _attribute(owner, node.attr)
    if isinstance(node, ast.Subscript):
        owner = _evaluate(node.value, names, frame)
        key = _evaluate(node.slice, names, frame)
        if type(owner) is dict and type(key) in (int, str):
            return owner.get(key, _MISSING)
        if type(owner) in _SEQUENCES and type(key) is int and -len(owner) <= key < len(owner):
            return owner[key]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _evaluate(node.operand, names, frame)
        return -value if type(value) in (int, float) else _MISSING
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        if node.func.attr not in _VIEWS:
            return _MISSING
        owner = _evaluate(node.func.value, names, frame)
        given = [_evaluate(arg, names, frame) for arg in node.args]
        return _view(owner, node.func.attr, given)
    return _MISSING


def _view(tensor: Any, name: str, given: list[int]) -> Any:
    """Another shape of a tensor's own memory: nothing is computed, no device is touched."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or any(type(n) is not int for n in given):
        return _MISSING
    with quiet():
        try:
            return getattr(tensor, name)(*given) if given or name == "t" else getattr(tensor, name)
        except RuntimeError:
            return _MISSING


def _attribute(owner: Any, name: str) -> Any:
    """An attribute that lies in a dict; properties and `__getattr__` are the user's code."""
    if type(owner) in (torch.Tensor, nn.Parameter):
        if name in ("T", "mT"):
            return _view(owner, name, [])
        if name == "shape" or (name in ("grad", "data") and owner.is_leaf):
            return getattr(owner, name)
        return _MISSING
    for cls in type(owner).__mro__:
        if hasattr(type(cls.__dict__.get(name)), "__set__"):
            return _MISSING
        if not isinstance(cls.__dict__.get("__dict__"), (GetSetDescriptorType, type(None))):
            return _MISSING
    try:
        own: Mapping[str, Any] = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return _MISSING
    if isinstance(owner, nn.Module):
        for table in ("_parameters", "_buffers", "_modules"):
            if name in own.get(table, {}):
                return own[table][name]
    return own.get(name, _MISSING)


def _text(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 3]}..."


def _neighbours(location: Location) -> list[Any]:
    first = max(location.line - 1, 1)
    texts = [(n, line_text(location.file, n)) for n in range(first, location.line + 2)]
    return [[n, text.rstrip()[:200]] for n, text in texts if text]


# ---- torch's own frames


def _read_torch(entries: list[TracebackType], detail: dict[str, Any], seen: dict[int, str]) -> None:
    """The innermost function of torch's that takes tensors: their names there and in the line."""
    torchs = [tb.tb_frame.f_code for tb in entries]
    detail["torch"] = [c.co_name for c in torchs if "/torch/" in c.co_filename][-_KEYS:]
    for tb in reversed(entries):
        code = tb.tb_frame.f_code
        if code.co_name == _ENTRY or "/nn/" not in code.co_filename:
            continue
        names = _locals_of(tb.tb_frame)
        words = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        found = [(word, names[word]) for word in words if word in names]
        tensors = [(word, value) for word, value in found if isinstance(value, torch.Tensor)]
        if not tensors:
            continue
        detail["function"] = code.co_name
        detail["arguments"] = [
            {"name": word, "as": seen.get(id(value)), "tensor": value} for word, value in tensors
        ][:_LISTED]
        options = {word: value for word, value in found if type(value) is int}
        detail["options"] = dict(itertools.islice(options.items(), _LISTED))
        break
    for one in detail.get("entered", ()):
        one["as"] = seen.get(id(one["tensor"]))


def _measure_indices(detail: dict[str, Any], message: str) -> None:
    """Add least and largest value to whole-number tensors, if an index was out of range."""
    if not _INDEX_ERROR.search(message) or _DEVICE_DEAD.search(message):
        return
    for one in _described(detail):
        tensor = one.get("tensor")
        if tensor is None or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            continue
        stats = summarize(tensor)
        if stats.min is not None and stats.max is not None:
            one["min"], one["max"] = int(stats.min), int(stats.max)


def _described(detail: dict[str, Any]) -> list[dict[str, Any]]:
    groups = ("operands", "arguments", "entered", "parameters")
    return [one for group in groups for one in detail.get(group, ())]


def _plain(detail: dict[str, Any]) -> dict[str, Any]:
    """Put descriptions in the place of tensors, and leave out what is empty."""
    for one in _described(detail):
        tensor = one.pop("tensor", None)
        if tensor is not None:
            described = {"device": "cpu", **describe(tensor, 0)}
            shape = described.get("shape")
            one.update((key, described[key]) for key in _KEPT if described.get(key) is not None)
            one["shape"] = None if shape is None else list(shape)
        if one.get("as") is None:
            one.pop("as", None)
    return {key: value for key, value in detail.items() if value not in (None, [], {})}


def _state_dict(text: str) -> dict[str, Any]:
    """Read what torch says about a state dict, before the message is cut."""
    found: dict[str, Any] = {}
    for word, key in (("Missing", "missing"), ("Unexpected", "unexpected")):
        line = re.search(rf"{word} key\(s\) in state_dict: (.*)", text)
        names = re.findall(r'"([^"]*)"', line[1]) if line else []
        found[key] = {"count": len(names), "names": names[:_KEYS]}
    sizes = re.findall(
        r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]*)\]\) from "
        r"checkpoint, the shape in current model is torch\.Size\(\[([\d, ]*)\]\)",
        text,
    )
    found["sizes"] = {"count": len(sizes), "first": [list(one) for one in sizes[:_KEYS]]}
    return found
