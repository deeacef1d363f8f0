"""What source lines say of values: every kind of tensor, containers, objects that misbehave."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pysnooper.utils import truncate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tensortrace import Lines, trace
from tensortrace.capture.active import slot
from tests.capture.lines.lines_of import Seen, all_of, lines_of

pytestmark = pytest.mark.usefixtures("closing_folder")


def told(make: Callable[[], Any], **options: Any) -> str:
    """How a value is told when a line makes it."""

    def function() -> None:
        value = make()
        assert value is not None

    (text,) = lines_of(function, lines=Lines(**options)).changes("value")
    return text


NAN = float("nan")
Point = namedtuple("Point", "x y")  # noqa: PYI024 both kinds of named tuple are meant


class Typed(NamedTuple):
    x: Any
    y: int


@dataclasses.dataclass
class Batch:
    ids: Tensor
    size: int


class Plain:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As those of transformers: a mapping with attributes."""


class Sub(Tensor):
    pass


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(4)


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


# ---- tensors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.ones(2, 3), "tensor<(2, 3), float32, cpu>"),
        (lambda: torch.ones(()), "tensor<(), float32, cpu>"),
        (lambda: torch.empty(0), "tensor<(0,), float32, cpu>"),
        (lambda: nn.Parameter(torch.ones(3)), "tensor<(3,), float32, cpu, grad>"),
        (lambda: torch.tensor([1.0, NAN]), "tensor<(2,), float32, cpu, has_nan>"),
        (lambda: torch.tensor([NAN, -float("inf")]),
         "tensor<(2,), float32, cpu, has_nan, has_inf>"),
        (lambda: torch.tensor([NAN]).bfloat16(), "tensor<(1,), bfloat16, cpu, has_nan>"),
        (lambda: torch.tensor([NAN]).to(torch.float8_e5m2),
         "tensor<(1,), float8_e5m2, cpu, has_nan>"),
        (lambda: torch.tensor([NAN]).to(torch.float8_e4m3fn),
         "tensor<(1,), float8_e4m3fn, cpu, has_nan>"),
        (lambda: torch.ones(2, dtype=torch.complex64), "tensor<(2,), complex64, cpu>"),
        (lambda: torch.ones(3, device="meta"), "tensor<(3,), float32, meta>"),
        (lambda: torch.eye(3).to_sparse(), "tensor<(3, 3), float32, cpu>"),
        (lambda: torch.eye(3).as_subclass(Sub), "tensor<(3, 3), float32, cpu>"),
        (fake, "tensor<(4,), float32, cpu, fake>"),
    ],
)  # fmt: skip
def test_every_kind_of_tensor_has_its_words(make: Callable[[], Any], text: str) -> None:
    assert told(make) == text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        lambda: nested(torch.strided),
        lambda: nested(torch.jagged),
    ],
)
def test_tensors_without_shape_or_usual_values_are_told_all_the_same(
    make: Callable[[], Any],
) -> None:
    assert told(make).startswith("tensor<(")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: torch.linalg.eigh(torch.eye(3)), ("eigenvalues", "eigenvectors")),
        (lambda: torch.aminmax(torch.ones(3)), ("min", "max")),
        (lambda: torch.cummax(torch.ones(3), 0), ("values", "indices")),
        (lambda: torch.ones(3).topk(2), ("values", "indices")),
        (lambda: torch.linalg.svd(torch.eye(3)), ("U", "S", "Vh")),
        (lambda: torch.linalg.lu_factor(torch.eye(3)), ("LU", "pivots")),
    ],
)
def test_every_return_type_is_told_field_by_field(
    make: Callable[[], Any], names: tuple[str, ...]
) -> None:
    text = told(make)
    assert [f"{name}=tensor<" in text for name in names] == [True] * len(names)


def test_statistics_are_told_where_they_are_asked_for() -> None:
    text = told(lambda: torch.tensor([1.0, 3.0]), statistics=True)
    assert text == "tensor<(2,), float32, cpu, mean=2, std=1>"


