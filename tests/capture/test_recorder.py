from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import TraceStoppedError, trace
from tensortrace.capture.journal import Journal
from tensortrace.capture.names import ModuleNames
from tensortrace.capture.stats.queue import StatsQueue
from tensortrace.capture.tensors import TensorTable
from tensortrace.checks import Check, all_checks
from tensortrace.records import Action, Call, End, Finding, Optimizer, Param, Step
from tests.capture.lifecycle import (
    X,
    called,
    make_net,
    make_optimizer,
    of,
    process_state,
    read,
    train,
    weights,
)

# ---- stop_on


def seen_by(finding: Finding) -> bool:
    return finding.module == "1"


@pytest.mark.parametrize(
    "stop_on", ["error", "warning", "note", "TT101", "TT1", "nonfinite-forward", seen_by]
)
def test_stop_is_raised_before_the_weights_move(stop_on: Any, tmp_path: Path) -> None:
    plain = make_net()
    train(plain, 3)
    net = make_net(poison=[3])
    before = process_state()
    log = tmp_path / "log.jsonl"
    with pytest.raises(TraceStoppedError) as caught, trace(log, stop_on=stop_on) as t:
        train(net, 10)
    assert weights(net) == weights(plain)
    finding = caught.value.finding
    assert (finding.code, finding.step, finding.module) == ("TT101", 3, "1")
    assert "TT101" in str(caught.value)
    assert t.findings == [finding]
    assert process_state() == before
    records = read(log)
    assert of(Finding, records) == [finding]
    assert records[-1].why == "exception"
    assert records[-1].failure.type == "TraceStoppedError"
    assert records[-1].failure.location.code == "optimizer.step()"


@pytest.mark.parametrize("stop_on", [None, "TT401", "TT2", lambda finding: False])
def test_other_findings_do_not_stop(stop_on: Any) -> None:
    with trace(out=lambda record: None, stop_on=stop_on) as t:
        train(make_net(poison=[1]), 3)
    assert len(t.findings) == 1


