"""Gradients: prehooks on the autograd nodes of module outputs, tensor hooks on parameters.

A node prehook sees the gradient after the user's own tensor hooks, pickles silently, and works
with autograd.grad; a tensor hook on a non-leaf would warn on pickling, and a full backward hook
would change the program. A parameter has a tensor hook, since holding its AccumulateGrad node
would pin the stream that it was made on. A hook knows numbers and names only: a reference to a
tensor or node would keep the graph alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn

from tensortrace.capture.active import here, slot
from tensortrace.capture.compiled import untracked
from tensortrace.capture.drafts import (
    GradientDraft,
    NodeDraft,
    NodeSite,
    ParameterGradientDraft,
)
from tensortrace.capture.tensors import TensorDraft, version_of
from tensortrace.capture.unwrap import node_of
from tensortrace.text import shorten

if TYPE_CHECKING:
    from torch.autograd.graph import Node
    from torch.utils.hooks import RemovableHandle

    from tensortrace.capture.modules import OpenCall
    from tensortrace.capture.receiver import Receiver

_no_functions = torch._C.DisableTorchFunction
_is_functorch = torch._C._functorch.is_functorch_wrapped_tensor
_ACCUMULATE = 2**63  # AccumulateGrad nodes count from here


class OutputProbe(msgspec.Struct, gc=False, eq=False):
    """Reports the gradient that arrives at one output of one node.

    `sites` are (seq, module path, output name, nth) of each call that returned the tensor, inner
    first.
    """

    serial: int
    step: int
    nr: int
    tensor: int
    sites: list[tuple[int, str, str, int]]

    def __call__(self, grads: tuple[torch.Tensor | None, ...]) -> None:
        """Take the gradients of all outputs of the node; ours may be None."""
        recorder = _listening(self.serial)
        if recorder is None:
            return
        with _no_functions():
            here.busy += 1
            try:
                here.rest()
                grad = grads[self.nr] if self.nr < len(grads) else None
                if grad is not None:
                    self._report(recorder, grad)
            except Exception as error:
                recorder.fault("gradients", error)
            finally:
                here.busy -= 1
                here.go_on()

    def _report(self, recorder: Receiver, grad: torch.Tensor) -> None:
        same_step = self.step == recorder.step
        number, draft = recorder.tensors.gradient(grad, self.tensor if same_step else None)
        if recorder.roots is not None and same_step:
            for seq, _, name, _ in self.sites:
                recorder.roots.saw_gradient(seq, name, grad, recorder.seq)
        described: TensorDraft | None = draft
        for seq, path, name, nth in reversed(self.sites):
            recorder.pend(
                GradientDraft(
                    recorder.step, recorder.next_seq(), recorder.update,
                    seq if same_step else None, path, nth, name, number, described,
                )
            )  # fmt: skip
            described = None
        recorder.now.backward_seen = True


class ParameterProbe:
    """Reports the gradient that a backward pass makes for one parameter."""

    __slots__ = ("key", "name", "path", "serial")

    def __init__(self, serial: int, key: int, path: str, name: str) -> None:
        self.serial, self.key, self.path, self.name = serial, key, path, name

    def __call__(self, grad: torch.Tensor | None) -> None:
        """Take what this backward pass makes for the parameter; a Function may say None."""
        recorder = _listening(self.serial)
        if recorder is None or grad is None:
            return
        with _no_functions():
            here.busy += 1
            try:
                here.rest()
                _, draft = recorder.tensors.gradient(grad, None)
                seq, path = recorder.next_seq(), self.path
                call = ParameterGradientDraft(
                    recorder.step, seq, recorder.update, path, self.name, draft
                )
                recorder.pend(call)
                recorder.parameters.saw_gradient(self.key, grad, draft)
                recorder.now.backward_seen = True
                if slot.called and slot.note_gradient():
                    recorder.note_threads()  # at once: it may have ended when an optimizer steps
            except Exception as error:
                recorder.fault("gradients", error)
            finally:
                here.busy -= 1
                here.go_on()


class NodeProbe(msgspec.Struct, gc=False, eq=False):
    """Reports one autograd node of an op: gradients that arrived and were made.

    There are thousands of them while a graph lives: each is as little as can be.
    """

    site: NodeSite
    node: str

    def __call__(
        self, made: tuple[torch.Tensor | None, ...], arrived: tuple[torch.Tensor | None, ...]
    ) -> None:
        """Take what the node made for its inputs, and what had arrived for its outputs. Hot."""
        site = self.site
        recorder = _listening(site.serial)
        if recorder is None:
            return
        with _no_functions():
            here.busy += 1
            try:
                here.rest()
                step, seq, update = recorder.step, recorder.next_seq(), recorder.update
                grads = recorder.tensors.gradients(arrived, made)
                recorder.pend(NodeDraft(step, seq, update, site, self.node, len(arrived), grads))
                recorder.now.backward_seen = True
            except Exception as error:
                recorder.fault("gradients", error)
            finally:
                here.busy -= 1
                here.go_on()


def watch_output(
    recorder: Receiver, tensor: torch.Tensor, number: int, call: OpenCall, name: str
) -> object:
    """Report the gradient of a module's output when it arrives; returns its node. Hot."""
    if not recorder.on["gradients"] or _is_functorch(tensor):
        return None
    node = node_of(tensor)
    if node is None:
        return None
    if not here.stack and recorder.full and not call.recompute:
        recorder.tensors.compare_outputs(tensor, number)
    nr = tensor.output_nr
    # Node.metadata lives on the node itself: the same tensor returned by nested modules is
    # measured once. Keying a table of ours by the node would keep its graph alive.
    metadata: dict[Any, Any] = node.metadata  # type: ignore[assignment]
    # A string and a struct without `gc`: so the garbage collector passes the dict over, too.
    key = f"tensortrace {nr}"
    probe = metadata.get(key)
    if probe is None or probe.serial != recorder.serial or probe.step != call.step:
        sites: list[tuple[int, str, str, int]] = untracked([])
        probe = OutputProbe(recorder.serial, call.step, nr, number, sites)
        metadata[key] = probe
        node.register_prehook(probe)
    probe.sites.append((call.seq, call.path, name, call.nth))
    return node


