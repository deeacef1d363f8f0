"""Edge programs run plain and traced: same tensors to the bit, same errors, nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import random
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tensortrace import trace
from tests import programs
from tests.programs import PROGRAMS, Program

for found in iter_modules(programs.__path__, "tests.programs."):
    import_module(found.name)

# What a tracer may wrap: afterwards each name must hold the very object that it held before.
WRAPPED = (
    torch.Tensor, torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, DataLoader,
    _BaseDataLoaderIter, torch.autograd, torch.nn.utils, torch.nn.utils.clip_grad,
)  # fmt: skip


def parameters() -> list[Any]:
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    importlib.util.find_spec(program.package) is None,
                    reason=f"needs {program.package}",
                ),
            ]
            if program.package
            else [],
        )
        for name, program in sorted(PROGRAMS.items())
    ]


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def rng_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().numpy().tobytes(), random.getstate(), name, keys.tobytes(), rest]


def hooks() -> dict[str, list[str]]:
    """Every hook, mode and saved-tensor hook that is in force for the whole process."""
    found = {
        f"{home.__name__}.{name}": sorted(map(repr, value.values()))
        for home in (modules, optimizers)
        for name, value in vars(home).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    found["function modes"] = list(map(repr, _get_current_function_mode_stack()))
    found["dispatch modes"] = list(map(repr, _get_current_dispatch_mode_stack()))
    return {name: entries for name, entries in found.items() if entries}


def attributes() -> dict[tuple[str, str], int]:
    return {
        (home.__name__, name): id(value)
        for home in WRAPPED
        for name, value in vars(home).items()
        if callable(value) or isinstance(value, property | staticmethod | classmethod)
    }


def fingerprint(value: Any) -> Any:
    """The bits and the outside of every tensor: NaN positions and signed zeros count."""
    if isinstance(value, Tensor):
        plain = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return (
            type(value), value.dtype, value.shape, value.requires_grad,
            plain.view(torch.uint8).numpy().tobytes(),
        )  # fmt: skip
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    assert value is None, type(value)
    return None


def outcome(program: Program, tracer: Callable[[], Any], **arguments: Any) -> dict[str, Any]:
    """Run a program from a fixed seed; returns what must not depend on being traced."""
    seed()
    result, error = None, None
    with warnings.catch_warnings():
        for message in program.warns:
            warnings.filterwarnings("ignore", message)
        try:
            with tracer():
                result = program.run(**arguments)
        except Exception as raised:
            error = raised
    # Read the random states before anything else can draw.
    state = rng_state()
    if program.raises is None and error is not None:
        raise error
    first_line = str(error).split("\n")[0]
    return {"tensors": fingerprint(result), "error": (type(error), first_line), "random": state}


def compare(name: str, tracer: Callable[[], Any]) -> None:
    program = PROGRAMS[name]
    inner: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    if name == "nested_trace":
        inner = ({"trace": contextlib.nullcontext}, {"trace": trace})
    plain = outcome(program, contextlib.nullcontext, **inner[0])
    assert plain["error"][0] is (program.raises or type(None))
    before = attributes()
    assert hooks() == {}
    traced = outcome(program, tracer, **inner[1])
    assert hooks() == {}, "hooks left behind"
    assert attributes() == before, "methods left wrapped"
    assert traced == plain


def read(path: Path) -> list[dict[str, Any]]:
    """Read a log with the standard library alone; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the log")

    return [
        json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()
    ]


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", parameters())
def test_program_is_the_same_traced(
    name: str, level: Literal["module", "op"], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    compare(name, lambda: trace(log, level=level))

    records = read(log)
    errors = [r for r in records if r["kind"] == "action" and r["action"] == "tracer_error"]
    assert errors == []
    assert records[0]["kind"] == "header"
    assert records[-1]["kind"] == "end"
    assert records[-1]["why"] == ("exception" if PROGRAMS[name].raises else "exit")


# The comparison must be able to fail: tracers that do what a tracer must never do.


@contextlib.contextmanager
def draws_a_number() -> Iterator[None]:
    torch.rand(1)
    yield


@contextlib.contextmanager
def leaves_a_hook() -> Iterator[None]:
    torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    yield


@contextlib.contextmanager
def leaves_a_wrapper() -> Iterator[None]:
    wrapped = functools.wraps(torch.optim.Optimizer.zero_grad)(lambda optimizer: None)
    torch.optim.Optimizer.zero_grad = wrapped  # type: ignore[assignment]
    yield


@contextlib.contextmanager
def swallows_errors() -> Iterator[None]:
    with contextlib.suppress(RuntimeError):
        yield


@pytest.mark.parametrize(
    ("name", "tracer"),
    [
        ("optimizer_train", draws_a_number),
        ("reuse_module", leaves_a_hook),
        ("reuse_module", leaves_a_wrapper),
        ("residual_inplace", swallows_errors),
    ],
)
def test_comparison_sees_a_tracer_that_interferes(
    name: str, tracer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "_global_forward_hooks", modules._global_forward_hooks.copy())
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", torch.optim.Optimizer.zero_grad)
    with pytest.raises(AssertionError):
        compare(name, tracer)


def test_fingerprint_tells_signed_zeros_and_nan_positions_apart() -> None:
    nan = float("nan")
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    assert fingerprint(torch.tensor([nan, 1.0])) != fingerprint(torch.tensor([1.0, nan]))
    assert fingerprint(torch.tensor([nan])) == fingerprint(torch.tensor([nan]))
