"""Every module of `torch.nn`, with every sample that torch itself tests it with."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tensortrace import trace
from tests.capture import Recorded
from tests.neutral import one_thread
from tests.neutral import state as values
from tests.test_edge_programs import attributes, fingerprint, hooks, rng_state, seed

# A module, one of its samples and the mode it runs in.
Sample = tuple[Any, Any, bool]
GROUPS = 4


def dtype_of(info: Any) -> torch.dtype:
    # The random samples that torch gives these two are f64 whatever is asked for.
    return torch.float64 if "FractionalMaxPool" in info.name else torch.float32


@functools.cache
def samples() -> list[Sample]:
    """All samples of all modules, in training and in evaluation mode; drawn from one seed."""
    # Not at the top: it takes seconds, and whoever runs one other test need not wait.
    from torch.testing._internal.common_modules import module_db

    seed()
    return [
        (info, sample, training)
        for info in module_db
        for training in (True, False)
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=dtype_of(info), requires_grad=True, training=training
        )
    ]


def fresh(arguments: Any) -> Any:
    """Copy the arguments of a sample; where one tensor is given twice, so is its copy."""
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf)
        copy_of = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return copies.setdefault(id(leaf), copy_of)

    return pytree.tree_map(copied, arguments)


def run(info: Any, sample: Any, training: bool) -> list[Any]:
    """Forward and backward of one sample; whatever it makes, to the bit."""
    seed()
    arguments = fresh((sample.forward_input.args, sample.forward_input.kwargs))
    module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    module.train(training)
    outputs = pytree.tree_leaves(module(*arguments[0], **arguments[1]))
    tensors = [t for t in outputs if isinstance(t, Tensor)]
    losses = [t.sum() for t in tensors if t.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    # Read the random states before anything else can draw.
    state = rng_state()
    leaves = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    inputs = [tensor for leaf in leaves for tensor in (leaf, leaf.grad)]
    return [fingerprint([*tensors, *inputs, *values(module)]), state]


def compare(chosen: list[Sample], tracer: Any = None, level: Any = "module") -> Recorded:
    """Run samples plain, then all of them in one trace; they must not differ in a bit."""
    records = Recorded()
    with one_thread():
        plain = [run(*sample) for sample in chosen]
        before = attributes()
        with tracer or trace(out=records.append, every=1, level=level):
            traced = [run(*sample) for sample in chosen]
    different = [
        f"{info.name} {sample.desc} training={training}"
        for (info, sample, training), a, b in zip(chosen, plain, traced, strict=True)
        if a != b
    ]
    assert different == []
    assert [a.detail for a in records.actions("tracer_error")] == []
    assert hooks() == {}, "hooks left behind"
    assert attributes() == before, "methods left wrapped"
    return records


@pytest.mark.parametrize(("level", "one_in"), [("module", 10), ("op", 30)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_some_of_all_module_samples_are_the_same_traced(level: str, one_in: int) -> None:
    chosen = random.Random(0).sample(samples(), len(samples()) // one_in)
    records = compare(chosen, level=level)
    assert len(records.modules()) >= len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_all_module_samples_are_the_same_traced(group: int, level: str) -> None:
    chosen = samples()[group::GROUPS]
    records = compare(chosen, level=level)
    assert len(records.modules()) >= len(chosen)


@contextlib.contextmanager
def packs_attention_anew() -> Iterator[None]:
    """A full backward hook: it hands every module a copy of its input."""
    from torch.nn.modules.module import register_module_full_backward_hook

    handle = register_module_full_backward_hook(lambda module, grad_in, grad_out: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_comparison_sees_what_full_backward_hooks_change() -> None:
    chosen = [s for s in samples() if s[0].name == "nn.TransformerEncoderLayer" and s[2]][:8]
    with pytest.raises(AssertionError, match=r"nn\.TransformerEncoderLayer"):
        compare(chosen, packs_attention_anew())
