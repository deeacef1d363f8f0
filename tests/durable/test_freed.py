"""What the program lets go of dies at the same moment as without tracing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrace import trace
from tests.durable import X, make_model


class Note:
    """Something that can be watched dying."""


class Square(torch.autograd.Function):
    """Leaves a note on its context, which dies with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: list[Any]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = Note()
        notes.append(weakref.ref(ctx.note))
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad, None


class Keeps(nn.Module):
    """Watches its activation by weak reference and through the graph by a note."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.refs: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        self.refs.append(weakref.ref(hidden))
        return Square.apply(hidden, self.refs)


Alive = list[list[bool]]


def look(refs: list[Any], alive: Alive) -> None:
    alive.append([ref() is not None for ref in refs])


def after_backward(alive: Alive) -> None:
    net = Keeps()
    loss = net(X).sum()
    look(net.refs, alive)
    loss.backward()
    look(net.refs, alive)
    del loss
    look(net.refs, alive)


def without_backward(alive: Alive) -> None:
    net = Keeps()
    out = net(X)
    look(net.refs, alive)
    del out
    look(net.refs, alive)


def graph_kept(alive: Alive) -> None:
    net = Keeps()
    loss = net(X).sum()
    loss.backward(retain_graph=True)
    look(net.refs, alive)
    loss.backward()
    look(net.refs, alive)
    del loss
    look(net.refs, alive)


def two_steps(alive: Alive) -> None:
    net = Keeps()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        net(X).sum().backward()
        look(net.refs, alive)
        optimizer.step()
        look(net.refs, alive)


def no_grad(alive: Alive) -> None:
    net = Keeps()
    with torch.no_grad():
        out = net(X)
    look(net.refs, alive)
    del out
    look(net.refs, alive)


def module_and_parameters(alive: Alive) -> None:
    net = make_model()
    net(X).sum().backward()
    refs = [weakref.ref(m) for m in net.modules()]
    del net
    look(refs, alive)


def gradients(alive: Alive) -> None:
    net = make_model()
    net(X).sum().backward()
    refs = [weakref.ref(p.grad) for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    look(refs, alive)


def optimizer(alive: Alive) -> None:
    net = make_model()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(X).sum().backward()
    sgd.step()
    refs = [weakref.ref(sgd)]
    del sgd
    gc.collect()  # torch itself keeps an optimizer in a cycle
    look(refs, alive)


def failed_forward(alive: Alive) -> None:
    net = Keeps()
    with suppress(RuntimeError):
        nn.Sequential(net, nn.Linear(3, 3))(X)
    look(net.refs, alive)


def failed_backward(alive: Alive) -> None:
    net = Keeps()
    out = net(X)
    with suppress(RuntimeError):
        out.backward()  # no scalar
    look(net.refs, alive)
    del out
    look(net.refs, alive)


PROGRAMS: list[Callable[[Alive], None]] = [
    after_backward, without_backward, graph_kept, two_steps, no_grad, module_and_parameters,
    gradients, optimizer, failed_forward, failed_backward,
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Only reference counts free here, so that a cycle made by tracing shows."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_everything_dies_when_it_dies_untraced(program: Callable[..., None], level: Any) -> None:
    plain: Alive = []
    traced: Alive = []
    program(plain)
    # Without narrowing: what that keeps until the gate is tested below.
    with trace(out=lambda record: None, every=1, level=level, narrow=False):
        program(traced)
    assert traced == plain
    assert plain


def test_what_narrowing_keeps_is_gone_when_the_step_is_over() -> None:
    net = Keeps()
    with trace(out=lambda record: None) as t:
        for _ in range(3):
            net(X).sum().backward()
            t.step()
            assert not any(ref() is not None for ref in net.refs)


def test_no_activation_outlives_its_step() -> None:
    net = make_model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    made: list[weakref.ref[Tensor]] = []
    net[0].register_forward_hook(lambda m, args, out: made.append(weakref.ref(out)))
    with trace(out=lambda record: None, every=1) as t:
        for _ in range(4):
            optimizer.zero_grad()
            net(X).sum().backward()
            optimizer.step()
            t.step()
            assert [ref() for ref in made] == [None] * len(made)
    assert len(made) == 4


def test_a_trace_that_is_over_keeps_no_model() -> None:
    net = make_model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with trace(out=lambda record: None, model=net) as t:
        net(X).sum().backward()
        optimizer.step()
    refs = [weakref.ref(net), weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert t.ok