def test_inside_vmap_and_grad_tensors_have_the_shape_that_the_function_sees() -> None:
    def inner(x: Tensor) -> Tensor:
        y = x * 2
        return y.sum()

    def function() -> Tensor:
        rows = torch.vmap(inner)(torch.ones(4, 3))
        return rows + torch.func.grad(inner)(torch.ones(3)).sum()

    seen = lines_of(function, lines=Lines(depth=2))
    assert [text.startswith("tensor<(3,)") for text in seen.changes("y")] == [True, True]
    assert seen.changes("rows")[0].startswith("tensor<(4,)")


# ---- changes


def test_a_change_in_place_is_a_change() -> None:
    def function() -> Tensor:
        x = torch.zeros(2)
        y = x[:1]
        x.add_(1)
        return y

    seen = lines_of(function)
    (line,) = [r for r in seen.lines if len(r.changed) == 2]
    assert [(v.name, v.was == v.text) for v in line.changed] == [("x", True), ("y", True)]
    tensors = seen.tensors
    (new,) = [number for _, number in line.changed[0].tensors]
    assert tensors[0, new].previous is not None
    assert tensors[0, new].mean == 1.0


def test_an_optimizer_step_changes_the_parameters() -> None:
    def function(weight: nn.Parameter) -> None:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.sum().backward()
        optimizer.step()

    seen = lines_of(function, nn.Parameter(torch.ones(2)))
    assert len(seen.changes("weight")) == 2


def test_inside_a_list_a_changed_tensor_is_seen() -> None:
    def function() -> list[Any]:
        items = [torch.zeros(2), {"k": torch.zeros(3)}]
        items[0].add_(1)
        items[1]["k"] = torch.zeros(4)
        items.append(5)
        return items

    assert len(lines_of(function).changes("items")) == 4


def test_a_tensor_at_the_address_of_a_freed_one_is_another() -> None:
    def function() -> Any:
        items = [torch.zeros(2)]
        for _ in range(8):
            # pop frees the tensor before the next one is made, most likely at its address.
            items.pop() is None or items.append(torch.zeros(2))
        return items

    assert len(all_of(function).changes("items")) == 9


def test_the_same_value_again_is_no_change() -> None:
    def function() -> None:
        x = 1000
        x = 1000  # noqa: F841
        y = float("nan")
        y = float("nan")  # noqa: F841
        z = [1]
        z[0] = 1

    seen = lines_of(function)
    assert [len(seen.changes(name)) for name in "xyz"] == [1, 1, 1]


def test_a_deleted_variable_that_comes_back_is_new() -> None:
    def function() -> int:
        x = 1
        del x
        x = 2
        return x

    seen = lines_of(function)
    assert [v.was for line in seen.lines for v in line.changed] == [None, None]


# ---- containers and objects


A = "tensor<(2,), float32, cpu>"


@pytest.mark.parametrize(
    ("make", "text", "places"),
    [
        (lambda a: [a, 1], f"[{A}, 1]", ["[0]"]),
        (lambda a: (a,), f"({A},)", ["[0]"]),
        (lambda a: {"k": [a]}, f"{{'k': [{A}]}}", ["['k'][0]"]),
        (lambda a: Point(a, 2), f"Point(x={A}, y=2)", [".x"]),
        (lambda a: Typed(a, 2), f"Typed(x={A}, y=2)", [".x"]),
        (lambda a: Batch(a, 2), f"Batch(ids={A}, size=2)", [".ids"]),
        (Plain, f"Plain(tensor={A})", [".tensor"]),
        (lambda a: ModelOutput(logits=a), f"ModelOutput({{'logits': {A}}})", ["['logits']"]),
        (lambda a: defaultdict(list, k=[a]), f"defaultdict({{'k': [{A}]}})", ["['k'][0]"]),
        (lambda a: deque([a]), f"deque([{A}])", ["[0]"]),
        (lambda a: deque([a], 3), f"deque([{A}], maxlen=3)", ["[0]"]),
        (lambda a: [[[[[a, 1]]]]], f"[[[[[{A}, 1]]]]]", ["[0][0][0][0][0]"]),
        (lambda a: [[[[[1]]]]], "[[[[[1]]]]]", []),
    ],
)
def test_tensors_in_containers_are_told_and_linked(
    make: Callable[[Tensor], Any], text: str, places: list[str]
) -> None:
    def function(a: Tensor) -> None:
        value = make(a)
        assert value is not None

    seen = lines_of(function, torch.ones(2))
    (variable,) = [v for line in seen.lines for v in line.changed if v.name == "value"]
    (a,) = [v for line in seen.lines for v in line.changed if v.name == "a"]
    assert variable.text == text
    assert variable.tensors == [(place, a.tensors[0][1]) for place in places]