def watch_nodes(recorder: Receiver, result: torch.Tensor, since: int, site: NodeSite) -> None:
    """Report every node that an op has just made, when it runs backward. Hot."""
    if not recorder.on["gradients"] or _is_functorch(result):
        return
    serial = site.serial
    todo: list[Node | None] = [node_of(result)]
    while todo:
        node = todo.pop()
        if node is None or not since <= node._sequence_nr() < _ACCUMULATE:
            continue
        metadata: dict[Any, Any] = node.metadata  # type: ignore[assignment]
        if metadata.get("tensortrace") == serial:
            continue
        metadata["tensortrace"] = serial
        node.register_hook(NodeProbe(site, node.name()))
        for parent, _ in node.next_functions:
            todo.append(parent)


class _Watched:
    __slots__ = ("handle", "owner", "pointer", "probe", "reached", "tensor", "version")

    def __init__(
        self, handle: RemovableHandle, owner: weakref.ref[nn.Module], probe: ParameterProbe
    ) -> None:
        self.handle, self.owner, self.probe = handle, owner, probe
        self.pointer = self.version = -1
        self.tensor: TensorDraft | None = None
        self.reached = False


class Parameters:
    """The parameters met so far: their names, their hooks, their last gradient.

    Keyed by identity. No reference to a parameter is kept, weak ones included: torch refuses to
    swap a tensor that has weak references.
    """

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def watch(
        self, parameter: nn.Parameter, owner: nn.Module, path: str, name: str, serial: int
    ) -> None:
        """Hook a parameter once. Hot."""
        entry = self._watched.get(id(parameter))
        if entry is not None and _is_hooked(parameter, entry):
            known = entry.probe.name
            renamed = known != name and entry.owner() is owner
            if renamed and own_parameters(owner).get(known) is not parameter:
                entry.probe.name = shorten(name)  # pruning makes `weight_orig` of `weight`
            return
        name = shorten(name)
        probe = ParameterProbe(serial, id(parameter), path, name)
        handle = parameter.register_hook(probe)  # type: ignore[no-untyped-call]
        self._watched[id(parameter)] = _Watched(handle, weakref.ref(owner), probe)

    def name_of(self, parameter: torch.Tensor) -> tuple[str, str] | None:
        """(module path, local name) of a parameter, None if no module that ran owns it."""
        entry = self._watched.get(id(parameter))
        if entry is None or not _is_hooked(parameter, entry):
            return None
        return entry.probe.path, entry.probe.name

    def take_reached(self, parameter: torch.Tensor) -> bool:
        """Whether a backward pass has made a gradient for a parameter since this was asked."""
        entry = self._watched.get(id(parameter))
        reached = entry is not None and entry.reached
        if entry is not None:
            entry.reached = False
        return reached

    def was_replaced(self, parameter: torch.Tensor) -> bool:
        """Whether the module that had a parameter when it was called has it no longer."""
        entry = self._watched.get(id(parameter))
        owner = entry.owner() if entry is not None else None
        if entry is None or owner is None:
            return True
        return own_parameters(owner).get(entry.probe.name) is not parameter

    def saw_gradient(self, key: int, grad: torch.Tensor, tensor: TensorDraft) -> None:
        """Remember what a backward pass delivered, to know it again as ``.grad``."""
        entry = self._watched.get(key)
        if entry is not None:
            entry.pointer, entry.version, entry.tensor = pointer_of(grad), version_of(grad), tensor
            entry.reached = True

    def gradient_seen(self, parameter: torch.Tensor, grad: torch.Tensor) -> TensorDraft | None:
        """The description of ``.grad`` if it is, unchanged, what the last backward delivered."""
        entry = self._watched.get(id(parameter))
        if entry is None or entry.tensor is None:
            return None
        same = entry.pointer == pointer_of(grad) and entry.version == version_of(grad)
        return entry.tensor if same and entry.pointer else None

    def forget_gradients(self) -> None:
        """Drop what belongs to the step that ended, and the parameters that are gone."""
        gone = []
        for key, entry in list(self._watched.items()):
            entry.tensor = None
            # The table of hooks dies with its parameter, and the handle knows it by weak reference.
            if entry.handle.hooks_dict_ref() is None:
                gone.append(key)
        for key in gone:
            self._watched.pop(key, None)

    def remove(self) -> None:
        """Take every hook away."""
        for entry in list(self._watched.values()):
            entry.handle.remove()
        self._watched.clear()


