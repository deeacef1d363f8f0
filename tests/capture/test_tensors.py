"""Tensor ids: the data flow of a step, and no tensor kept alive for it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.records import Call
from tests.capture import Net, Recorded, record


class Apply(nn.Module):
    """Runs a function as its forward."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def test_producer_and_consumer_name_the_same_tensor() -> None:
    records = record(lambda t: Net()(torch.rand(2, 4)))
    linear, relu, head = (records.module(path) for path in ("net.0", "net.1", "head"))
    assert linear.outputs[0][1] == relu.inputs[0][1]
    assert relu.outputs[0][1] == records.module("net").outputs[0][1] == head.inputs[0][1]
    assert head.outputs[0][1] == records.module("").outputs[0][1]


def test_tensor_is_described_once_in_a_step() -> None:
    records = record(lambda t: Net()(torch.rand(2, 4)))
    ids = [tensor.id for call in records.of(Call) for tensor in call.tensors]
    assert sorted(ids) == list(range(len(ids)))


def test_ids_begin_again_with_each_step() -> None:
    model = Net()

    def program(t: Any) -> None:
        for _ in range(2):
            model(torch.rand(2, 4))
            t.step()

    records = record(program)
    assert min(records.tensors(0)) == min(records.tensors(1)) == 0


def test_in_place_change_makes_a_new_id_that_knows_the_previous() -> None:
    records = record(lambda t: nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))(-torch.ones(3)))
    relu = records.module("1")
    before, after = relu.inputs[0][1], relu.outputs[0][1]
    assert before != after
    assert records.output(relu).previous == before
    assert records.input(relu).min == -1
    assert records.output(relu).zeros == 3


def test_unchanged_tensor_keeps_its_id_after_others_changed() -> None:
    x, y = torch.ones(2), torch.ones(2)

    def program(t: Any) -> None:
        identity = nn.Identity()
        identity(x)
        y.add_(1)
        identity(x)

    first, second = record(program).modules()
    assert first.inputs == second.inputs


def test_view_names_the_tensor_that_it_is_a_view_of() -> None:
    records = record(lambda t: Apply(lambda x: x[0].view(2, 2))(torch.rand(3, 4)))
    call = records.module("")
    assert records.output(call).view_of == call.inputs[0][1]
    assert records.input(call).view_of is None


def test_in_place_change_through_a_view_changes_the_base_too() -> None:
    base = torch.zeros(3)

    def program(t: Any) -> None:
        identity = nn.Identity()
        identity(base)
        base[0] = 1
        identity(base)

    records = record(program)
    first, second = records.modules()
    assert records.input(second).previous == first.inputs[0][1]
    assert records.input(second).zeros == 2


def test_tensor_of_an_earlier_step_says_which() -> None:
    model = Net()

    def program(t: Any) -> None:
        x = torch.rand(2, 4)
        for _ in range(3):
            model(x)
            t.step()

    records = record(program)
    roots = records.modules(module="")
    assert [records.input(call).from_step for call in roots] == [None, 0, 1]


def test_hidden_state_carried_over_is_from_the_step_before() -> None:
    cell = nn.GRUCell(3, 4)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)

    def program(t: Any) -> None:
        hidden = torch.zeros(1, 4)
        for _ in range(2):
            hidden = cell(torch.rand(1, 3), hidden)
            loss = hidden.sum()
            loss.backward()
            optimizer.step()
            t.step()
            hidden = hidden.detach_()

    records = record(program)
    second = records.modules(step=1)[0]
    assert records.input(second, 1).from_step == 0


def test_gradient_names_the_tensor_whose_gradient_it_is() -> None:
    model = Net()
    records = record(lambda t: model(torch.rand(2, 4)).sum().backward())
    (backward,) = records.of(Call, phase="backward", module="net.0", outputs=[])
    assert records.input(backward).grad_of == records.module("net.0").outputs[0][1]
    assert records.input(backward).shape == (2, 8)


def test_gradient_of_an_earlier_step_names_no_tensor_of_this_one() -> None:
    model = Net()

    def program(t: Any) -> None:
        loss = model(torch.rand(2, 4)).sum()
        t.step()
        loss.backward()

    records = record(program)
    (backward,) = records.of(Call, phase="backward", module="net.0", outputs=[])
    assert backward.step == 1
    assert backward.forward is None
    assert records.input(backward).grad_of is None


