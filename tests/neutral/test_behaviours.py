"""What torch does at the places that tracing hangs on: one test per behaviour, under its number.

The numbers are those of the design's list of behaviours to pin. Where a test elsewhere goes into
the details, the one here is the short form that keeps the number.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from tensortrace import trace
from tensortrace.capture.active import here
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.records import Call, Finding, Optimizer
from tests.capture import Net, Recorded, record
from tests.neutral import assert_neutral, one_thread, state
from tests.test_edge_programs import attributes, hooks

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def said(records: Recorded) -> list[str]:
    """The codes of errors and warnings."""
    return [f.code for f in records.of(Finding) if f.severity != "note"]


class Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def test_01_a_forward_hook_gets_three_arguments_on_exceptions_and_four_otherwise() -> None:
    counts: list[int] = []
    handle = torch_module.register_module_forward_hook(
        lambda *arguments: counts.append(len(arguments)), with_kwargs=True, always_call=True
    )

    def program(t: Any) -> None:
        nn.Identity()(X)
        with contextlib.suppress(ValueError):
            Raises(ValueError("boo"))(X)

    try:
        records = record(program)
    finally:
        handle.remove()
        torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
    assert counts == [4, 3]
    # A hook of four arguments only would have been silenced with a warning, which is an error here.
    assert [call.exception for call in records.modules()] == [None, "ValueError"]


def test_02_a_keyboard_interrupt_leaves_no_stale_call_on_the_stack() -> None:
    def program(t: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            nn.Sequential(nn.Sequential(Raises(KeyboardInterrupt())))(X)
        nn.Identity()(X)

    records = record(program)
    assert records.module("Identity").parent is None
    assert here.stack == []


def test_03_the_table_of_hooks_with_kwargs_does_not_grow_over_a_thousand_traces(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables = [
        value for name, value in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    ]  # fmt: skip
    before = [len(table) for table in tables]
    for _ in range(1000):
        with trace(out=[].append):
            pass
    assert [len(table) for table in tables] == before


def leave_by_exit() -> None:
    with trace(out=[].append):
        nn.Identity()(X)


def leave_by_exception() -> None:
    with contextlib.suppress(ValueError), trace(out=[].append):
        Raises(ValueError("boo"))(X)


def traced_generator() -> Iterator[int]:
    with trace(out=[].append):
        for i in range(3):
            nn.Identity()(X)
            yield i


def leave_by_generator_close() -> None:
    generator = traced_generator()
    next(generator)
    generator.close()  # type: ignore[attr-defined]


def leave_in_another_order() -> None:
    first, second = traced_generator(), traced_generator()
    next(first)
    next(second)
    first.close()  # type: ignore[attr-defined]
    next(second)
    second.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "leave", [leave_by_exit, leave_by_exception, leave_by_generator_close, leave_in_another_order]
)
def test_04_no_hook_mode_or_wrapper_is_left(leave: Callable[[], None]) -> None:
    before = attributes()
    leave()
    assert hooks() == {}
    assert attributes() == before


def test_05_fresh_hooks_make_one_more_graph_at_most_and_the_frame_compiles_afterwards() -> None:
    torch._dynamo.reset()
    compiled_graphs: list[Any] = []
    runs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled_graphs.append(module)

        def run(*arguments: Any) -> Any:
            runs.append(1)
            return module.forward(*arguments)

        return run

    model: Any = torch.compile(Net(), backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(12):
            with trace(out=[].append):
                model(X)
            model(X)
    assert len(compiled_graphs) <= 2
    assert len(runs) == 24
    torch._dynamo.reset()


def test_06_forced_eager_shows_the_modules_of_compiled_ones_and_ends_with_the_block() -> None:
    torch._dynamo.reset()
    whole: Any = torch.compile(Net(), backend="aot_eager", fullgraph=True)
    in_place = Net()
    in_place.compile(backend="aot_eager")

    def program(t: Any) -> None:
        whole(X)
        in_place(X)

    records = record(program, compiled="eager")
    assert {call.module for call in records.modules()} >= {"net.0", "head", "Net.net.0", "Net.head"}
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


def test_07_compiled_and_fx_modules_have_the_names_of_what_they_stand_for() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(Net(), backend="eager")
    with warnings.catch_warnings():
        records = record(lambda t: compiled(X), compiled="eager")
    assert "_orig_mod" not in "".join(records.described())
    assert records.described() == ["", "net", "net.0", "net.1", "head"]
    graph = torch.fx.symbolic_trace(Net())
    records = record(lambda t: graph(X))
    assert records.described() == ["", "net.0", "net.1", "head"]
    torch._dynamo.reset()


class Context:
    """Lives as long as the graph that saved it."""


class SavesContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Context) -> Tensor:
        ctx.kept = kept
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2, None


def test_08_graph_and_outputs_are_freed_inside_the_block() -> None:
    model = Net()
    living: list[Any] = []

    def program(t: Any) -> None:
        for _ in range(3):
            kept = Context()
            hidden = model.net(X)
            y = SavesContext.apply(hidden, kept)
            living.extend(weakref.ref(thing) for thing in (kept, hidden, y))
            model.head(y[:, :8]).sum().backward()
            del kept, hidden, y
            gc.collect()
            assert [ref() for ref in living] == [None] * len(living)

    record(program)


def test_09_outputs_and_models_are_saved_copied_and_pickled_without_a_warning() -> None:
    model = Net()

    def program(t: Any) -> None:
        y = model(X)
        torch.save(y, io.BytesIO())
        y.sum().backward()
        torch.save(model, io.BytesIO())
        assert torch.equal(copy.deepcopy(model)(X), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(X), y)

    record(program)


def test_10_tensors_whose_attributes_cannot_be_read_pass_through() -> None:
    weight = torch.ones(3, requires_grad=True)
    base = torch.ones(3)
    with torch.no_grad():
        view = base.view(3)
    base.add_(weight)
    with pytest.raises(RuntimeError, match="no_grad mode"):
        _ = view.grad_fn
    with torch.inference_mode():
        inference = torch.ones(3)
    with pytest.raises(RuntimeError):
        _ = inference._version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors of this layout are a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(RuntimeError):
        _ = nested.shape
    identity = nn.Identity()

    def program(t: Any) -> None:
        for awkward in (view, inference, nested):
            assert identity(awkward) is awkward

    assert len(record(program).modules()) == 3


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2]


def test_11_the_gradient_of_a_view_whose_base_changes_is_unknown_and_not_missing() -> None:
    first, view, head = nn.Linear(4, 4), View(), nn.Linear(2, 1)
    model = nn.ModuleList([first, view, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def program(t: Any) -> None:
        for _ in range(12):
            optimizer.zero_grad()
            base = first(X)
            seen = view(base)
            base.mul_(2)
            head(seen).square().mean().backward()
            optimizer.step()

    records = record(program)
    assert records.of(Call, phase="backward", module="View") == []
    assert said(records) == []


def test_12_gradients_asked_for_by_hand_reach_targets_twice_batched_and_in_functional() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def target(t: Any) -> None:
        torch.autograd.grad(model(X).sum(), [model[0].weight])

    (call,) = [c for c in record(target).of(Call, phase="backward", module="0") if c.outputs]
    assert [name for name, _ in call.outputs] == ["weight"]

    def all_ways() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        x = torch.randn(2, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.norm().backward()
        batched = torch.autograd.grad(
            model(x).flatten(), model[0].weight, torch.eye(2), is_grads_batched=True
        )
        jacobian = torch.autograd.functional.jacobian(model, x.detach())
        hessian = torch.autograd.functional.hessian(lambda x: model(x).sum(), x.detach())
        return state(model, [x.grad, *batched, jacobian, hessian])

    assert_neutral(all_ways, every=1)


class Same(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        return q is k and k is v


def test_13_fused_attention_and_the_identity_of_tensors_stay() -> None:
    def fused() -> Any:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        with torch.no_grad():
            return [encoder(torch.randn(2, 5, 8))]

    for level in ("module", "op"):
        assert_neutral(fused, every=1, level=level)

    def program(t: Any) -> None:
        assert Same()(X, X, X)
        assert nn.Identity()(X) is X
        assert nn.Dropout(0.5).eval()(X) is not None
        assert nn.Sequential()(X) is X

    record(program)


@pytest.mark.parametrize("level", ["module", "op"])
def test_14_the_functions_that_a_dispatch_mode_changes_stay_the_same(level: str) -> None:
    """`prod` and LinearCrossEntropyLoss: test_module_db.py has all modules."""

    def program() -> Any:
        x = torch.randn(3, 4, requires_grad=True)
        torch.prod(x, 1).sum().backward()
        x.prod().backward()
        loss = nn.LinearCrossEntropyLoss(4, 5)
        loss(torch.randn(6, 4), torch.randint(5, (6,))).backward()
        return state(loss, [x.grad])

    assert_neutral(program, every=1, level=level)


def test_15_modes_of_the_users_own_count_the_same() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Count(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.ops += 1
            return func(*args, **(kwargs or {}))

    def program() -> Any:
        model = Net()
        with FlopCounterMode(display=False) as flops, Count() as count:
            model(X).sum().backward()
        return [*state(model), torch.tensor([flops.get_total_flops(), count.ops])]

    assert_neutral(program, every=1)


def nan_made_in_place() -> None:
    weight = torch.tensor([1.0, -1.0], requires_grad=True)
    weight.clone().log_().sum().backward()


def masked_attention() -> None:
    scores = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    nn.Softmax(-1)(scores)


def memory_never_written() -> None:
    torch.empty(4).copy_(torch.ones(4))


def norm_that_overflows() -> None:
    nn.Identity()(torch.full((4,), 1e30))


def test_16_nan_is_found_where_it_is_made_and_masks_empty_memory_and_large_norms_are_none() -> None:
    records = record(lambda t: nan_made_in_place())
    (finding,) = [f for f in records.of(Finding) if f.severity == "error"]
    assert (finding.code, finding.op) == ("TT101", "log_")
    for healthy in (masked_attention, memory_never_written, norm_that_overflows):
        # What was never written is NaN here, and not whatever the memory happened to hold.
        torch.use_deterministic_algorithms(True)
        try:
            records = record(lambda t, healthy=healthy: healthy())
        finally:
            torch.use_deterministic_algorithms(False)
        assert said(records) == [], healthy.__name__
    large = records.input(records.module(""))
    assert large.norm == pytest.approx(2e30)


@pytest.mark.parametrize("method", ["look", "add_other", "resolve"])
def test_17_statistics_that_raise_never_reach_the_user(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("ours")

    if method == "add_other":  # it measures what the others say nothing of
        monkeypatch.setattr(StatsQueue, "look", lambda *arguments: None)
        monkeypatch.setattr(StatsQueue, "gather", lambda *arguments: None)
    monkeypatch.setattr(StatsQueue, method, fails)
    torch.manual_seed(0)
    model = Net()
    with trace(out=[].append, every=1):
        for _ in range(3):
            model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert capsys.readouterr().err.count("ZeroDivisionError") >= 1


def test_18_other_threads_and_deep_reentrance_are_seen_and_change_nothing() -> None:
    model = Net()

    def threads(t: Any) -> None:
        losses: list[Tensor] = []
        worker = threading.Thread(target=lambda: losses.append(model(X).sum()))
        worker.start()
        worker.join()
        worker = threading.Thread(target=losses[0].backward)
        worker.start()
        worker.join()

    records = record(threads)
    assert {call.thread for call in records.modules()} == {1}
    assert {call.module for call in records.of(Call, phase="backward")} >= {"net.0", "head"}

    def deep() -> Any:
        layer = nn.Linear(4, 4)

        def descend(x: Tensor, depth: int) -> Tensor:
            if depth == 0:
                return layer(x).tanh()
            return checkpoint(descend, x, depth - 1, use_reentrant=True)

        x = torch.randn(2, 4, requires_grad=True)
        # Beyond a depth of 60 the engine goes on in a thread of its own.
        descend(x, 70).sum().backward()
        return state(layer, [x.grad])

    assert_neutral(deep, every=1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_19_a_recomputed_call_says_so(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def program(t: Any) -> None:
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()

    first, again = record(program).modules(module="0")
    assert (first.recompute, again.recompute) == (False, True)
    assert again.forward == first.seq


def test_20_a_skipped_step_is_no_update_and_lbfgs_evaluates_many_times_in_one() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def skip(t: Any) -> None:
        scaler.scale(model(X).sum() * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()

    records = record(skip)
    assert [(o.skipped, o.update) for o in records.of(Optimizer)] == [(True, 0)]
    assert [step.update for step in records.steps()] == [0]
    other = nn.Linear(4, 1)
    lbfgs = torch.optim.LBFGS(other.parameters(), max_iter=4)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = F.mse_loss(other(X), torch.zeros(2, 1))
        loss.backward()
        return loss

    records = record(lambda t: lbfgs.step(closure))
    assert len(records.of(Optimizer)) == 1
    assert len(records.modules(module="")) > 1
    assert len(records.steps()) == 1


def test_21_what_is_still_being_gathered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_distributed.py has DDP, FSDP1, FSDP2 and tensor parallel in two processes."""
    functional = pytest.importorskip("torch.distributed._functional_collectives")
    waited: list[int] = []
    monkeypatch.setattr(
        functional.AsyncCollectiveTensor,
        "trigger_wait",
        lambda self: waited.append(1) or self.elem,
    )
    pending = functional.AsyncCollectiveTensor(torch.ones(3))
    records = record(lambda t: nn.Identity()(pending))
    assert len(records.modules()) == 1
    assert waited == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_22_cuda_syncs_once_a_gate_and_a_captured_graph_holds_no_kernel_of_ours() -> None:
    model = Net().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = X.cuda()

    def train() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    train()
    records = Recorded()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as synced, trace(out=records.append, every=1):
            warnings.simplefilter("always")
            for _ in range(5):
                train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gates = len(records.of(Optimizer)) + len(records.actions("gate")) + 1
    assert len([w for w in synced if "synchronizing" in str(w.message)]) <= gates
    # Gradients arrive in the device's own thread.
    assert {c.module for c in records.of(Call, phase="backward")} >= {"net.0", "head"}

    graph = torch.cuda.CUDAGraph()
    inputs = torch.ones(2, 4, device="cuda")
    with torch.no_grad(), trace(out=[].append, every=1), torch.cuda.graph(graph):
        outputs = model(inputs)
    inputs.fill_(2.0)
    graph.replay()
    assert torch.equal(outputs, model(inputs))
