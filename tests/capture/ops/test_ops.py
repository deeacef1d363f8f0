"""Ops outside modules, and what the loop does that is no call: each with its details."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, TensorDataset

from tensortrace import trace
from tensortrace.capture.ops import function_mode as ops
from tensortrace.records import Action, Call, Location
from tests.capture import Net, Recorded, record

X = torch.rand(3, 3) + 1


def nodes(records: Recorded) -> list[Call]:
    """Backward calls of ops."""
    return [call for call in records.of(Call, phase="backward") if call.op is not None]


def line_of(location: Location | None) -> str:
    """The text of the line that a location names."""
    assert location is not None
    lines, first = inspect.getsourcelines(inspect.getmodule(line_of))  # type: ignore[arg-type]
    assert location.file == __file__
    return lines[location.line - max(first, 1)].strip()


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("div", lambda: 1 / X), ("div", lambda: X / 2), ("matmul", lambda: X @ X),
        ("neg", lambda: -X), ("abs", lambda: abs(X)), ("pow", lambda: X**2),
        ("pow", lambda: 2**X), ("sub", lambda: 1 - X), ("add", lambda: 1 + X),
        ("mul", lambda: 2 * X), ("floor_divide", lambda: X // 2), ("remainder", lambda: X % 2),
        ("remainder", lambda: 2 % X), ("getitem", lambda: X[0]), ("getitem", lambda: X[X > 1]),
        ("eq", lambda: X == 1), ("ne", lambda: X != 1), ("lt", lambda: X < 1),
        ("ge", lambda: X >= 1), ("unbind", lambda: [*X]), ("add", lambda: sum([X, X])),
        ("cross_entropy", lambda: F.cross_entropy(X, torch.tensor([0, 1, 2]))),
        ("softmax", lambda: X.softmax(0)), ("softmax", lambda: F.softmax(X, 0)),
        ("norm", X.norm), ("norm", lambda: torch.linalg.vector_norm(X)),
        ("einsum", lambda: torch.einsum("ij,jk->ik", X, X)),
    ],
)  # fmt: skip
def test_op_has_the_name_that_its_user_knows(name: str, run: Any) -> None:
    records = record(lambda t: run())
    assert [call.op for call in records.ops()][-1] == name


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("add_", lambda x: x.__iadd__(1)), ("mul_", lambda x: x.__imul__(2)),
        ("div_", lambda x: x.__itruediv__(2)), ("sub_", lambda x: x.sub_(1)),
        ("setitem", lambda x: x.__setitem__(0, 9.0)), ("exp_", lambda x: x.exp_()),
    ],
)  # fmt: skip
def test_inputs_are_measured_before_an_op_that_overwrites_them(name: str, run: Any) -> None:
    records = record(lambda t: run(torch.full((2,), 5.0)))
    call = records.op(name)
    before = records.input(call)
    assert (before.min, before.max) == (5.0, 5.0)
    if call.outputs:
        after = records.output(call)
        assert after.previous == before.id
        assert after.max != 5.0


def test_op_belongs_to_no_module_and_names_its_line() -> None:
    def program(t: Any) -> None:
        y = X.exp()
        y.log()

    records = record(program)
    exp, log = records.op("exp"), records.op("log")
    assert (exp.module, exp.parent, exp.training) == (None, None, None)
    assert exp.outputs[0][1] == log.inputs[0][1]
    assert line_of(exp.location) == "y = X.exp()"
    assert line_of(log.location) == "y.log()"


def test_op_inside_a_module_is_no_record_at_module_level() -> None:
    class Computes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).exp().sum()

    records = record(lambda t: Computes()(X))
    assert records.ops() == []


def test_ops_go_on_being_seen_after_a_module_and_after_one_that_raised() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    def program(t: Any) -> None:
        with pytest.raises(ValueError):
            nn.Sequential(Fails())(X)
        X.exp()
        nn.Identity()(X)
        X.log()

    assert [call.op for call in record(program).ops()] == ["exp", "log"]


def test_questions_about_a_tensor_are_no_ops() -> None:
    def program(t: Any) -> None:
        _ = X.shape, X.size(), X.dtype, X.T, X.numel(), len(X), X.dim(), X.is_contiguous()
        _ = repr(X), float(X[0, 0]), X.sum().item(), X.tolist(), X.data_ptr(), bool(X.any())

    assert {call.op for call in record(program).ops()} == {"getitem", "sum", "any"}


def test_op_that_raises_is_recorded_with_its_exception() -> None:
    def program(t: Any) -> None:
        with pytest.raises(RuntimeError):
            torch.matmul(X, torch.ones(7))

    call = record(program).op("matmul")
    assert call.exception == "RuntimeError"
    assert [name for name, _ in call.inputs] == ["input[0]", "input[1]"]


def test_list_of_tensors_given_to_an_op_is_opened() -> None:
    call = record(lambda t: torch.cat([X, X])).op("cat")
    assert [name for name, _ in call.inputs] == ["input[0][0]", "input[0][1]"]


def test_node_of_an_op_reports_both_sides_of_the_way_back_at_the_line_of_the_forward() -> None:
    w = torch.full((2,), 4.0, requires_grad=True)

    def program(t: Any) -> None:
        root = w.sqrt()
        loss = root.sum()
        loss.backward()

    records = record(program)
    total, root = nodes(records)
    assert (total.op, total.node) == ("sum", "SumBackward0")
    assert (root.op, root.node) == ("sqrt", "SqrtBackward0")
    assert root.forward == records.op("sqrt").seq
    assert line_of(root.location) == "root = w.sqrt()"
    assert records.input(root).max == 1.0
    assert records.output(root).max == 0.25  # 1 / (2 sqrt 4)


def test_every_node_that_one_op_made_names_that_op() -> None:
    w = torch.rand(2, 3, requires_grad=True)
    records = record(lambda t: F.cross_entropy(w, torch.tensor([0, 1])).backward())
    assert {call.op for call in nodes(records)} == {"cross_entropy"}
    assert {call.node for call in nodes(records)} == {"NllLossBackward0", "LogSoftmaxBackward0"}


def test_loss_is_what_backward_was_called_on() -> None:
    model = Net()

    def program(t: Any) -> None:
        loss = (model(torch.rand(2, 4)) - 1).square().mean()
        values.append(loss.item())
        loss.backward()

    values: list[float] = []
    records = record(program)
    (loss,) = records.actions("loss")
    graph = loss.detail.pop("graph")
    assert [name for name, _ in graph][:3] == ["MeanBackward0", "PowBackward0", "SubBackward0"]
    assert loss.detail == {"value": values[0], "shape": [], "dtype": "float32"}
    assert loss.tensor == records.op("mean").outputs[0][1]
    assert line_of(loss.location) == "loss.backward()"
    assert records.steps()[0].loss == values[0]


def test_loss_that_a_module_returned_is_known_by_its_id() -> None:
    model = Net()
    records = record(lambda t: nn.MSELoss()(model(torch.rand(2, 4)), torch.zeros(2, 2)).backward())
    (loss,) = records.actions("loss")
    assert loss.tensor == records.module("MSELoss").outputs[0][1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_written_by_its_name(value: float) -> None:
    w = torch.tensor(value, requires_grad=True)
    records = record(lambda t: (w * 1).backward())
    name = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    assert records.actions("loss")[0].detail["value"] == name
    assert records.steps()[0].loss == name


def test_gradient_given_for_a_tensor_that_is_no_scalar_has_no_value() -> None:
    w = torch.ones(3, requires_grad=True)
    records = record(lambda t: (w * 2).backward(torch.ones(3)))
    detail = records.actions("loss")[0].detail
    assert detail.pop("graph")[0][0] == "MulBackward0"
    assert detail == {"shape": [3], "dtype": "float32"}


@pytest.mark.skipif(
    "has_torch_function" not in inspect.getsource(torch.autograd.backward),
    reason="this version of torch tells nobody of torch.autograd.backward",
)
def test_several_losses_given_to_autograd_backward_are_each_recorded() -> None:
    w = torch.ones(3, requires_grad=True)
    records = record(lambda t: torch.autograd.backward([w.sum(), (w * 2).sum()]))
    assert [a.detail["value"] for a in records.actions("loss")] == [3.0, 6.0]


def test_zero_grad_says_of_whom_and_how() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step()
        model.zero_grad(set_to_none=False)

    first, second = record(program).actions("zero_grad")
    assert (first.of, first.optimizer) == ("SGD", 0)
    assert first.detail == {"set_to_none": True, "parameters": 4}
    assert line_of(first.location) == "optimizer.zero_grad()"
    assert (second.of, second.optimizer) == ("Net", None)
    assert second.detail == {"set_to_none": False, "parameters": 4, "optimizers": [0]}


def test_clipping_by_norm_says_the_norm_before_and_the_limit() -> None:
    model = Net()
    norms = []

    def program(t: Any) -> None:
        (model(torch.rand(2, 4)) * 100).sum().backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.5).item())

    records = record(program)
    (clip,) = records.actions("clip")
    assert clip.detail["max_norm"] == 0.5
    assert clip.detail["total_norm"] == pytest.approx(norms[0])
    assert norms[0] > 0.5
    assert line_of(clip.location).startswith("norms.append(clip_grad_norm_(")
    assert [call.op for call in records.ops() if "norm" in str(call.op)] == []


def test_clipping_by_value_says_the_value() -> None:
    model = Net()

    def program(t: Any) -> None:
        (model(torch.rand(2, 4)) * 100).sum().backward()
        clip_grad_value_(model.parameters(), 0.25)

    records = record(program)
    (clip,) = records.actions("clip")
    assert clip.detail == {"value": 0.25}
    assert line_of(clip.location) == "clip_grad_value_(model.parameters(), 0.25)"


def test_clipping_in_the_two_parts_that_torch_offers_is_seen_too() -> None:
    model = Net()

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).sum().backward()
        total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, total)

    (clip,) = record(program).actions("clip")
    assert clip.detail["max_norm"] == 0.5


def test_change_of_mode_is_one_action_for_the_module_asked() -> None:
    model = Net()

    def program(t: Any) -> None:
        model(torch.rand(2, 4))
        model.train()  # it is training already
        model.eval()
        model.net.train()

    records = record(program)
    actions = [a for a in records.of(Action) if a.action in ("train", "eval")]
    assert [(a.action, a.of, a.detail) for a in actions] == [
        ("eval", "Net", {"modules": 5}), ("train", "net", {"modules": 3}),
    ]  # fmt: skip
    assert line_of(actions[0].location) == "model.eval()"


def test_state_dict_says_what_matched() -> None:
    model = Net()
    state = model.state_dict()
    state["stranger"] = state.pop("head.bias")

    def program(t: Any) -> None:
        model.load_state_dict(state, strict=False)

    (load,) = record(program).actions("load_state_dict")
    assert load.of == "Net"
    assert (load.detail["matched"], load.detail["missing"], load.detail["unexpected"]) == (3, 1, 1)
    assert set(load.detail["examples"]) == {"head.bias", "stranger"}
    assert line_of(load.location) == "model.load_state_dict(state, strict=False)"


def test_fetch_says_how_long_the_batch_took() -> None:
    loader = DataLoader(TensorDataset(torch.rand(4, 2)), batch_size=2, shuffle=True)

    def program(t: Any) -> None:
        for _ in loader:
            pass

    records = record(program)
    assert len(records.actions("fetch")) == 2
    for fetch in records.actions("fetch"):
        assert fetch.detail["host_ns"] > 0
        assert line_of(fetch.location).startswith("for _ in loader")
    assert records.ops() == []  # shuffling and collating are no work of the step


def test_gate_without_an_optimizer_is_written_down() -> None:
    model = Net()

    def program(t: Any) -> None:
        for _ in range(2):
            model(torch.rand(2, 4)).sum().backward()

    assert [a.step for a in record(program).actions("gate")] == [0]


def test_large_tensor_outside_modules_without_grad_is_described_and_not_measured() -> None:
    small, large = torch.ones(10), torch.ones(70_000)

    def program(t: Any) -> None:
        with torch.no_grad():
            small.mul(2)
            large.mul(2)

    records = record(program)
    first, second = records.ops(op="mul")
    assert records.input(first).max == 1.0
    assert (records.input(second).shape, records.input(second).max) == ((70_000,), None)
    assert records.input(second).unmeasured == "not asked"


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("item", X.sum().item), ("__float__", lambda: float(X.sum())), ("tolist", X.tolist),
        ("__bool__", lambda: 1 if X.sum() else 2), ("__repr__", lambda: repr(X)),
        ("__format__", lambda: f"{X.sum()}"), ("numpy", X.numpy),
    ],
)  # fmt: skip
def test_waiting_for_a_device_is_an_action_of_a_line(
    name: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_HOSTS", frozenset())
    (sync,) = record(lambda t: run()).actions("sync")
    assert (sync.of, sync.detail) == (name, {"device": "cpu"})
    assert sync.location is not None
    assert record(lambda t: run(), every=2, steps=range(5, 6)).actions("sync") == []


def test_host_has_nothing_to_wait_for_and_a_loop_over_elements_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def each(_: Any) -> None:
        for x in torch.rand(30):
            x.item()

    assert record(each).actions("sync") == []
    monkeypatch.setattr(ops, "_HOSTS", frozenset())
    assert len(record(each).actions("sync")) == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_item_of_a_cuda_tensor_is_recorded() -> None:
    x = torch.ones(3, device="cuda")
    (sync,) = record(lambda t: (x.sum().item(), x.cpu())).actions("sync")
    assert (sync.of, sync.detail) == ("item", {"device": "cuda:0"})


class HandWritten(torch.optim.Optimizer):
    """Steps with ops of its own, before and after it evaluates a closure."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        weights = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            decay = torch.full((), 0.9).sqrt()
            for p in weights:
                p.mul_(decay)
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for p in weights:
                p.sub_(p.grad.sign() * torch.full((), 0.1).cos())
        return loss


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_ops_of_an_optimizer_are_none_of_the_loop_and_those_after_it_are(
    with_closure: bool, level: str
) -> None:
    net = torch.nn.Linear(3, 1)
    optimizer = HandWritten(net.parameters())
    x = torch.ones(2, 3)

    def closure():
        optimizer.zero_grad()
        loss = net(x).exp().mean()
        loss.backward()
        return loss

    records = Recorded()
    with trace(out=records.append, level=level, every=1):
        if not with_closure:
            closure()
        optimizer.step(closure if with_closure else None)
        torch.full((), 0.5).tanh()
    called = {c.op for c in records.of(Call) if c.op and c.phase == "forward"}
    assert called >= {"exp", "mean", "tanh"}
    assert not called & {"mul_", "sqrt", "sub_", "sign", "cos"}


