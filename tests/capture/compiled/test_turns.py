"""The compiled way of what is passed over: it says what Python says, and is as careful."""

from __future__ import annotations

import gc
import inspect
import math
import random
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor, nn

from tensortrace import Lines, trace
from tensortrace.capture import compiled
from tensortrace.capture.lines import deferred, frames, thinning
from tensortrace.capture.lines.frames import FrameTrace
from tensortrace.capture.ops import function_mode, places
from tensortrace.records import Call, Header, Line, Record, Step
from tests.capture import Recorded

pytestmark = pytest.mark.usefixtures("closing_folder")

turns: Any = compiled.turns
needs_turns = pytest.mark.skipif(turns is None, reason="not built, or switched off")

N = 40


class Made(torch.Tensor):
    """A subclass."""


def plain(x: Tensor) -> Tensor:
    for _ in range(N):
        y = x @ x
        x = torch.tanh(y)
    return x


def with_keywords(x: Tensor) -> Tensor:
    out = torch.zeros(3, 3)
    for i in range(N):
        y = torch.add(x, x, alpha=2)
        torch.mul(x, i % 3, out=out)
        torch.nn.functional.relu(y, inplace=i % 7 == 0)
        x = torch.clamp(input=y, min=-1, max=1)
    return x


def with_news(x: Tensor) -> Tensor:
    for i in range(N):
        y = x * (math.nan if i in {20, 21} else 0.5)
        y = y[:2] if i == 27 else y
        z = torch.ones(3).double() if i == 29 else torch.ones(3)
        whole = (x > 0) if i > 25 else x.argmax()
        del whole, z
    return y


def with_errors(x: Tensor) -> Tensor:
    for i in range(N):
        try:
            x = x @ (torch.ones(4) if i % 9 == 8 else torch.eye(3))
        except RuntimeError:
            continue
    return x


def with_grad(x: Tensor) -> Tensor:
    weight = torch.eye(3)
    for i in range(N):
        weight.requires_grad_(i > 30)
        y = x * weight
        x = y.detach()
    return x


def met_later(x: Tensor) -> Tensor:
    kept = []
    for i in range(N):
        y = x + i
        a, b = y.min(), y.max()
        kept.append(y)
        x = y / (b - a)
    head = nn.ReLU()
    return head(kept[13]) + head(kept[37])


def in_place(x: Tensor) -> Tensor:
    for i in range(N):
        y = x + 1
        y += 1
        y[0] = i
        x = y
        y = x
    return x


def nested(x: Tensor) -> Tensor:
    def again(z: Tensor) -> Tensor:
        return z * 0.5 + 1

    for _ in range(6):
        for _ in range(6):
            x = again(x)
            y = [torch.sin(x) for _ in range(2)]
    return x + y[0]


def of_other_kinds(x: Tensor) -> Any:
    a: Any = 0
    s = "s"
    for i in range(N):
        a = (i / 3, i, True, None, x, s * i, Made(x))[i % 7]
        b, c = i, a
        z = x.as_subclass(Made) + 1 if i % 5 == 4 else x + 1
        with torch.no_grad():
            y = z * 2
        torch.maximum(
            x.abs(),
            x,
        )
    return a, b, c, y


def of_sizes(x: Tensor) -> Tensor:
    for i in range(N):
        y = torch.ones(0 if i < 20 else 3)
        z = y.sum()
        w = torch.ones(70000) if i % 16 == 15 else y.to(torch.bfloat16)
    return z + w.sum() + x.sum()


def under_modes(x: Tensor) -> Tensor:
    for i in range(N):
        with torch.inference_mode(i % 2 == 0):
            y = x * 2
        with torch.device("cpu"):
            z = torch.ones(2)
        with torch.autocast("cpu", enabled=i % 3 == 0):
            w = x @ x
    return y.sum() + z.sum() + w.sum()


PROGRAMS: list[Callable[[Tensor], Any]] = [
    plain, with_keywords, with_news, with_errors, with_grad, met_later, in_place, nested,
    of_other_kinds, of_sizes, under_modes,
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"lines": Lines(normalize=True)}, {"lines": Lines(depth=2, normalize=True)},
    {"lines": Lines(normalize=True), "level": "op"},
]  # fmt: skip


