"""Calls that cannot run again say why, those that can do; training stays the same to the bit."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.capture import roots
from tensortrace.capture.replay import aside
from tensortrace.records import Action, Finding
from tests.capture import Recorded
from tests.test_edge_programs import fingerprint, rng_state

Make = Callable[[], nn.Module]


def spoil(h: Tensor) -> Tensor:
    """The planted fault: the log of zeros."""
    return h + (h * 0).log()


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(spoil(self.inner(x)))


class KeywordsOnly(Faulty):
    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale)


class Cache(Faulty):
    """Grows a cache of keys at each call, as a model that generates does."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.keys.append(self.inner(x).detach())
        return super().forward(x) + torch.cat(self.keys).mean()


class HoldsAGraph(Faulty):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        return self.outer(spoil(self.last))


class Tied(Faulty):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight


class Representation(tuple):  # type: ignore[type-arg]
    """A tuple that is made otherwise, has no length, and whose parts are not to be read."""

    def __new__(cls, degree: int, parity: int) -> Any:
        return super().__new__(cls, (degree, parity))

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError


class Equivariant(Faulty):
    def __init__(self) -> None:
        super().__init__()
        self.kind = Representation(1, -1)


class Recurrent(Faulty):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.rnn(x[:, None])[0][:, 0])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def old_norms() -> nn.Module:
    model = Faulty()
    model.inner = torch.nn.utils.weight_norm(model.inner)
    model.outer = torch.nn.utils.spectral_norm(model.outer)
    return model


def patched_forward() -> nn.Module:
    model = Faulty()
    original = model.inner.forward
    model.inner.forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    return model


def grad_cam() -> nn.Module:
    """Hooks of the user's keep an activation, and its gradient."""
    model = Faulty()
    model.seen = []  # type: ignore[assignment]

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        model.seen.append(output.detach())
        if output.requires_grad:
            output.register_hook(model.seen.append)

    model.inner.register_forward_hook(keep)
    return model


def compiled() -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(Faulty(), backend="eager")  # type: ignore[return-value]


def scripted() -> nn.Module:
    return torch.jit.script(Scriptable())  # type: ignore[no-any-return]


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x + (x * 0).log())


def step(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x=x) if isinstance(model, KeywordsOnly) else model(x)
    return out.square().mean()