def test_what_an_op_is_to_write_to_is_its_output_alone() -> None:
    target = torch.full((3, 3), math.nan)
    (call,) = record(lambda t: torch.add(X, other=X, out=target)).ops(op="add")
    assert [name for name, _ in call.inputs] == ["input[0]", "input[1]"]
    assert [tensor.nan for tensor in call.tensors] == [0, 0]
    (again,) = record(lambda t: torch.add(target, X, out=target)).ops(op="add")
    assert (len(again.inputs), len(again.outputs)) == (2, 1)
    assert again.inputs[0] != again.outputs[0]


def modes() -> list[str]:
    """The classes of what is on the stack of function modes, the lowest first."""
    depth = torch._C._len_torch_function_stack()
    return [type(torch._C._get_function_stack_at(i)).__name__ for i in range(depth)]


def test_a_default_device_stays_below_what_sees_ops() -> None:
    def program(t: Any) -> None:
        assert modes() == ["DeviceContext", "OutsideMode"]
        model = nn.Linear(3, 2)
        model(torch.ones(2, 3)).exp().sum().backward()
        # Torch takes the one before it off the bottom of the stack, and raises if it is not there.
        torch.set_default_device("meta")
        assert torch.ones(2).is_meta
        model(torch.ones(2, 3, device="cpu")).exp()
        torch.set_default_device("cpu")
        X.sin()

    torch.set_default_device("cpu")
    try:
        records = record(program)
        assert modes() == ["DeviceContext"]
    finally:
        torch.set_default_device(None)
    assert modes() == []
    named = [call.op for call in records.of(Call, phase="forward")]
    assert [op for op in named if op in ("exp", "sin")] == ["exp", "exp", "sin"]


def test_blocks_of_a_device_end_what_they_began() -> None:
    def program(t: Any) -> None:
        outer.close()
        X.cos()
        assert modes() == ["OutsideMode"]
        with torch.device("meta"):
            model = nn.Linear(3, 2, device="cpu")
            with torch.device("cpu"):
                model(X).exp()
            assert torch.ones(1).is_meta
            model(X).sin()
        assert modes() == ["OutsideMode"]
        assert torch.ones(1).is_cpu

    with contextlib.ExitStack() as outer:
        outer.enter_context(torch.device("cpu"))
        records = record(program)
    assert modes() == []
    named = [call.op for call in records.of(Call, phase="forward")]
    assert [op for op in named if op in ("cos", "exp", "sin")] == ["cos", "exp", "sin"]
