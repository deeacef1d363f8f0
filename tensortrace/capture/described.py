"""Which modules were described, and as what: a record each, and again when one changes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from tensortrace.capture.dropouts import dropout_line
from tensortrace.capture.frozen_in_vain import frozen_in_vain
from tensortrace.capture.gradients import is_training, own_parameters
from tensortrace.capture.names import ModuleNames, unwrapped
from tensortrace.capture.source import SourceLines
from tensortrace.capture.tensors import dtype_name
from tensortrace.capture.untrained_norms import is_untrained
from tensortrace.records import Module, ParameterInfo
from tensortrace.text import shorten


class Descriptions:
    """By path and class: what a module was when it was last looked at, and last described."""

    def __init__(self, names: ModuleNames, sources: SourceLines) -> None:
        self._names, self._sources = names, sources
        self._seen: dict[tuple[str, type], tuple[Any, ...]] = {}
        self._said: dict[tuple[str, type], int] = {}

    def known_among(self, modules: dict[int, nn.Module]) -> frozenset[int]:
        """Those of some modules, by id, that were looked at. Hot."""
        path_of, seen = self._names.known, self._seen
        return frozenset(
            key for key, module in modules.items() if (path_of(module), type(module)) in seen
        )

    def look(self, module: nn.Module, path: str, step: int) -> tuple[Module | None, bool]:
        """The record of a module that is called, if there is news; whether it is the first. Hot."""
        own, training = own_parameters(module), is_training(module)
        grads = [p is not None and p.requires_grad for p in own.values()] if own else ()
        frozen = vars(module).get("requires_grad") is False
        # A parameter may get another name while it is trained: pruning makes weight weight_orig.
        state = (id(module), training, frozen, *grads, *own)
        cls = type(module)
        if self._seen.get((path, cls)) == state:
            return None, False
        first = (path, cls) not in self._seen
        self._seen[path, cls] = state
        code = getattr(getattr(cls, "forward", None), "__code__", None)
        drops = None if training else dropout_line(module)
        record = Module(
            step=step,
            path=path,
            cls=shorten(cls.__name__),
            training=training,
            registered=path not in self._names.unregistered,
            untrained=is_untrained(module),
            drops=self._sources.locate_line(*drops) if drops is not None else None,
            parameters=[
                ParameterInfo(
                    shorten(name),
                    tuple(p.shape),
                    dtype_name(p.dtype),
                    str(p.device),
                    p.requires_grad,
                )
                for name, p in own.items()
                if p is not None and not nn.parameter.is_lazy(p)
            ],
            frozen=[shorten(name) for name in frozen_in_vain(module, own)],
            places=self._names.places.get(path, 0),
            inert=isinstance(module, _DropoutNd) and module.p == 0,
            forward=self._sources.locate_code(code) if code is not None else None,
        )
        # Another module in the place of the last one (a criterion or a replica made anew in each
        # step) is worth a line only if it differs.
        said = hash(
            (record.training, record.places, record.inert, *record.frozen, *record.parameters)
        )
        if self._said.get((path, cls)) == said:
            return None, first
        self._said[path, cls] = said
        return record, first


def count_compiled(module: nn.Module) -> int:
    """How many modules run compiled from here on: itself with all inside it, or children."""
    inner = unwrapped(module) if type(module).__name__ == "OptimizedModule" else None
    if inner is None and getattr(module, "_compiled_call_impl", None) is not None:
        inner = module
    if inner is not None:
        return sum(1 for _ in inner.modules())
    return sum(
        getattr(child, "_compiled_call_impl", None) is not None for child in module.children()
    )
