"""Compiled programs train the same traced, compile as often, and go on compiling afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tensortrace import trace
from tests.capture import Net
from tests.neutral import (
    EVERY,
    STEPS,
    assert_neutral,
    assert_seen,
    assert_silent,
    one_thread,
    state,
)
from tests.neutral.test_training import fit_rings, rings

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
            pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    with one_thread():
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


def compiled_module(**options: Any) -> list[Any]:
    torch._dynamo.reset()
    model = Net(features=2)
    compiled: Any = torch.compile(model, **options)
    return fit_rings(compiled)


def compiled_in_place(**options: Any) -> list[Any]:
    torch._dynamo.reset()
    model = Net(features=2)
    model.compile(**options)
    return fit_rings(model)


def compiled_loss(**options: Any) -> list[Any]:
    """A compiled function that calls the model, as training scripts compile their step."""
    torch._dynamo.reset()
    model = Net(features=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = rings()

    @torch.compile(**options)
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return state(model, optimizer, losses)


PROGRAMS = [compiled_module, compiled_in_place, compiled_loss]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "fullgraph"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_compiled_program_trains_the_same_traced(
    program: Callable[..., list[Any]], fullgraph: bool, every: Any, backend: str
) -> None:
    records = assert_neutral(lambda: program(backend=backend, fullgraph=fullgraph), every=every)
    assert_silent(records)
    if program is not compiled_loss:
        assert_seen(records)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "fullgraph"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_run_eagerly_inside_the_block_every_module_is_seen(
    program: Callable[..., list[Any]], fullgraph: bool
) -> None:
    """aot_eager runs the ops of eager mode, so that here the bits can be the same."""
    records = assert_neutral(
        lambda: program(backend="aot_eager", fullgraph=fullgraph), every=1, compiled="eager"
    )
    assert_silent(records)
    assert_seen(records)
    assert set(records.described()) == {"", "net", "net.0", "net.1", "head"}
    assert records.actions("compiled") == []


@pytest.mark.parametrize("program", PROGRAMS[:2], ids=lambda program: program.__name__)
def test_a_boundary_says_how_many_modules_it_hides(program: Callable[..., list[Any]]) -> None:
    records = assert_neutral(lambda: program(backend="aot_eager"), every=1)
    (action,) = records.actions("compiled")
    assert action.detail == {"modules": 5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_torch_that_the_compiler_leaves_alone_stay_so(backend: str) -> None:
    def program() -> list[Any]:
        torch._dynamo.reset()
        layers = nn.Linear(2, 16), nn.GELU(), nn.LayerNorm(16), nn.Softmax(1), nn.Linear(16, 3)
        model = nn.Sequential(*layers)
        model.compile(backend=backend)
        return fit_rings(model)

    program()
    untraced = graphs()  # none in torch 2.13, all of it in torch 2.15
    assert_silent(assert_neutral(program, every=1))
    assert graphs() == 3 * untraced


class Logs(nn.Module):
    """Takes logarithms that are -inf for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(x), -1).log()  # the cause


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [4, 230])
def test_a_module_compiled_in_place_is_called_and_run_again_like_others(
    at: int, backend: str
) -> None:
    net = Logs()
    net.compile(backend=backend)
    compiled = net._compiled_call_impl
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with trace(out=[].append) as t:
        for step in range(at + 3):
            x = torch.randn(8, 4) * (1e4 if step == at else 1)
            optimizer.zero_grad()
            F.nll_loss(net(x), torch.arange(8) % 3).backward()
            optimizer.step()
    (found,) = t.findings
    assert (found.code, found.step, found.op) == ("TT101", at, "log")
    assert found.location is not None
    assert found.location.code.endswith("# the cause")
    assert net._compiled_call_impl is compiled
    assert graphs() == 1


def test_a_module_compiled_in_place_that_raises_is_told_of() -> None:
    net = Logs()
    net.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="fake tensor"), trace(out=[].append) as t:
        for width in (4, 4, 5):
            net(torch.randn(8, width))
    (found,) = t.findings
    assert (found.code, found.module) == ("TT801", "")


def graphs() -> int:
    """How many graphs were compiled since the counters were cleared."""
    return counters["stats"]["unique_graphs"]


def stepper(fullgraph: bool) -> Callable[[], Any]:
    model = Net(features=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = rings()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)

    def step() -> Any:
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "fullgraph"])
def test_toggling_a_decorated_step_twelve_times_does_not_compile_anew(
    fullgraph: bool, tmp_path: Path
) -> None:
    step = stepper(fullgraph)
    decorated = trace(tmp_path / "log.jsonl", every=1)
    traced = decorated(step)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        step()
        for _ in range(12):
            traced()
            step()
    decorated.close()
    # One without hooks, one with them in place: a decorated function keeps them between calls.
    assert graphs() <= 2


def test_blocks_around_a_compiled_step_do_not_hit_the_recompile_limit() -> None:
    step = stepper(fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(12):
            step()
            with trace(out=[].append, every=1):
                step()
    assert graphs() <= 2


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6")
@pytest.mark.parametrize("lines", [False, True], ids=["", "lines"])
def test_a_warm_step_is_not_compiled_anew_where_that_is_forbidden(lines: bool) -> None:
    step = stepper(fullgraph=True)
    step()
    step()
    decorated = trace(out=[].append, every=1, lines=lines)
    traced = decorated(step)
    with torch.compiler.set_stance("fail_on_recompile"):
        traced()
        traced()
    decorated.close()
    assert graphs() == 1


def test_what_first_ran_inside_a_block_runs_compiled_after_it() -> None:
    """A dispatch mode in force makes Dynamo skip a frame for good (pytorch issue 190286)."""
    ran: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(1)
            return module.forward(*arguments)

        return run

    model: Any = torch.compile(Net(features=2), backend=backend, fullgraph=True)
    x, _ = rings()
    with trace(out=[].append, every=1):
        model(x)
    inside = len(ran)
    model(x)
    assert (inside, len(ran)) == (1, 2)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("level", ["module", "op"])
def test_a_nan_of_a_compiled_function_is_not_told_of_as_data(level: str) -> None:
    """The generated code calls `addmm` with what its own kernels have made."""
    head = nn.Linear(16, 3)

    def scaled(h: Tensor, t: Tensor) -> Tensor:
        return head(h * torch.sqrt(t))

    def program(compiled: Any, step: Callable[[], None]) -> None:
        for turn in range(3):
            t = torch.full((4, 1), -1.0 if turn == 2 else 1.0)
            out = compiled(torch.randn(4, 16), t)
            F.cross_entropy(out, torch.zeros(4, dtype=torch.int64)).backward()
            step()

    told = []
    for how in ("boundary", "eager"):
        torch._dynamo.reset()
        with trace(out=[].append, level=level, compiled=how) as t:
            program(torch.compile(scaled, backend="inductor"), t.step)
        told.append([(f.code, f.step, f.op) for f in t.findings if f.severity == "error"])
        assert "compiled" in (t.findings[0].fix or "") or how == "eager"
    assert told == [[("TT103", 2, "cross_entropy")], [("TT101", 2, "sqrt")]]
