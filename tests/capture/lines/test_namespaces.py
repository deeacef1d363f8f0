"""Functions that keep the dict of their variables, or share variables, run as without lines."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tensortrace import Lines, trace
from tensortrace.capture.lines.namespaces import asks_for_locals
from tests.capture.lines.lines_of import Seen, lines_of

pytestmark = pytest.mark.usefixtures("closing_folder")


def keeps(rate: float = 0.1, eps: float = 1e-8) -> list[str]:
    options = locals()
    name = "run 1"
    assert name
    return sorted(options)


def executes() -> Any:
    space = locals()
    exec("y = 1", globals(), space)
    x = 2
    return space["y"], x


def asks_without_argument() -> list[str]:
    kept = vars()
    x = 2
    assert x
    return sorted(kept)


class Keeps:
    def __init__(self, width: int) -> None:
        self.options = locals()
        doubled = width * 2
        self.width = doubled


def in_a_class() -> list[str]:
    return sorted(Keeps(3).options)


def generates() -> list[list[str]]:
    def numbers() -> Any:
        first = locals()
        yield first
        second = 2
        yield first
        assert second

    return [sorted(each) for each in numbers()]


any_tracer = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python fills the dict anew for any trace function"
)


@any_tracer
@pytest.mark.parametrize(
    "function", [keeps, executes, asks_without_argument, in_a_class, generates]
)
@pytest.mark.parametrize("thin", [True, False])
def test_a_dict_of_locals_is_what_it_is_without(function: Callable[[], Any], thin: bool) -> None:
    seen, given = Seen(), []

    def run() -> None:
        given.append(function())

    options = Lines(depth=9, thin=thin)
    for _ in range(2):
        trace(out=seen.take, every=1, lines=options)(run)()
    expected = function()
    assert given == [expected, expected]
    assert seen.faults == []


@any_tracer
def test_a_dict_that_was_kept_before_a_block_stays_full() -> None:
    def run(trace_them: bool) -> list[int]:
        kept, sizes = locals(), []
        net = torch.nn.Linear(2, 1)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        with trace(out=lambda record: None, lines=trace_them):
            for _ in range(23):  # also past the steps that are followed
                sgd.zero_grad()
                net(torch.ones(1, 2)).sum().backward()
                sgd.step()
                sizes.append(len(kept))
        return [*sizes, len(kept)]

    assert run(True) == run(False)


def test_lines_of_such_a_function_are_there_without_variables() -> None:
    seen = lines_of(keeps)
    assert seen.whats() == ["call", "line", "line", "line", "line", "return"]
    hidden = sys.version_info < (3, 13)
    assert seen.changes("name") == ([] if hidden else ["'run 1'"])


def test_other_uses_of_the_words_hide_nothing() -> None:
    def function() -> Any:
        torch.nn.Linear(1, 1).eval()
        given = vars(Keeps)
        return len(given) > 0

    seen = lines_of(function)
    assert len(seen.changes("given")) == 1
    assert not asks_for_locals(function.__code__)


def test_what_another_thread_sets_in_a_closure_is_kept() -> None:
    def function() -> tuple[int, int]:
        count = turns = 0

        def work() -> None:
            nonlocal count
            for _ in range(60_000):
                count += 1

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            turns += 1
        thread.join()
        return count, turns

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thin in (True, False):
            count, _ = trace(out=lambda record: None, lines=Lines(thin=thin))(function)()
            assert count == 60_000
    finally:
        sys.setswitchinterval(before)


class Draws:
    """Shows a sample of itself."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.draw = draw

    def __repr__(self) -> str:
        return f"Draws({self.draw()})"


def numpy_draw() -> Any:
    numpy = pytest.importorskip("numpy")
    return numpy.random.rand()


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, numpy_draw])
def test_a_repr_that_draws_is_asked_once_and_changes_nothing(draw: Callable[[], Any]) -> None:
    draw()

    def function() -> list[float]:
        data = Draws(draw)
        values = [float(draw()) for _ in range(3)]
        assert data
        return values

    def run(traced: Callable[[], list[float]]) -> list[float]:
        torch.manual_seed(0)
        random.seed(0)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(0)
        return traced()

    seen = Seen()
    traced = trace(out=seen.take, every=1, lines=True)(function)
    assert run(traced) == run(function)
    assert run(traced) == run(function)
    assert set(seen.changes("data")) == {"<Draws>"}


class Exits:
    def __repr__(self) -> str:
        raise SystemExit("cannot connect")


def test_a_repr_that_exits_ends_nothing() -> None:
    def function() -> int:
        lazy = Exits()
        assert lazy
        return 5

    assert trace(out=lambda record: None, lines=True)(function)() == 5
    assert lines_of(function).changes("lazy") == ["<Exits whose repr raised SystemExit>"]


class Answers(type):
    """A metaclass with an answer to everything."""

    def __getattr__(cls, name: str) -> int:
        return 7


class Answered(metaclass=Answers):
    pass


def test_a_metaclass_is_asked_for_nothing() -> None:
    def function() -> None:
        things = [Answered(), 3]
        assert things

    (text,) = lines_of(function, lines=Lines(normalize=True)).changes("things")
    assert "cannot be read" not in text


def test_dynamo_compiles_nothing_of_ours() -> None:
    from torch._dynamo.utils import counters

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2

    def function() -> list[float]:
        compiled = torch.compile(doubled, backend="eager")
        return [compiled(torch.ones(())).item() for _ in range(2)]

    def frames(traced: Callable[[], list[float]]) -> tuple[list[float], dict[str, int]]:
        torch._dynamo.reset()
        counters.clear()
        return traced(), dict(counters["frames"])

    deep = trace(out=lambda record: None, lines=Lines(depth=9))(function)
    assert frames(deep) == frames(function)
