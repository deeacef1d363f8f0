from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from tensortrace import trace
from tensortrace.capture.loop import wrappers
from tensortrace.records import Action, Call, Optimizer, Step
from tests.capture.lifecycle import X, make_net, make_optimizer, of, process_state, train, weights


def actions(records: list[Any]) -> list[str]:
    return [action.action for action in of(Action, records)]


def one(records: list[Any], name: str) -> Action:
    (found,) = [action for action in of(Action, records) if action.action == name]
    return found


def test_zero_grad_says_whose_and_how() -> None:
    records: list[Any] = []
    net = make_net()
    optimizer = make_optimizer(net)
    net(X).sum().backward()
    with trace(out=records.append):
        optimizer.zero_grad()
        optimizer.zero_grad(set_to_none=False)
        net.zero_grad(False)
    found = of(Action, records)
    assert [a.action for a in found] == ["zero_grad"] * 3
    assert [a.of for a in found] == ["SGD", "SGD", "Sequential"]
    assert [a.optimizer for a in found] == [0, 0, None]
    assert [a.detail["set_to_none"] for a in found] == [True, False, False]
    lines = [a.location.code or a.location.line for a in found if a.location is not None]
    assert len(set(lines)) == 3  # each is the user's own line


def test_switch_between_training_and_evaluation_is_one_action_each() -> None:
    records: list[Any] = []
    net = make_net()
    with trace(out=records.append, model=net):
        net.train()  # it is training already
        net.eval()
        net.eval()
        net.train(mode=True)
        net[0].eval()
    assert actions(records) == ["eval", "train", "eval"]


def test_eval_of_what_is_in_eval_mode_is_told_once_there_were_updates_between() -> None:
    records: list[Any] = []
    net = make_net().eval()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    with trace(out=records.append, model=net):
        for _ in range(3):
            net.eval()
            net.eval()
            net(X).sum().backward()
            optimizer.step()
        net.train()
        optimizer.step()
        net.eval()
    switches = [a for a in of(Action, records) if a.action in ("train", "eval")]
    told = [(a.action, "again" in a.detail) for a in switches]
    assert told == [("eval", True), ("eval", True), ("train", False), ("eval", False)]


def test_state_dict_counts_what_matched() -> None:
    records: list[Any] = []
    net = make_net()
    state = net.state_dict()
    state["extra.weight"] = X
    del state["0.bias"]
    with trace(out=records.append):
        result = net.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.bias"], ["extra.weight"])
    detail = one(records, "load_state_dict").detail
    assert (detail["matched"], detail["missing"], detail["unexpected"]) == (3, 1, 1)
    assert detail["examples"] == ["0.bias", "extra.weight"]


def test_state_dict_counts_what_is_the_modules_own_and_what_happened_to_it_since() -> None:
    records: list[Any] = []
    net, other = make_net(), make_net()
    optimizer = make_optimizer(net)
    early = net.state_dict()
    with trace(out=records.append):
        kept = net.state_dict()
        net.load_state_dict(net.state_dict())
        train(net, 2, optimizer)
        net.load_state_dict(kept)
        net.load_state_dict({**kept, "0.bias": kept["0.bias"].clone()})
        net.load_state_dict(kept, assign=True)
        net.load_state_dict(early)
        net.load_state_dict({name: value[:] for name, value in net.state_dict().items()})
        net.load_state_dict(other.state_dict())
    loads = [a.detail for a in of(Action, records) if a.action == "load_state_dict"]
    found = [{key: d[key] for key in ("own", "updates", "reloaded") if key in d} for d in loads]
    assert found == [
        {"own": 4, "updates": 0, "reloaded": False},
        {"own": 4, "updates": 2, "reloaded": False},
        {"own": 3, "updates": 2, "reloaded": True},
        {"own": 4, "updates": 2, "reloaded": True},
        {"own": 4},  # taken before the trace
        {"own": 4},  # other tensors over the same memory
        {},
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_updates_of_a_state_are_those_that_have_written_it(fused: bool) -> None:
    records: list[Any] = []
    net, rest = make_net(), make_net()
    optimizer = torch.optim.SGD([*net.parameters(), *rest.parameters()], lr=0.1, fused=fused)
    with trace(out=records.append):
        states = [module.state_dict() for module in (net, rest)]
        train(net, 2, optimizer)
        net.load_state_dict(states[0])
        if not fused:  # a step of its does not tell what it has left out
            rest.load_state_dict(states[1])
    loads = [a.detail for a in of(Action, records) if a.action == "load_state_dict"]
    assert [d["updates"] for d in loads] == ([2] if fused else [2, 0])


def test_states_of_the_module_that_hold_no_memory_are_not_its_own() -> None:
    records: list[Any] = []
    bare, lazy = nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)
    extra = Extra()
    with trace(out=records.append):
        bare.load_state_dict(bare.state_dict())
        lazy.load_state_dict(lazy.state_dict())
        extra.load_state_dict(extra.state_dict())
        with pytest.raises(TypeError):
            bare.load_state_dict(None)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            nn.Linear(2, 2).load_state_dict({"weight": None, "bias": 1})
    loads = [a.detail for a in of(Action, records) if a.action == "load_state_dict"]
    assert [(d.get("own", 0), d["matched"]) for d in loads[:3]] == [(0, 2), (0, 2), (1, 2)]
    assert "tracer_error" not in actions(records)


