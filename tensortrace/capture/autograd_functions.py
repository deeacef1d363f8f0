"""Autograd functions of the user's own: their backward, with the line that it is written at.

`torch.autograd.Function.apply` is no function that a mode is shown, and what runs in its `forward`
leaves no node. So the node is met on its result: by what takes that, or as it is returned.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import BackwardCFunction

from tensortrace.capture.drafts import NodeSite
from tensortrace.capture.gradients import NodeProbe
from tensortrace.capture.source import definition_line
from tensortrace.capture.unwrap import node_of
from tensortrace.records import Location
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.receiver import Receiver

_is_functorch = torch._C._functorch.is_functorch_wrapped_tensor


def watch_function(recorder: Receiver, tensor: torch.Tensor, path: str | None) -> None:
    """Report the backward of the user's function that made a tensor, if one did. Hot.

    Args:
        recorder: what to report to.
        tensor: any that requires grad.
        path: of the module in whose forward it was met; None outside modules.
    """
    if not recorder.on["gradients"] or _is_functorch(tensor):
        return
    node: object = node_of(tensor)
    if isinstance(node, BackwardCFunction):
        watch_functions(recorder, node, path)


def watch_functions(recorder: Receiver, last: BackwardCFunction, path: str | None) -> None:
    """Report the backward of a function, and of those right behind it: nothing took their result.

    Args:
        recorder: what to report to.
        last: the node of the one whose result was met.
        path: of the module in whose forward that was; None outside modules.
    """
    todo: list[Any] = [last]
    while todo:
        node = todo.pop()
        if not isinstance(node, BackwardCFunction):
            continue
        if node.metadata.get("tensortrace") == recorder.serial:
            continue
        node.metadata["tensortrace"] = recorder.serial
        function: Any = type(node)._forward_cls  # type: ignore[attr-defined]
        location = _backward_of(recorder, function)
        if location is not None:
            name = shorten(function.__name__)
            site = NodeSite(recorder.serial, recorder.step, name, path, None, location)
            node.register_hook(NodeProbe(site, f"{name}Backward"))
        todo.extend(parent for parent, _ in node.next_functions)


def _backward_of(recorder: Receiver, function: Any) -> Location | None:
    """Where the backward of a function is defined; None if it is not the user's.

    Of one that is no function of Python's (a callable object, a C extension) it is its forward.
    """
    for name in ("backward", "vjp", "forward"):
        # Decorators of torch's wrap it.
        code = getattr(inspect.unwrap(getattr(function, name)), "__code__", None)
        if code is not None and recorder.sources.is_user(code):
            return recorder.sources.locate_line(code, definition_line(code))
    return None