def test_tensor_says_what_it_is() -> None:
    weight = nn.Parameter(torch.rand(4, 3))

    def program(t: Any) -> None:
        Apply(lambda w: (w.T, w * 2, w.detach().bfloat16(), w[0, 0]))(weight)

    records = record(program)
    call = records.module("")
    given, turned, doubled, half, scalar = (
        records.input(call), *(records.output(call, i) for i in range(4)),
    )  # fmt: skip
    assert (given.shape, given.stride, given.is_leaf) == ((4, 3), None, True)
    assert (given.requires_grad, given.grad_fn) == (True, None)
    assert (turned.shape, turned.stride) == ((3, 4), (1, 3))
    assert (doubled.grad_fn, doubled.is_leaf, doubled.numel) == ("MulBackward0", False, 12)
    assert (half.dtype, half.requires_grad) == ("bfloat16", False)
    assert (scalar.shape, scalar.numel) == ((), 1)


def test_statistics_are_those_of_a_float64_oracle() -> None:
    x = torch.randn(5, 7)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3] = 0, torch.nan, torch.inf, -torch.inf
    records = record(lambda t: nn.Identity()(x))
    got = records.input(records.module(""))
    finite = x[x.isfinite()].double()
    assert (got.nan, got.posinf, got.neginf, got.zeros) == (1, 1, 1, 1)
    assert got.min == finite.min().item()
    assert got.max == finite.max().item()
    assert got.mean == pytest.approx(finite.mean().item(), rel=1e-6)
    assert got.std == pytest.approx(finite.std(correction=0).item(), rel=1e-6)
    assert got.norm == pytest.approx(finite.norm().item(), rel=1e-6)


def test_tensor_that_dies_leaves_its_number_to_nobody() -> None:
    def program(t: Any) -> None:
        identity = nn.Identity()
        for i in range(50):
            identity(torch.full((3,), float(i)))

    records = record(program)
    ids = [call.inputs[0][1] for call in records.modules()]
    assert len(set(ids)) == 50
    assert [records.input(call).max for call in records.modules()] == list(range(50))


def test_no_tensor_is_kept_alive() -> None:
    model = Net()
    with trace(out=Recorded().append, every=1):
        out = model(torch.rand(2, 4))
        out.sum().backward()
        dead = weakref.ref(out)
        del out
        gc.collect()
        assert dead() is None


def test_graph_is_freed_inside_the_block() -> None:
    freed: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            weakref.finalize(ctx, freed.append, 1)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    with trace(out=Recorded().append, every=1):
        y = Apply(Watched.apply)(torch.ones(2, requires_grad=True))
        y = y.sum()
        y.backward()
        del y
        gc.collect()
        assert freed == [1]


def test_inference_tensor_has_an_id() -> None:
    def program(t: Any) -> None:
        with torch.inference_mode():
            Net()(torch.rand(2, 4))

    records = record(program)
    assert records.output(records.module("")).shape == (2, 2)


@pytest.mark.parametrize(("way", "op", "words"), [
    (torch.vmap(torch.log), "log", "made 7 NaN of 12 from"),
    (torch.vmap(torch.log, in_dims=1, out_dims=0), "log", "made 7 NaN of 12 from"),
    (torch.vmap(torch.vmap(torch.log)), "log", "made 7 NaN of 12 from"),
    (torch.func.grad(lambda w: (w * 0).square().sum().sqrt()), "autograd.grad",
     "made 12 NaN of 12 from"),
    (torch.vmap(torch.func.grad(lambda w: (w * 0).square().sum().sqrt())),
     "autograd.grad", "made 12 NaN of 12 from"),
], ids=["vmap", "dims", "twice", "grad", "grad of each"])  # fmt: skip
def test_what_comes_out_of_a_transform_is_known_by_what_made_it(
    way: Any, op: str, words: str
) -> None:
    x = torch.ones(4, 3)
    x.view(-1)[:7] = -1
    scale = torch.ones((), requires_grad=True)
    with trace(out=lambda record: None) as t:
        (way(x).mean() * scale).backward()
    (found,) = [f for f in t.findings if f.severity == "error"]
    assert (found.code, found.op) == ("TT101", op)
    assert words in found.message


@pytest.fixture
def swapping() -> Iterator[None]:
    """Parameters are swapped where a module is moved or loaded, but none that has references."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def halve(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("change", [lambda m: m.half().float(), lambda m: m.double(), halve])
def test_parameters_can_be_swapped_while_and_after_they_are_traced(change: Any, level: Any) -> None:
    def turn(model: nn.Module, sgd: torch.optim.Optimizer) -> None:
        x = torch.ones(3, 4, dtype=next(model.parameters()).dtype)
        loss = model(x).square().sum() + sum(p.norm() for p in model.parameters())
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    def program(begin: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        with begin():
            traced = begin()(turn)
            for _ in range(2):
                turn(model, sgd)
                change(model)
            traced(model, sgd)
        change(model)  # after the block, and between two calls of a decorated function
        return [*model.parameters()]

    want = program(_Nothing)
    found = program(lambda: trace(out=lambda record: None, level=level))
    assert all(map(torch.equal, want, found))


class _Nothing(contextlib.nullcontext[None]):
    def __call__(self, function: Any) -> Any:
        return function