def test_no_tensor_of_a_state_is_kept_alive() -> None:
    net = make_net()
    with trace(out=lambda record: None):
        state = net.state_dict()
        kept = [weakref.ref(value) for value in state.values()]
        net.load_state_dict(state)
        del state
        gc.collect()
        assert [ref() for ref in kept] == [None] * 4


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> Any:
        return {"count": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_clipping_by_norm_has_both_norms_from_before() -> None:
    records: list[Any] = []
    net = make_net()
    (net(X).sum() * 100).backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    norm = torch.cat([g.double().flatten() for g in grads]).norm().item()
    with trace(out=records.append):
        assert clip_grad_norm_(net.parameters(), 2.0).item() == pytest.approx(norm)
    detail = one(records, "clip").detail
    assert detail["max_norm"] == 2.0
    assert detail["total_norm"] == pytest.approx(norm)
    assert not of(Call, records)  # its own ops are no ops of the user's


def test_clipping_by_value_has_the_value() -> None:
    records: list[Any] = []
    net = make_net()
    net(X).sum().backward()
    with trace(out=records.append):
        clip_grad_value_(net.parameters(), 0.25)
    assert one(records, "clip").detail == {"value": 0.25}


def test_fetches_are_actions_and_collating_is_no_op_of_the_step() -> None:
    records: list[Any] = []
    loader = DataLoader(TensorDataset(torch.arange(24.0).view(6, 4)), batch_size=2)
    net = make_net()
    with trace(out=records.append, every=1):
        for (x,) in loader:
            net(x)
    assert actions(records) == ["loader"] + ["fetch"] * 3
    assert [step.step for step in of(Step, records)] == [0, 1, 2]
    assert all(action.detail["host_ns"] > 0 for action in of(Action, records))
    assert {call.op for call in of(Call, records)} == {None}
    first = one(records, "loader")
    assert (first.of, first.step) == ("TensorDataset", 0)
    assert first.detail.pop("host_ns") > 0
    told = {"batches": 3, "workers": 0, "pin_memory": False, "shuffled": False,
            "replacement": False}  # fmt: skip
    assert first.detail == told


def test_sampler_of_the_users_is_not_asked_for_its_length() -> None:
    class Drawing(Sampler[int]):
        def __iter__(self) -> Any:
            return iter(torch.randperm(6).tolist())

        def __len__(self) -> int:
            torch.rand(1)
            return 6

    def drawn() -> list[float]:
        torch.manual_seed(0)
        data = TensorDataset(torch.arange(24.0).view(6, 4))
        return [float(x.sum()) for (x,) in DataLoader(data, batch_size=2, sampler=Drawing())]

    records: list[Any] = []
    untraced = drawn()
    with trace(out=records.append, every=1):
        assert drawn() == untraced
    assert one(records, "loader").detail["batches"] is None


def test_stream_of_unknown_length_has_no_number_of_batches() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.ones(4, 4))

        def __len__(self) -> int:
            raise AssertionError("a length of a stream is a guess, and costs what it costs")

    records: list[Any] = []
    with trace(out=records.append, every=1):
        assert len([make_net()(x) for x in DataLoader(Stream(), batch_size=None)]) == 4
    assert one(records, "loader").detail["batches"] is None