def watch_parameters(recorder: Receiver, module: nn.Module, path: str) -> None:
    """Report the gradients of a module's own parameters. Hot."""
    if not recorder.on["gradients"]:
        return
    for name, parameter in own_parameters(module).items():
        if parameter is None or not parameter.requires_grad or not parameter.is_leaf:
            continue
        if not _is_functorch(parameter):
            recorder.parameters.watch(parameter, module, path, name, recorder.serial)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module itself registered. Hot."""
    own = module._parameters
    # A scripted module's table is no dict and cannot be asked the same way.
    return own if isinstance(own, dict) else dict(module.named_parameters(recurse=False))


def is_training(module: nn.Module) -> bool:
    """Whether a module is in training mode. Hot."""
    try:
        return module.training
    except AttributeError:  # a script module that torch.jit.freeze made has no such mode
        return False


def _is_hooked(parameter: torch.Tensor, entry: _Watched) -> bool:
    hooks = parameter._backward_hooks
    return hooks is not None and entry.handle.hooks_dict_ref() is hooks


def pointer_of(grad: torch.Tensor) -> int:
    """Where a gradient lies; 0 where that tells nothing: subclasses, sparse, meta, batched."""
    if type(grad) is not torch.Tensor or grad.layout is not torch.strided:
        return 0
    try:
        return grad.data_ptr()
    except RuntimeError:
        return 0


def _listening(serial: int) -> Receiver | None:
    recorder = slot.recorder
    if recorder is None or recorder.serial != serial or here.busy or not recorder.on["gradients"]:
        return None
    return recorder