def train(make: Make, *, scaled: bool = False) -> list[Any]:
    """Two updates; everything that a replay could have touched, to the bit."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for _ in range(2):
        x = torch.randn(3, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
            loss = step(model, x)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    state = [*(p.detach() for p in model.parameters()), *(p.grad for p in model.parameters())]
    kept = [t for m in model.modules() for name in ("keys", "seen") for t in getattr(m, name, [])]
    return [fingerprint([*state, *model.buffers(), *kept]), scaler.get_scale(), rng_state()]


def narrowed(make: Make, **options: Any) -> tuple[list[Finding], list[Any]]:
    """Train plain and traced: the same bits. Returns what was found, and what replays came to."""
    plain = train(make, **options)
    records = Recorded()
    with trace(out=records.append, every=1, compiled="boundary") as t:
        traced = train(make, **options)
    assert traced == plain
    assert records.actions("tracer_error") == []
    return t.findings, [a.detail["placed"] for a in records.of(Action, action="replay")]


EXACT: dict[str, Make] = {
    "keyword arguments only": KeywordsOnly,
    "a cache that grows": Cache,
    "an attribute that holds a graph": HoldsAGraph,
    "tied weights": Tied,
    "a tuple of a class of its own": Equivariant,
    "an LSTM with flat weights": Recurrent,
    "weight norm and spectral norm by hooks": old_norms,
    "a forward patched by a closure": patched_forward,
    "hooks that keep activations and gradients": grad_cam,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", EXACT)
def test_call_is_run_again_and_the_op_is_named(name: str) -> None:
    found, placed = narrowed(EXACT[name])
    error = next(finding for finding in found if finding.severity == "error")
    assert (error.op, error.evidence["placed"]) == ("log", "exact")
    assert placed == ["exact"]
    assert error.location is not None
    assert error.location.code == "return h + (h * 0).log()"


def test_autocast_is_as_it_was() -> None:
    """Under a scaler, whose skipped steps are its own affair, the loss is what is not finite."""
    found, placed = narrowed(Faulty, scaled=True)
    assert {finding.op for finding in found if finding.severity == "error"} == {"log"}
    assert placed == ["exact"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_module_is_refused() -> None:
    assert set(narrowed(scripted)[1]) <= {"a scripted module"}


def test_compiled_module_is_run_again_as_it_was_written() -> None:
    found, placed = narrowed(compiled)
    torch._dynamo.reset()
    error = next(finding for finding in found if finding.severity == "error")
    assert error.op == "log"
    # The compiled call showed none of its modules: there is nothing to compare theirs with.
    assert placed == ["close"]


def test_more_than_is_kept_of_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "MOST_BYTES", 8)
    found, placed = narrowed(Faulty)
    assert len(placed) == 1
    assert "exceed" in placed[0]
    (error,) = [finding for finding in found if finding.severity == "error"]
    assert (error.op, error.evidence["placed"]) == (None, placed[0])
    assert "between the exit of inner (Linear) and the entry of outer (Linear)" in error.message


def test_keyword_arguments_that_are_more_than_is_kept_stop_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roots, "MOST_BYTES", 8)
    records: list[Any] = []

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

        def forward(self, *, x: Tensor) -> Tensor:
            return x * self.scale

    with trace(out=records.append):
        Given()(x=torch.ones(100))
    assert not [r for r in records if isinstance(r, Action) and r.action == "tracer_error"]


@contextlib.contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Reduces(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().clone()
        torch.distributed.all_reduce(mean)
        return super().forward(x - mean)


def test_collective_inside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "several_ranks", lambda: True)
    monkeypatch.setattr(roots, "several_ranks", lambda: True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with group_of_one(tmp_path):
        _, placed = narrowed(Reduces)
    assert placed == ["the module talks to other ranks"]


RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.capture.replay.test_refusals import Faulty, train
from tensortrace import trace
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
make = lambda: DistributedDataParallel(Faulty())
plain = train(make)
if rank == 0:
    records = []
    with trace(out=records.append, every=1) as t:
        traced = train(make)
    placed = [r.detail["placed"] for r in records if getattr(r, "action", "") == "replay"]
    assert placed == ["exact"], placed
    assert t.findings[0].op == "log"
else:
    traced = train(make)
assert traced == plain
dist.barrier()
dist.destroy_process_group()
"""


def test_one_rank_of_two_replays_and_the_other_does_not_wait(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


def test_nothing_of_a_refused_call_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "MOST_ROOTS", 1)
    records = Recorded()
    model = Faulty()
    torch.manual_seed(0)
    with trace(out=records.append, every=1):
        first = model(torch.randn(2, 4))
        F.mse_loss(first + model(torch.randn(2, 4)), torch.zeros(2, 2)).backward()
    assert len(records.of(Action, action="replay")) == 1


def test_calls_past_the_limit_keep_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never ends, as of a server that forgot no_grad, has any number of them."""
    monkeypatch.setattr(roots, "MOST_ROOTS", 2)
    model = nn.Linear(4, 2)
    with trace(out=io.BytesIO()) as t:
        for _ in range(6):
            model(torch.randn(2, 4))
        assert t._recorder is not None and t._recorder.roots is not None
        kept = [root.rng.numel() > 0 for root in t._recorder.roots]
    assert kept == [True, True, False, False, False, False]


def test_replay_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(Faulty):
        def forward(self, x: Tensor) -> Tensor:
            print("forward")
            return super().forward(x)

    with trace(out=io.BytesIO()):
        train(Prints)
    assert capsys.readouterr().out == "forward\n" * 2


class Counter(nn.Module):
    """NaN in its second call only: the replay must start from the count of that call's entry."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.lin(x)
        return (h * 0 - 1).sqrt() if self.calls == 2 else h


def test_attributes_are_learnt_of_each_module_and_not_of_the_first_that_run() -> None:
    others = [nn.Linear(4, 4) for _ in range(5)]
    model = Counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=io.BytesIO()) as t:
        for _ in range(2):
            for other in others:
                other(torch.randn(2, 4))
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
    error = next(f for f in t.findings if f.severity == "error")
    assert (error.op, error.evidence["placed"]) == ("sqrt", "exact")


def test_arguments_that_a_hook_of_the_users_replaced_are_the_ones_that_are_replayed() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) + x.log()

    model = Root()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    with trace(out=io.BytesIO()) as t:
        model(torch.rand(2, 4) + 1).sum().backward()
    error = next(f for f in t.findings if f.severity == "error")
    assert (error.op, error.evidence["placed"]) == ("log", "exact")
