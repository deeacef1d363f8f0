"""Backward records: what arrived where, for every way that a gradient is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tensortrace.records import Call, Param
from tests.capture import Net, Recorded, record


def arrived(records: Recorded, **fields: Any) -> list[Call]:
    """Backward calls of modules: the gradient of an output arrived."""
    calls = records.of(Call, phase="backward", op=None, outputs=[], **fields)
    return sorted(calls, key=lambda call: (call.step, call.seq))


def made(records: Recorded, **fields: Any) -> list[Call]:
    """Backward calls that made the gradient of a parameter."""
    return records.of(Call, phase="backward", op=None, inputs=[], **fields)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


class Block(nn.Module):
    """Calls its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


def test_backward_goes_through_the_modules_the_other_way_outer_before_inner() -> None:
    records = record(lambda t: Net()(torch.rand(2, 4)).sum().backward())
    assert [call.module for call in arrived(records)] == ["", "head", "net", "net.1", "net.0"]
    assert {call.phase for call in arrived(records)} == {"backward"}


def test_backward_call_belongs_to_its_forward_call() -> None:
    records = record(lambda t: Net()(torch.rand(2, 4)).sum().backward())
    for call in arrived(records):
        assert call.module is not None
        assert call.forward == records.module(call.module).seq
        assert [name for name, _ in call.inputs] == ["output[0]"]


def test_gradient_of_an_output_is_that_of_an_oracle() -> None:
    model = Net()
    x = torch.rand(3, 4)
    hidden = model.net(x).detach().requires_grad_()
    model.head(hidden).square().sum().backward()
    assert hidden.grad is not None
    records = record(lambda t: model(x).square().sum().backward())
    (call,) = arrived(records, module="net")
    got = records.input(call)
    assert got.shape == (3, 8)
    assert got.norm == pytest.approx(hidden.grad.double().norm().item(), rel=1e-5)
    assert got.min == pytest.approx(hidden.grad.min().item(), rel=1e-5)


def test_gradient_of_a_parameter_is_that_of_an_oracle() -> None:
    model = Net()
    records = record(lambda t: model(torch.rand(3, 4)).square().sum().backward())
    found = {f"{call.module}.{call.outputs[0][0]}": records.output(call) for call in made(records)}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert found[name].shape == tuple(parameter.shape)
        assert found[name].norm == pytest.approx(parameter.grad.double().norm().item(), rel=1e-5)


def test_each_call_of_a_reused_module_has_a_backward_of_its_own() -> None:
    layer = nn.Linear(4, 4)

    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    records = record(lambda t: Reuses()(torch.rand(2, 4)).sum().backward())
    first, second = records.modules(module="layer")
    assert [(c.nth, c.forward) for c in arrived(records, module="layer")] == [
        (1, second.seq), (0, first.seq),
    ]  # fmt: skip


def test_every_output_of_a_module_has_its_gradient() -> None:
    class Splits(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"sum": x + 1, "parts": x.split(2)}

    def program(t: Any) -> None:
        out = Splits()(torch.rand(4, requires_grad=True))
        (out["sum"].sum() * 2 + out["parts"][1].sum() * 3).backward()

    records = record(program)
    got = {call.inputs[0][0]: records.input(call) for call in arrived(records)}
    assert {name: grad.max for name, grad in got.items()} == {
        "output[0]['sum']": 2.0, "output[0]['parts'][1]": 3.0,
    }  # fmt: skip


def test_no_backward_has_no_backward_records() -> None:
    def program(t: Any) -> None:
        Net()(torch.rand(2, 4))
        with torch.no_grad():
            Net()(torch.rand(2, 4))

    assert record(program).of(Call, phase="backward") == []


def test_autograd_grad_shows_intermediates_and_the_parameters_asked_for() -> None:
    model = Net()

    def program(t: Any) -> None:
        torch.autograd.grad(model(torch.rand(2, 4)).sum(), [model.head.weight])

    records = record(program)
    assert [call.module for call in arrived(records)] == ["", "head"]
    assert [(c.module, c.outputs[0][0]) for c in made(records)] == [("head", "weight")]


def test_autograd_grad_to_the_input_passes_every_module() -> None:
    x = torch.rand(2, 4, requires_grad=True)
    records = record(lambda t: torch.autograd.grad(Net()(x).sum(), x))
    assert [call.module for call in arrived(records)] == ["", "head", "net", "net.1", "net.0"]
    assert made(records) == []


def test_double_backward_has_both_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.rand(2, 4, requires_grad=True)

    def program(t: Any) -> None:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()

    records = record(program)
    # The slope of tanh is made from its own output, so the second pass goes through it too.
    assert [call.module for call in arrived(records)] == ["", "1", "0"] * 2
    assert "weight" in {call.outputs[0][0] for call in made(records)}


