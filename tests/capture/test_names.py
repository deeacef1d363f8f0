"""Module paths: fixed at the first call, as `named_modules()` would give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tensortrace.records import Module, Param
from tests.capture import Net, Recorded, record


class Discriminator(Net):
    pass


def paths(records: Recorded) -> list[str | None]:
    """The path of each module call, in order of entry."""
    return [call.module for call in records.modules()]


def call(*modules: nn.Module) -> Any:
    """A program that calls each module once on a batch that fits."""

    def program(t: Any) -> None:
        for module in modules:
            module(torch.rand(2, 4))

    return program


def test_paths_of_the_first_model_are_those_of_named_modules() -> None:
    model = Net()
    records = record(call(model))
    assert paths(records) == ["", "net", "net.0", "net.1", "head"]
    assert set(paths(records)) == {path for path, _ in model.named_modules()}
    assert [m.cls for m in records.of(Module)] == ["Net", "Sequential", "Linear", "ReLU", "Linear"]


def test_second_model_is_prefixed_with_its_class_and_a_third_is_numbered() -> None:
    records = record(call(Net(), Discriminator(), Discriminator()))
    tree = ["net", "net.0", "net.1", "head"]
    assert paths(records) == [
        "", *tree,
        "Discriminator", *(f"Discriminator.{path}" for path in tree),
        "Discriminator#2", *(f"Discriminator#2.{path}" for path in tree),
    ]  # fmt: skip


def test_criterion_has_the_name_of_its_class() -> None:
    model, criterion = Net(), nn.MSELoss()
    records = record(lambda t: criterion(model(torch.rand(2, 4)), torch.zeros(2, 2)))
    assert paths(records)[-1] == "MSELoss"


def test_criterion_made_anew_in_each_turn_keeps_its_name() -> None:
    model = nn.Linear(4, 2)

    def program(t: Any) -> None:
        for _ in range(3):
            criterion = nn.MSELoss()
            criterion(model(torch.rand(2, 4)), torch.zeros(2, 2)).backward()

    assert paths(record(program)) == ["", "MSELoss"] * 3


def test_model_given_has_the_plain_paths_whoever_is_called_first() -> None:
    model, other = Net(), nn.Linear(4, 4)
    records = record(call(other, model), model=model)
    assert paths(records) == ["Linear", "", "net", "net.0", "net.1", "head"]


def test_part_of_the_model_given_called_alone_has_its_path_in_the_model() -> None:
    model = Net()
    assert paths(record(call(model.net), model=model)) == ["net", "net.0", "net.1"]


def test_module_that_no_root_holds_is_named_after_where_it_was_called() -> None:
    loose = nn.Tanh()

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Calls()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return loose(x)

    assert paths(record(call(Uses()))) == ["", "inner", "inner.Tanh"]


def test_module_in_a_plain_list_is_unregistered_and_the_second_is_numbered() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Holds()
    records = record(call(model, model))
    assert paths(records) == ["", "Linear", "Linear#2"] * 2


def test_module_registered_after_the_first_call_has_its_place_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    def program(t: Any) -> None:
        model(torch.rand(2, 4))
        t.step()
        model.append(nn.Tanh())
        model(torch.rand(2, 4))

    assert paths(record(program)) == ["", "0", "", "0", "1"]


def test_shared_module_has_the_first_of_its_paths() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    assert paths(record(call(Shares()))) == ["", "a", "a"]


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        checkpoint_wrapper,
    ],
    ids=["DataParallel", "compile", "checkpoint_wrapper"],
)
def test_wrapper_is_no_part_of_a_path(wrap: Any) -> None:
    torch.compiler.reset()
    records = record(call(wrap(Net())), compiled="eager")
    assert list(dict.fromkeys(paths(records))) == ["", "net", "net.0", "net.1", "head"]


@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_model_given_may_be_the_wrapper_or_what_it_holds(given: str) -> None:
    inner = Net()
    wrapper = nn.DataParallel(inner)
    records = record(call(wrapper), model=wrapper if given == "wrapper" else inner)
    assert list(dict.fromkeys(paths(records))) == ["", "net", "net.0", "net.1", "head"]


def test_wrapper_inside_a_model_is_no_part_of_a_path() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.DataParallel(nn.Linear(4, 4)))
    assert list(dict.fromkeys(paths(record(call(model))))) == ["", "0", "1"]


def test_wrapper_and_what_it_holds_are_described_once_and_counted_apart() -> None:
    model = nn.DataParallel(Net())

    def program(t: Any) -> None:
        for _ in range(3):
            model(torch.rand(2, 4)).sum().backward()

    records = record(program)
    roots = [m.cls for m in records.of(Module, path="")]
    assert roots == ["DataParallel", "Net"]
    assert {c.nth for c in records.modules(module="")} == {0}


def test_model_that_was_run_bare_keeps_its_paths_when_it_is_wrapped() -> None:
    model = Net()
    records = record(call(nn.Tanh(), model, nn.DataParallel(model)))
    assert [path for path in paths(records) if path and path.startswith("Net")][:6] == [
        "Net", "Net.net", "Net.net.0", "Net.net.1", "Net.head", "Net",
    ]  # fmt: skip
    assert "DataParallel" not in paths(records)


def test_better_name_learnt_later_is_an_alias_and_records_keep_the_first() -> None:
    model = Net()
    records = record(call(nn.Tanh(), model.head.__class__(4, 4), model.net, model))
    assert paths(records)[2:5] == ["Sequential", "Sequential.0", "Sequential.1"]
    assert paths(records)[5:] == [
        "Net", "Sequential", "Sequential.0", "Sequential.1", "Net.head",
    ]  # fmt: skip
    assert {(m.path, m.alias) for m in records.of(Module) if m.alias} == {
        ("Sequential", "Net.net"), ("Sequential.0", "Net.net.0"), ("Sequential.1", "Net.net.1"),
    }  # fmt: skip


def test_module_record_says_what_the_module_is() -> None:
    records = record(call(Net()))
    (linear,) = records.of(Module, path="net.0")
    assert [(p.name, p.shape, p.dtype, p.device, p.requires_grad) for p in linear.parameters] == [
        ("weight", (8, 4), "float32", "cpu", True), ("bias", (8,), "float32", "cpu", True),
    ]  # fmt: skip
    assert linear.forward is None  # torch's own
    (root,) = records.of(Module, path="")
    assert root.parameters == []
    assert root.forward is not None
    assert root.forward.line == Net.forward.__code__.co_firstlineno
    assert root.forward.file == Net.forward.__code__.co_filename


def test_module_is_described_again_when_it_changes_mode_and_not_otherwise() -> None:
    model = Net()

    def program(t: Any) -> None:
        x = torch.rand(2, 4)
        model(x)
        model(x)
        model.eval()
        model(x)
        model(x)

    assert [m.training for m in record(program).of(Module, path="head")] == [True, False]


def test_module_is_described_again_when_requires_grad_changes() -> None:
    model = Net()

    def program(t: Any) -> None:
        x = torch.rand(2, 4)
        model(x)
        model.head.weight.requires_grad_(False)
        model(x)
        model(x)

    records = record(program)
    assert [
        [p.requires_grad for p in m.parameters] for m in records.of(Module, path="head")
    ] == [[True, True], [False, True]]  # fmt: skip
    assert len(records.of(Module, path="net.0")) == 1


def test_lazy_module_is_described_with_the_parameters_that_it_gets() -> None:
    model = nn.LazyLinear(3)

    def program(t: Any) -> None:
        for _ in range(2):
            model(torch.rand(2, 4))

    records = record(program)
    last = records.of(Module, path="")[-1]
    assert last.cls == "Linear"
    assert [(p.name, p.shape) for p in last.parameters] == [("weight", (3, 4)), ("bias", (3,))]


def test_parameter_has_the_full_name_that_named_parameters_gives() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).sum().backward()
        optimizer.step()

    records = record(program)
    assert [p.name for p in records.of(Param)] == [name for name, _ in model.named_parameters()]
    assert [p.module for p in records.of(Param)] == ["net.0", "net.0", "head", "head"]


def test_parameter_of_the_root_itself_has_a_name_without_a_path() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).sum().backward()
        optimizer.step()

    params = record(program).of(Param)
    assert [(p.name, p.module) for p in params] == [("weight", ""), ("bias", "")]


def test_only_the_modules_asked_for_are_recorded() -> None:
    records = record(call(Net()), modules="net.*")
    assert paths(records) == ["net.0", "net.1"]
    assert records.described() == ["net.0", "net.1"]


def test_unhashable_module_has_its_path() -> None:
    class Compares(nn.Linear):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("not comparable")

    assert paths(record(call(Compares(4, 4)))) == [""]
