"""Finding tensors in values: every container, none of the user's code beyond reading it."""

from __future__ import annotations

import dataclasses
from collections import UserDict, defaultdict
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tensortrace.capture.flatten import tensors_in

A, B = torch.zeros(1), torch.ones(2)


def names(value: Any) -> list[str]:
    return [name for name, _ in tensors_in(value, "x")]


def test_tensor_itself_is_found_as_the_very_object() -> None:
    ((name, tensor),) = tensors_in(A, "x")
    assert name == "x"
    assert tensor is A


def test_same_tensor_twice_is_found_twice() -> None:
    assert names([A, A]) == ["x[0]", "x[1]"]


def test_parameter_and_subclass_are_tensors() -> None:
    class Mine(torch.Tensor):
        pass

    assert names([nn.Parameter(A), A.as_subclass(Mine)]) == ["x[0]", "x[1]"]


def test_mappings_give_their_keys() -> None:
    assert names(MappingProxyType({"k": A})) == ["x['k']"]
    assert names(defaultdict(list, {(1, 2): [B]})) == ["x[(1, 2)][0]"]


def test_packed_sequence_is_opened() -> None:
    packed = pack_padded_sequence(torch.rand(3, 2, 4), torch.tensor([3, 2]))
    assert names(packed)[:2] == ["x[0]", "x[1]"]


def test_module_and_text_are_no_containers() -> None:
    assert names([nn.Linear(1, 1), "text", b"bytes", 3, None, True]) == []


def test_container_that_holds_itself_ends() -> None:
    loop: list[Any] = [A]
    loop.append(loop)
    assert names(loop) == ["x[0]"]


def test_very_deep_container_ends() -> None:
    deep: Any = A
    for _ in range(50):
        deep = [deep]
    assert names(deep) == []
    assert names([[[[[A]]]]]) == ["x[0][0][0][0][0]"]


def test_container_that_cannot_be_read_is_left_closed() -> None:
    class Broken(dict):
        def __iter__(self) -> Any:
            raise RuntimeError("not today")

    class Angry(UserDict):
        def items(self) -> Any:
            yield "k", A
            raise RuntimeError("not today")

    assert names(Broken(k=A)) == ["x['k']"]
    assert names([B, Angry(), A]) == ["x[0]", "x[2]"]


def test_properties_of_a_dataclass_are_not_called() -> None:
    @dataclasses.dataclass
    class Lazy:
        a: torch.Tensor

        @property
        def b(self) -> torch.Tensor:
            raise AssertionError("read")

        def __getattribute__(self, name: str) -> Any:
            assert name in ("__class__", "__dict__", "__dataclass_fields__"), name
            return super().__getattribute__(name)

    assert names(Lazy(A)) == ["x.a"]


def test_dataclass_with_a_field_never_set_gives_the_others() -> None:
    @dataclasses.dataclass
    class Half:
        a: torch.Tensor
        b: torch.Tensor = dataclasses.field(init=False)
        c: torch.Tensor = dataclasses.field(default_factory=lambda: B)

    assert names(Half(A)) == ["x.a", "x.c"]


def test_class_of_a_dataclass_is_no_value() -> None:
    @dataclasses.dataclass
    class Some:
        a: torch.Tensor

    assert names(Some) == []


def test_iterator_is_not_consumed() -> None:
    made = (x for x in (A, B))
    assert names(made) == []
    assert len(list(made)) == 2