def test_second_backward_over_a_retained_graph_is_recorded_again() -> None:
    def program(t: Any) -> None:
        loss = Net()(torch.rand(2, 4)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    records = record(program)
    assert [call.module for call in arrived(records)] == 2 * ["", "head", "net", "net.1", "net.0"]
    forward = records.module("head").seq
    assert [call.forward for call in arrived(records, module="head")] == [forward, forward]
    assert len(made(records, module="head")) == 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_and_each_recomputed_call_knows_its_forward(
    use_reentrant: bool,
) -> None:
    model = Checkpointed(use_reentrant)
    x = torch.rand(2, 4, requires_grad=True)
    records = record(lambda t: model(x).sum().backward())
    assert len(records.steps()) == 1
    first = records.modules(recompute=False)
    again = records.modules(recompute=True)
    assert [call.module for call in first] == [
        "", "blocks.0", "blocks.0.layer", "blocks.0.layer",
        "blocks.1", "blocks.1.layer", "blocks.1.layer",
    ]  # fmt: skip
    assert [call.module for call in again] == [
        "blocks.1", "blocks.1.layer", "blocks.1.layer",
        "blocks.0", "blocks.0.layer", "blocks.0.layer",
    ]  # fmt: skip
    by_seq = {call.seq: call for call in first}
    for call in again:
        assert call.forward is not None
        original = by_seq[call.forward]
        assert (original.module, original.nth) == (call.module, call.nth)
        assert call.exception is None
    assert [call.nth for call in again] == [0, 0, 1, 0, 0, 1]
    layers = [call for call in again if call.module == "blocks.1.layer"]
    assert {call.parent for call in layers} == {again[0].seq}
    assert {call.parent for call in again if call.module == "blocks.1"} == {None}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_model_has_the_gradients_of_its_modules(use_reentrant: bool) -> None:
    model = Checkpointed(use_reentrant)
    x = torch.rand(2, 4, requires_grad=True)
    records = record(lambda t: model(x).sum().backward())
    assert {call.module for call in made(records)} == {"blocks.0.layer", "blocks.1.layer"}
    assert {call.module for call in arrived(records)} >= {"", "blocks.0.layer", "blocks.1.layer"}


def test_checkpointed_micro_batches_of_one_step_are_linked_to_their_own_forward() -> None:
    model = Checkpointed(False)

    def program(t: Any) -> None:
        t.step()
        for _ in range(2):
            model(torch.rand(2, 4, requires_grad=True)).sum().backward()

    records = record(program)
    again = records.modules(module="blocks.0", recompute=True)
    forward = records.modules(module="blocks.0", recompute=False)
    assert [call.forward for call in again] == [call.seq for call in forward]


def test_view_whose_base_changed_in_place_has_no_gradient_and_breaks_nothing() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2)[:, :2]

    leaf = torch.ones(2, 4, requires_grad=True)

    def program(t: Any) -> None:
        out = Views()(leaf)
        out.mul_(3)
        out.sum().backward()

    records = record(program)
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[6, 6, 0, 0]] * 2
    assert records.module("").outputs != []


def test_output_that_is_an_in_place_changed_view_is_not_watched() -> None:
    class Changes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            view = (x * 2)[:, :2]
            view.mul_(3)
            return view

    leaf = torch.ones(2, 4, requires_grad=True)
    records = record(lambda t: Changes()(leaf).sum().backward())
    assert arrived(records) == []
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[6, 6, 0, 0]] * 2


def test_gradient_sees_what_the_users_own_hooks_made_of_it() -> None:
    layer, top = nn.Linear(4, 4), nn.Linear(4, 1)

    def program(t: Any) -> None:
        hidden = layer(torch.rand(2, 4))
        hidden.register_hook(lambda grad: torch.full_like(grad, 5.0))
        top(hidden).sum().backward()

    records = record(program)
    (call,) = arrived(records, module="")
    assert (records.input(call).min, records.input(call).max) == (5.0, 5.0)


def test_frozen_parameter_has_no_gradient() -> None:
    model = Net()
    model.net.requires_grad_(False)
    records = record(lambda t: model(torch.rand(2, 4)).sum().backward())
    assert {call.module for call in made(records)} == {"head"}
    assert {call.module for call in arrived(records)} == {"", "head"}


def test_sparse_gradient_of_an_embedding_is_measured_by_its_values() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)

    def program(t: Any) -> None:
        (embedding(torch.tensor([1, 5])) * 2).sum().backward()
        optimizer.step()

    records = record(program)
    (call,) = made(records)
    assert records.output(call).shape == (10, 3)
    assert (records.output(call).min, records.output(call).max) == (2.0, 2.0)
    (param,) = records.of(Param)
    assert param.grad is not None
    assert param.grad.norm == pytest.approx((6 * 4) ** 0.5)


def test_tied_parameter_has_the_name_of_its_first_owner() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    records = record(program)
    # The hook sees one gradient: torch adds up what both uses made.
    assert {call.module for call in made(records)} == {"embed"}
    assert [(p.name, p.module) for p in records.of(Param)] == [("embed.weight", "embed")]


def test_user_function_is_passed_on_the_way_back() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Double.apply(x)

    records = record(lambda t: Uses()(torch.ones(2, requires_grad=True)).sum().backward())
    assert [call.module for call in arrived(records)] == [""]


def test_backward_after_the_block_is_not_recorded_and_works() -> None:
    model = Net()
    losses: list[torch.Tensor] = []
    records = record(lambda t: losses.append(model(torch.rand(2, 4)).sum()))
    count = len(records)
    losses[0].backward()
    assert len(records) == count
    assert all(p.grad is not None for p in model.parameters())


class TakesNoGradientOfItsWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * 2, None


class Unweighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = TakesNoGradientOfItsWeight.apply(self.inner(x), self.weight)
        return out


@pytest.mark.parametrize("level", ["module", "op"])
def test_a_function_may_give_a_parameter_no_gradient(level: Any) -> None:
    records = record(lambda t: Unweighted()(torch.rand(4, 3)).sum().backward(), level=level)
    assert {call.module for call in made(records)} == {"inner"}