def in_python(patch: pytest.MonkeyPatch) -> None:
    """Leave the compiled way."""
    patch.setattr(compiled, "turns", None)
    patch.setattr(function_mode, "_call", None)


def timeless(found: Record) -> Any:
    """A record without what is another in each run."""
    if isinstance(found, (Line, Call)):
        return structs.replace(found, host_ns=0)
    return None if isinstance(found, (Header, Step)) else type(found).__name__


def told(program: Callable[[Tensor], Any], options: dict[str, Any]) -> list[Any]:
    torch.manual_seed(0)
    start = torch.rand(3, 3)
    records = Recorded()
    traced = trace(out=records.append, every=1, **options)(program)
    traced(start)
    traced(start)
    assert records.actions("tracer_error") == []
    return [timeless(found) for found in records]


@needs_turns
@pytest.mark.parametrize("options", OPTIONS, ids=["ops", "lines", "depth", "level"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_log_is_the_one_that_python_writes(
    program: Callable[[Tensor], Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_log = told(program, options)
    in_python(monkeypatch)
    assert compiled_log == told(program, options)
    assert len(compiled_log) > 4


# What random loops are made of: three variables, and what may happen to them.
_LINES = (
    "x = x @ w", "y = torch.tanh(x)", "y = x + i", "x = y * 0.5", "x, y = y, x", "y = x", "i += 0",
    "y = x[:2] if i % 13 == 12 else x", "y += 1", "x = x.clone().add_(1)", "k = i", "k = k + 1",
    "k = float(i)", "k = y.sum()", "found.append(y)", "found = []", "found = 0", "del k; k = 1",
    "k = 'text'", "k = math.nan if i == 9 else 1.0", "x = x * k if isinstance(k, float) else x",
    "y = nan_at(i, y)", "x.sum().item()", "w = w.clone()", "w[0, 0] = 1", "k = None", "k = (x, y)",
    "y = torch.add(x, x, alpha=i)", "torch.add(x, x, out=y.clone())", "assert (x + 1).ndim",
)  # fmt: skip
_HEADS = (
    "for i in range({n}):", "if i % {n}:", "with torch.no_grad():", "while k_{n} < {n}:", "try:",
)  # fmt: skip


def random_program(seed: int) -> str:
    """A function that always ends and never raises out of it."""
    chance = random.Random(seed)
    text = ["def program(x):", "    y = w = torch.eye(3)", "    i = k = found = 0"]
    text += [f"    k_{n} = 0" for n in range(2, 6)]

    def block(depth: int) -> None:
        indent = "    " * depth
        for _ in range(chance.randint(1, 4)):
            if depth < 4 and chance.random() < 0.4:
                head = chance.choice(_HEADS).format(n=chance.randint(2, 5))
                text.append(indent + head)
                if head.startswith("while"):
                    name = head.split()[1]
                    text.append(f"{indent}    {name} += 1")
                block(depth + 1)
                if head == "try:":
                    text.append(f"{indent}except Exception: k = i")
                continue
            text.append(indent + chance.choice(_LINES))

    text += ["    for i in range(24):", "        try:"]
    block(3)
    text += ["        except Exception: found = []", "    return x"]
    return "\n".join(text) + "\n"


def nan_at(i: int, value: Tensor) -> Tensor:
    return value * math.nan if i == 11 else value


@needs_turns
@pytest.mark.parametrize("seed", range(25))
def test_of_random_loops_too(seed: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.py"
    path.write_text(random_program(seed))
    space: dict[str, Any] = {"torch": torch, "math": math, "nan_at": nan_at}
    exec(compile(path.read_text(), str(path), "exec"), space)
    compiled_log = told(space["program"], {"lines": Lines(normalize=True)})
    in_python(monkeypatch)
    assert compiled_log == told(space["program"], {"lines": Lines(normalize=True)})


def plain_turns(turns: int) -> Tensor:
    x = torch.eye(3)
    for _ in range(turns):
        y = x @ x
        x = torch.tanh(y)
    return x


@needs_turns
@pytest.mark.skipif(frames._IS_COMPILED, reason="Dynamo of torch 2.6: lines are Python's")
def test_python_is_asked_of_few_turns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("event", "look_back", "look_back_at", "_catch_up"):
        count(FrameTrace, name)
    for name in ("takes", "repeats"):
        count(places.Place, name)
    count(thinning.Thinning, "begin")
    counts = []
    for number in (64, 960):
        asked.clear()
        trace(out=lambda record: None, every=1, lines=True)(plain_turns)(number)
        counts.append(len(asked))
    # Three more powers of two in three lines and two ops, and what belongs to each.
    assert counts[0] < counts[1] < counts[0] + 80


def raising(x: Tensor, error: BaseException) -> None:
    class Raises(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            raise error

    other = torch.ones(2).as_subclass(Raises)
    for i in range(N):
        x * (other if i == 27 else x)


@needs_turns
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("lines", [False, True])
def test_what_an_op_raises_goes_on_as_it_is(kind: type[BaseException], lines: bool) -> None:
    error = kind("mine")
    records = Recorded()
    with pytest.raises(kind) as found:
        trace(out=records.append, every=1, lines=lines)(raising)(torch.ones(2), error)
    assert found.value is error
    assert error.__cause__ is None
    assert error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].line == "raise error"
    assert records.actions("tracer_error") == []
    # What is no Exception is an op that did not end.
    raised = [call.exception for call in records.ops(op="mul") if call.exception]
    assert raised == (["ValueError"] if kind is ValueError else [])


@needs_turns
def test_nothing_of_a_loop_stays_alive() -> None:
    seen: list[Any] = []

    def program(turns: int) -> None:
        x = torch.eye(3)
        for _ in range(turns):
            y = x @ x
            x = torch.tanh(y)
            seen.append(weakref.ref(x))
            seen.append(weakref.ref(y))

    traced = trace(out=lambda record: None, every=1, lines=True)(program)
    traced(100)
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []
    before = {kind: _count(kind) for kind in (FrameTrace, places.Place, tuple, weakref.ref)}
    for _ in range(20):
        seen.clear()
        traced(100)
    seen.clear()
    gc.collect()
    after = {kind: _count(kind) for kind in before}
    assert all(after[kind] < before[kind] + 50 for kind in before)


def _count(kind: type) -> int:
    return sum(type(one) is kind for one in gc.get_objects())


@needs_turns
def test_what_it_names_keeps_its_reference_counts() -> None:
    # Not None from Python 3.12 on: there it is immortal, which an extension for 3.10 cannot know.
    mine: list[Any] = [torch.Tensor, torch.nn.Parameter, *[None] * (sys.version_info < (3, 12))]
    traced = trace(out=lambda record: None, every=1, lines=True)(plain_turns)
    traced(200)
    gc.collect()
    before = [sys.getrefcount(one) for one in mine]
    for _ in range(5):
        traced(200)
    gc.collect()
    for one, count in zip(mine, before, strict=True):
        assert abs(sys.getrefcount(one) - count) < 100


@needs_turns
@pytest.mark.parametrize(
    "arguments", [(), (1,), (len, [], None, None), (len, (), 3, None), (1, 2, 3, 4)]
)
@pytest.mark.parametrize("name", ["call", "follow"])
def test_wrong_arguments_are_refused(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        getattr(turns, name)(*arguments)


@needs_turns
def test_it_wants_to_be_told_of_everything() -> None:
    with pytest.raises(TypeError, match="not told of slot"):
        turns.prepare({})
    with pytest.raises(TypeError):
        turns.prepare(None)


@needs_turns
@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        (FrameTrace, frames._HOT),
        (places.Place, places._HOT),
        (deferred.Deferred, deferred._HOT),
        (thinning.Thinning, thinning._OF_THINNING),
        (thinning.Passed, thinning._OF_PASSED),
    ],
)
def test_a_struct_has_the_attributes_that_a_class_of_python_has(
    kind: Any, slots: tuple[str, ...]
) -> None:
    (base,) = kind.__bases__
    members = [name for name, one in vars(base).items() if inspect.ismemberdescriptor(one)]
    assert sorted(members) == sorted(slots)
    assert not set(members) & set(kind.__slots__)