def test_scaler_is_stopped_before_it_steps(tmp_path: Path) -> None:
    net = make_net(poison=[2])
    optimizer = make_optimizer(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kept: list[list[bytes]] = []
    with (
        pytest.raises(TraceStoppedError) as caught,
        trace(tmp_path / "log.jsonl", stop_on="error", checks=["TT103"]),
    ):
        for _ in range(5):
            kept.append(weights(net))
            optimizer.zero_grad()
            scaler.scale(net(X).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert weights(net) == kept[2]
    assert len(kept) == 3
    assert caught.value.finding.step == 2


def test_closure_of_lbfgs_is_gated_each_time() -> None:
    net = make_net(poison=[0])
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
    before = weights(net)
    evaluations = []

    def closure() -> torch.Tensor:
        evaluations.append(1)
        optimizer.zero_grad()
        loss = net(X).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with (
        pytest.raises(TraceStoppedError),
        trace(out=lambda record: None, stop_on="error"),
    ):
        optimizer.step(closure)
    assert len(evaluations) == 1
    assert weights(net) == before


def test_stop_without_an_optimizer_comes_with_the_next_outermost_call() -> None:
    net = make_net(poison=[1])
    turns = []
    with pytest.raises(TraceStoppedError), trace(out=lambda record: None, stop_on="error"):
        for i in range(5):
            turns.append(i)
            net(X).sum().backward()
    assert turns == [0, 1, 2]


def test_stop_at_the_end_of_the_block_leaves_the_log_complete(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    before = process_state()
    with pytest.raises(TraceStoppedError) as caught, trace(log, stop_on="error"):
        make_net(poison=[0])(X)
    assert process_state() == before
    records = read(log)
    assert of(Finding, records) == [caught.value.finding]
    assert isinstance(records[-1], End)


def test_stop_of_a_decorated_function_comes_from_the_call() -> None:
    net = make_net(poison=[1])

    t = trace(out=lambda record: None, stop_on="error")

    @t
    def turn() -> None:
        net(X)

    turn()
    with pytest.raises(TraceStoppedError):
        turn()
    turn()
    t.close()


def test_stop_comes_from_step() -> None:
    with trace(out=lambda record: None, stop_on="error") as t:
        make_net(poison=[0])(X)
        with pytest.raises(TraceStoppedError):
            t.step()
        t.step()  # once


def test_stop_never_hides_the_users_own_error() -> None:
    with pytest.raises(KeyError, match="mine"), trace(out=lambda record: None, stop_on="error"):
        make_net(poison=[0])(X)
        raise KeyError("mine")


def test_callable_that_is_asked_to_stop_gets_each_finding_and_may_fail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Finding] = []

    def ask(finding: Finding) -> bool:
        asked.append(finding)
        raise RuntimeError("cannot say")

    net = make_net(poison=[1])
    with trace(out=lambda record: None, stop_on=ask) as t:
        train(net, 3)
    assert asked == t.findings != []
    assert capsys.readouterr().err.count("cannot say") == 1


# ---- threads


def test_modules_in_worker_threads_join_the_step_with_their_number() -> None:
    records: list[Any] = []
    nets = [make_net() for _ in range(3)]
    with trace(out=records.append, every=1) as t:
        train(make_net(), 1)
        for net in nets:
            thread = threading.Thread(target=lambda net=net: net(X).sum().backward())
            thread.start()
            thread.join()
        t.step()
    calls = [call for call in of(Call, records) if call.module and call.op is None]
    others = [call for call in calls if call.thread]
    assert len(others) == len([call for call in calls if call.phase == "forward"]) - 3
    assert {call.step for call in others} == {max(call.step for call in calls)}
    assert all(call.inputs and call.outputs for call in others if call.phase == "forward")
    assert of(Action, records)[-1].action != "tracer_error"


def test_many_threads_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    nets = [make_net() for _ in range(4)]
    barrier = threading.Barrier(4)

    def work(net: nn.Module) -> None:
        barrier.wait()
        for _ in range(10):
            net(X)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with trace(log, every=1):
            threads = [threading.Thread(target=work, args=(net,)) for net in nets]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    records = read(log)
    calls = [call for call in of(Call, records) if call.op is None]
    assert len(calls) == 4 * 10 * 4
    assert len({call.seq for call in calls}) == len(calls)
    roots = {call.seq: call for call in calls if call.parent is None}
    assert len(roots) == 40
    # A child's parent is of its own thread.
    for call in calls:
        assert call.parent is None or roots[call.parent].thread == call.thread
    described = [tensor.id for call in of(Call, records) for tensor in call.tensors]
    assert len(described) == len(set(described))
    assert not [a for a in of(Action, records) if a.action == "tracer_error"]


def test_backward_in_another_thread_is_seen() -> None:
    records: list[Any] = []
    net = make_net()
    plain = make_net()
    plain(X).square().mean().backward()
    optimizer = make_optimizer(net)
    with trace(out=records.append, every=1):
        loss = net(X).square().mean()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        optimizer.step()
    backward = {
        c.module for c in of(Call, records) if c.phase == "backward" and c.module is not None
    }
    assert {"0", "1", "2"} <= backward
    assert len(of(Param, records)) == 4
    assert [p.step for p in of(Param, records)] == [0] * 4


# ---- faults of our own


def breaks(name: str, owner: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError(f"{name} is broken")

        monkeypatch.setattr(owner, name, broken)

    return patch


@pytest.mark.parametrize(
    ("patch", "part", "rest"),
    [
        (breaks("identify", TensorTable), "modules", [Optimizer, Param]),
        (breaks("known", ModuleNames), "modules", [Optimizer, Param]),
        (breaks("look", StatsQueue), "modules", [Step]),
        (breaks("gradient", TensorTable), "gradients", [Call]),
        (breaks("resolve", StatsQueue), "gate", []),
        (breaks("take", Journal), "gate", []),
        (breaks("close_step", Journal), "gate", [Call]),
    ],
)
def test_fault_in_a_hook_is_one_warning_and_changes_nothing(
    patch: Callable[[pytest.MonkeyPatch], None], part: str, rest: list[type], *,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    plain, net = make_net(), make_net()
    train(plain, 3)
    before = process_state()
    log = tmp_path / "log.jsonl"
    with trace(log, every=1):
        train(net, 1)
        with monkeypatch.context() as context:
            patch(context)
            train(net, 1)
        train(net, 1)
    assert weights(net) == weights(plain)
    assert process_state() == before
    err = capsys.readouterr().err
    assert f"tracing of {part} stopped" in err
    records = read(log)
    faults = [a for a in of(Action, records) if a.action == "tracer_error"]
    assert [a.detail["where"] for a in faults] != []
    assert err.count("stopped after an error") == len(faults)
    first = next(a for a in faults if a.detail["where"] == part)
    assert "ZeroDivisionError" in first.detail["error"]
    assert "Traceback" in first.detail["traceback"]
    for kind in rest:
        assert max(record.step for record in of(kind, records)) >= 1
    assert isinstance(records[-1], End)


def test_fault_of_modules_leaves_fused_paths_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    modes = []

    def watch(module: nn.Module, args: Any) -> None:
        modes.append(torch._C._len_torch_function_stack())

    layer.register_forward_pre_hook(watch)
    with torch.no_grad():
        plain = layer(x)
        with trace(out=lambda record: None):
            layer(x)
            breaks("known", ModuleNames)(monkeypatch)
            assert layer(x).equal(plain)
            assert layer(x).equal(plain)
    assert modes == [0, 0, 0, 0]


def test_check_that_raises_is_off_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rule(step: Any, memory: Any) -> Any:
        raise ZeroDivisionError("of a check")
        yield

    rule.__doc__ = all_checks()[0].rule.__doc__
    broken = Check("TT999", "broken", "error", "gate", rule)
    checks = [broken, *all_checks()]
    monkeypatch.setattr("tensortrace.config.select", lambda *choice: checks)
    records: list[Any] = []
    with trace(out=records.append) as t:
        train(make_net(poison=[1]), 3)
    assert [f.code for f in t.findings] == ["TT101"]
    assert capsys.readouterr().err.count("TT999") == 1
    faults = [a for a in of(Action, records) if a.action == "tracer_error"]
    assert [a.detail["where"] for a in faults] == ["checks"]
    assert "of a check" in faults[0].detail["error"]


def test_fault_at_the_end_of_the_block_is_not_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = process_state()
    with trace(out=lambda record: None):
        train(make_net(), 1)
        breaks("end", Journal)(monkeypatch)
    assert process_state() == before
    assert "end is broken" in capsys.readouterr().err


# ---- compiled


def test_compiled_module_is_one_action_and_is_counted_in_the_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    records: list[Any] = []
    net = make_net()
    compiled = torch.compile(net, backend="eager")
    with trace(out=records.append, every=1):
        for _ in range(3):
            compiled(X)
    actions = [a for a in of(Action, records) if a.action == "compiled"]
    assert [a.detail["modules"] for a in actions] == [4]
    assert {call.module for call in of(Call, records) if call.op is None} == {""}
    err = capsys.readouterr().err
    assert '(4 compiled modules not visible; compiled="eager" shows them)' in err


def test_eager_shows_the_inside_of_compiled_modules(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[Any] = []
    net = make_net()
    plain = net(X)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with trace(out=records.append, every=1, compiled="eager"):
        assert compiled(X).equal(plain)
    assert {"0", "1", "2"} <= {path for _, path in called(records)}
    assert "not visible" not in capsys.readouterr().err
    assert torch._dynamo.eval_frame._stance.stance == "default"  # type: ignore[attr-defined]


def test_toggling_does_not_recompile() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function_net, module_net = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    @torch.compile(backend=backend, fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = function_net(x).tanh()
        return result

    module_net.compile(backend=backend)
    t = trace(out=lambda record: None)

    @t
    def turn() -> None:
        function(X)
        module_net(X)

    with warnings.catch_warnings():
        # Dynamo's own, of any function mode around a module that was compiled in place.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
        for _ in range(12):
            turn()
            function(X)
            module_net(X)
    t.close()
    function(X)
    # One graph each, and at most one more each for the hooks being there or not.
    assert len(graphs) <= 2 * 3
    torch._dynamo.reset()


# ---- steps


def test_records_count_steps_and_updates() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=1):
        train(make_net(), 3)
    assert [(o.step, o.update) for o in of(Optimizer, records)] == [(0, 0), (1, 1), (2, 2)]
    assert [(s.step, s.update) for s in of(Step, records)] == [(0, 1), (1, 2), (2, 3)]
    end = of(End, records)[0]
    assert (end.steps, end.updates) == (3, 3)


def test_very_long_step_is_handed_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortrace.capture.recorder.RECORDS_PER_PART", 50)
    records: list[Any] = []
    held = 0
    net = make_net()
    with trace(out=records.append, every=1) as t:
        for _ in range(100):
            net(X)
            held = max(held, len(t._recorder._pending))  # type: ignore[union-attr]
        t.step()
    assert held <= 60
    assert len(of(Step, records)) == 1
    assert len([1 for _, path in called(records) if path == ""]) == 100