def test_a_tensor_takes_no_room_from_the_limit_of_a_text() -> None:
    text = told(lambda: {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)})
    assert text == f"{{'a': {A}, 'b': {A}, 'c': {A}}}"


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Loud(nn.Module):
    def __repr__(self) -> str:
        raise AssertionError("the repr of a module is the user's")


class Slow:
    asked = 0

    def __repr__(self) -> str:
        import time

        Slow.asked += 1
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass
        return "slow"


def test_a_repr_that_raises_is_told_as_that() -> None:
    assert told(Unspeakable) == "<Unspeakable whose repr raised RuntimeError>"


def test_a_module_is_told_by_its_class_and_its_path_and_never_asked() -> None:
    assert told(Loud) == "<Loud>"
    net = nn.Sequential(nn.Linear(2, 2))

    def function() -> None:
        inner = net[0]
        assert inner is not None

    assert lines_of(function, model=net).changes("inner") == ["<Linear 0>"]


def test_tensors_and_modules_deep_inside_are_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Tensor, **options: Any) -> str:
        raise AssertionError("the repr of a tensor reads all of it")

    monkeypatch.setattr(Tensor, "__repr__", refuse)
    deep: Any = torch.ones(2)
    for _ in range(12):
        deep = [deep]
    assert told(lambda: deep) == "[[[[[[[[<list>]]]]]]]]"
    assert "<Loud>" in told(lambda: OrderedDict(a=Loud()))
    assert "AssertionError" not in told(lambda: OrderedDict((i, deep) for i in range(200)))


class Odd:
    """Its keys and attributes misbehave."""

    __module__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __hash__(self) -> int:
        return 1


def test_objects_that_cannot_be_compared_or_placed_stop_nothing() -> None:
    def function() -> int:
        odd = Odd()
        table = {odd: 1, torch.ones(1): 2}
        table = {Odd(): 1}
        n = len(table)
        return n

    seen = lines_of(function)
    assert len(seen.changes("table")) == 2
    assert seen.changes("n") == ["1"]


def test_a_slow_repr_is_asked_no_more_than_twice() -> None:
    Slow.asked = 0

    def function() -> Slow:
        slow = Slow()
        one, two, three = 1, 2, 3
        assert one + two == three
        return slow

    seen = lines_of(function)
    assert Slow.asked <= 2
    assert seen.changes("slow") == ["slow"]


def test_numbers_are_told_however_slow_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensortrace.capture.lines import reader

    monkeypatch.setattr(reader, "_SLOW_NS", -1)

    def function() -> int:
        total = 0
        for i in range(3):
            total += i
        return total

    assert lines_of(function).changes("i") == ["0", "1", "2"]


def test_a_huge_value_has_a_short_text() -> None:
    assert len(told(lambda: "x" * 10_000_000)) == 100
    numbers = list(range(100_000))
    assert told(lambda: numbers) == truncate(repr(numbers), 100)


def test_a_value_that_holds_itself_ends() -> None:
    def function() -> None:
        items: list[Any] = [1]
        items.append(items)

    assert len(lines_of(function).changes("items")) == 2


def test_custom_words_win() -> None:
    text = told(lambda: torch.ones(3), custom_repr=(Tensor, lambda x: f"my {x.shape[0]}"))
    assert text == "my 3"
    custom = ((lambda x: isinstance(x, int), lambda x: f"int {x}"), (list, len))
    assert told(lambda: 7, custom_repr=custom) == "int 7"
    assert told(lambda: [1, 2], custom_repr=custom) == "2"


# ---- watch