def test_error_of_the_loader_is_the_users() -> None:
    class Broken(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> torch.Tensor:
            raise LookupError("no such item")

    with pytest.raises(LookupError, match="no such item"), trace(out=lambda record: None):
        next(iter(DataLoader(Broken())))


def test_scaler_shows_loss_scale_unscale_and_a_skipped_step() -> None:
    records: list[Any] = []
    net = make_net()
    optimizer = make_optimizer(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with trace(out=records.append, every=1):
        for factor in (1.0, float("inf")):
            optimizer.zero_grad()
            loss = net(X).square().mean()
            scaler.scale(loss * factor).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    names = [a for a in actions(records) if a != "gate"]
    assert names == ["zero_grad", "loss", "scale", "unscale"] * 2
    losses = [a.detail["value"] for a in of(Action, records) if a.action == "loss"]
    assert losses[0] == pytest.approx(make_net()(X).square().mean().item())
    assert losses[1] == "Infinity"
    scales = [a.detail["scale"] for a in of(Action, records) if a.action == "scale"]
    assert scales == [16.0, 16.0]
    assert [o.skipped for o in of(Optimizer, records)] == [False, True]
    assert [step.update for step in of(Step, records)] == [1, 1]


def test_disabled_scaler_leaves_no_trace() -> None:
    records: list[Any] = []
    net = make_net()
    optimizer = make_optimizer(net)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with trace(out=records.append, every=1):
        scaler.scale(net(X).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert set(actions(records)) <= {"loss", "gate"}
    assert [o.skipped for o in of(Optimizer, records)] == [False]


def test_wrapper_of_somebody_else_stays_and_ours_inside_it_is_inert() -> None:
    net = make_net()
    before = process_state()
    t = trace(out=lambda record: None)
    t.__enter__()
    ours = torch.optim.Optimizer.zero_grad
    calls = []

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        ours(*args, **kwargs)

    torch.optim.Optimizer.zero_grad = theirs  # type: ignore[method-assign]
    try:
        t.__exit__(None, None, None)
        assert torch.optim.Optimizer.zero_grad is theirs
        train(net, 2)
        assert calls == [1, 1]
    finally:
        torch.optim.Optimizer.zero_grad = before["Optimizer.zero_grad"]  # type: ignore[method-assign]
    assert process_state() == before


def test_fault_in_a_wrapper_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in a wrapper")

    plain, net = make_net(), make_net()
    train(plain, 3)
    records: list[Any] = []
    monkeypatch.setattr("tensortrace.capture.recorder.Recorder.action", broken)
    with trace(out=records.append, every=1):
        optimizer = make_optimizer(net)
        optimizer.zero_grad()
        assert net.eval().train() is net
        train(net, 3, optimizer)
    assert weights(net) == weights(plain)
    err = capsys.readouterr().err
    assert err.count("tracing of loop stopped") == 1
    assert "tracer_error" in actions(records)


def test_targets_that_another_torch_version_lacks_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = [*wrappers._targets(), (nn.Module, "no_such_method", wrappers._silently)]
    monkeypatch.setattr(wrappers, "_targets", lambda: targets)
    before = process_state()
    patches = wrappers.Patches()
    assert process_state() != before
    patches.remove()
    assert process_state() == before


class _Counts(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Depths(Dataset[torch.Tensor]):
    """Tells how many function modes there are while a batch is fetched."""

    def __init__(self, failing: bool) -> None:
        self.depths: list[int] = []
        self.failing = failing

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        self.depths.append(torch._C._len_torch_function_stack())
        if self.failing:
            raise KeyError(i)
        return torch.ones(2) + i


@pytest.mark.parametrize("failing", [False, True])
def test_what_a_wrapped_method_calls_is_shown_to_modes_of_the_user_alone(failing: bool) -> None:
    data = _Depths(failing)
    with trace(out=lambda record: None), _Counts() as theirs:
        outside = torch._C._len_torch_function_stack()
        with contextlib.suppress(KeyError):
            next(iter(DataLoader(data, 1)))
        assert torch._C._len_torch_function_stack() == outside == 2
    assert data.depths == [1]
    assert ("add" in theirs.seen) is not failing