def test_expressions_are_followed_like_variables() -> None:
    def function(x: Tensor) -> None:
        net = nn.Linear(2, 1)
        net(x).sum().backward()
        net.weight.grad = None

    seen = lines_of(function, torch.ones(2), lines=Lines(watch=("net.weight.grad", "nothing.here")))
    assert seen.changes("net.weight.grad") == ["None", "tensor<(1, 2), float32, cpu>", "None"]
    assert not seen.changes("nothing.here")
    (grad,) = [
        v for r in seen.lines for v in r.changed if v.name == "net.weight.grad" and v.tensors
    ]
    assert (0, grad.tensors[0][1]) in seen.tensors


@pytest.mark.parametrize("watch", ["len(items) - 1", "len(items) - 1  # at 0"])
def test_an_expression_that_ends_in_a_number_is_followed(watch: str) -> None:
    def function() -> None:
        items = [5]
        items.append(6)

    seen = lines_of(function, lines=Lines(watch=watch, watch_explode="items * 1"))
    assert seen.changes(watch) == ["0", "1"]
    assert seen.changes("(items * 1)[1]") == ["6"]


def test_exploded_expressions_give_their_parts() -> None:
    def function(net: nn.Module, config: dict[str, Any], items: list[int], plain: Plain) -> None:
        config["lr"] = 0.2
        items[1] = 5
        plain.tensor = torch.ones(3)

    net = nn.BatchNorm1d(2)
    seen = lines_of(
        function, net, {"lr": 0.1}, [1, 2], Plain(torch.ones(2)),
        lines=Lines(watch_explode=("net", "config", "items", "plain")),
    )  # fmt: skip
    assert seen.changes("config['lr']") == ["0.1", "0.2"]
    assert seen.changes("items[1]") == ["2", "5"]
    assert seen.changes("plain.tensor") == [A, "tensor<(3,), float32, cpu>"]
    assert seen.changes("net.weight") == ["tensor<(2,), float32, cpu, grad>"]
    assert seen.changes("net.running_mean") == [A]


def test_the_classes_of_pysnooper_can_be_watched() -> None:
    import pysnooper

    def function() -> None:
        items = list(range(6))
        items[4] = 50

    watch = pysnooper.Indices("items")[-3:]
    seen = lines_of(function, lines=Lines(watch=watch))
    assert seen.changes("items[4]") == ["4", "50"]
    assert not seen.changes("items[0]")


# ---- life


def test_no_tensor_lives_longer_for_being_a_variable() -> None:
    died: list[bool] = []

    def function() -> None:
        x = torch.ones(2)
        ref = weakref.ref(x)
        x = torch.zeros(2)
        died.append(ref() is None)
        items = [torch.ones(3)]
        other = weakref.ref(items[0])
        items.clear()
        died.append(other() is None)

    lines_of(function)
    assert died == [True, True]


def test_nothing_is_held_after_the_block() -> None:
    x = torch.ones(2)
    ref = weakref.ref(x)
    seen = Seen()
    t = trace(out=seen.take, lines=True)
    with t:
        y = x + 1
    assert y is not None
    del x
    gc.collect()
    assert ref() is None
    assert not seen.faults


def test_a_long_step_keeps_few_descriptions() -> None:
    def function() -> Tensor:
        x = torch.ones(2)
        with torch.no_grad():
            for _ in range(25_000):
                x = x + 0
        assert slot.recorder is not None
        drafts.append(len(slot.recorder.tensors.drafts or ()))
        return x

    drafts: list[int] = []
    lines_of(function, level="op")
    assert 0 < drafts[0] < 10_000


def test_a_key_of_a_dict_is_told_without_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    formatted: list[Any] = []

    def text(self: Any, **given: Any) -> str:
        formatted.append(self)
        return "all of it"

    monkeypatch.setattr(torch.Tensor, "__repr__", text)
    monkeypatch.setattr(nn.Parameter, "__repr__", text)
    key = nn.Parameter(torch.ones(3))
    seen = lines_of(lambda known: known[key] + 1, {key: torch.ones(3)})
    assert not formatted
    (known,) = [v for line in seen.lines for v in line.changed if v.name == "known"]
    ((place, _),) = known.tensors
    assert "all of it" not in place + known.text
    assert place.startswith("[")
