"""What a log says about gradients that outlive their step."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace.capture.active import slot
from tensortrace.capture.loop import carried
from tensortrace.capture.loop.optimizers import Optimizers
from tensortrace.capture.tracer import Trace
from tests.capture import Recorded, record

STEPS = 5


def train(clear: Any, *, hold: Any = nn.Module.parameters, clip: Any = None) -> Recorded:
    """Train a body and a head; `hold` picks what the optimizer gets."""

    def program(t: Trace) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(hold(net), lr=0.1, momentum=0.9)
        for _ in range(STEPS):
            net(torch.ones(3, 4)).square().mean().backward()
            if clip is not None:
                clip(net)
            optimizer.step()
            clear(net, optimizer)

    return record(program)


def fates(records: Recorded) -> list[Any]:
    return [a.detail.get("gradients") for a in records.actions("loss")]


def by_hand(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in net.parameters():
        p.grad = None


def in_place(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in net.parameters():
        p.grad.zero_()


@pytest.mark.parametrize(
    "clear",
    [lambda net, o: o.zero_grad(), lambda net, o: net.zero_grad(), by_hand],
    ids=["optimizer", "module", "by hand"],
)
def test_gradients_that_are_gone_at_the_next_backward_are_not_mentioned(clear: Any) -> None:
    assert fates(train(clear)) == [None] * STEPS


@pytest.mark.parametrize(
    "clear",
    [lambda net, o: o.zero_grad(set_to_none=False), in_place],
    ids=["optimizer", "by hand"],
)
def test_gradients_that_were_written_since_the_step_are_changed(clear: Any) -> None:
    assert fates(train(clear)) == [None] + [{"0": "changed"}] * (STEPS - 1)


def test_gradients_that_nobody_touched_since_the_step_are_kept() -> None:
    assert fates(train(lambda net, o: None)) == [None] + [{"0": "kept"}] * (STEPS - 1)


def head(net: nn.Module) -> Any:
    return net[2].parameters()


def left(records: Recorded) -> list[Any]:
    keys = ("left", "left_names", "grown")
    return [tuple(a.detail.get(k) for k in keys) for a in records.actions("zero_grad")]


def test_gradients_outside_the_optimizer_are_counted_as_they_grow() -> None:
    records = train(lambda net, o: o.zero_grad(), hold=head)
    assert left(records) == [(2, ["0.weight", "0.bias"], n) for n in range(STEPS)]


def test_nothing_is_left_where_the_optimizer_holds_all_or_the_model_clears() -> None:
    assert left(train(lambda net, o: o.zero_grad())) == [(None, None, None)] * STEPS

    def clear(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net.zero_grad()
        optimizer.zero_grad()

    seen = left(train(clear, hold=head))
    assert seen[1::2] == [(None, None, None)] * STEPS


def test_gradients_outside_that_are_made_anew_do_not_grow() -> None:
    def clear(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        by_hand(net, optimizer)

    assert [n for _, _, n in left(train(clear, hold=head))] == [0] * STEPS


def lone_scale(backward: Any, make: Any = nn.Parameter) -> list[Any]:
    """What losses say of a scale that no module and no optimizer holds."""

    def program(t: Trace) -> None:
        net, scale = nn.Linear(4, 2), make(torch.full((2,), 0.5))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for i in range(STEPS):
            optimizer.zero_grad()
            backward((net(torch.ones(3, 4)) * scale).square().mean(), net, i)
            optimizer.step()

    keys = ("left", "left_shape", "left_updates")
    return [tuple(a.detail.get(k) for k in keys) for a in record(program).actions("loss")]


def test_a_loss_says_how_long_the_gradient_of_a_lone_parameter_has_grown() -> None:
    nothing = (None, None, None)
    grown = [(1, [2], n) for n in range(1, STEPS - 1)]
    assert lone_scale(lambda loss, net, i: loss.backward()) == [nothing, nothing, *grown]
    plain = lone_scale(lambda loss, net, i: loss.backward(), lambda x: x.requires_grad_())
    assert plain == [nothing] * STEPS


def test_a_lone_parameter_that_backward_was_not_asked_for_has_not_grown() -> None:
    def once(loss: torch.Tensor, net: nn.Module, i: int) -> None:
        loss.backward(inputs=list(net.parameters()) if i else None)

    assert lone_scale(once) == [(None, None, None)] * STEPS


@pytest.mark.parametrize(
    "clip",
    [
        lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1.0),
        lambda net: nn.utils.clip_grad_value_(net.parameters(), 1.0),
    ],
    ids=["norm", "value"],
)
def test_clipping_names_the_optimizer_that_holds_what_is_clipped(clip: Any) -> None:
    records = train(lambda net, o: o.zero_grad(), hold=head, clip=clip)
    # It is met at its first step, which comes after the first clip.
    assert [a.optimizer for a in records.actions("clip")] == [None, 0, 0, 0, 0]


def test_clipping_counts_what_is_outside_once_that_grows() -> None:
    records = train(lambda net, o: o.zero_grad(), hold=head,
                    clip=lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1.0))  # fmt: skip
    assert [a.detail.get("outside") for a in records.actions("clip")] == [None, None, 2, 2, 2]


def test_a_generator_of_parameters_is_not_used_up() -> None:
    def program(t: Trace) -> None:
        net = nn.Linear(4, 2)
        net(torch.ones(3, 4)).sum().backward()
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
        nn.utils.clip_grads_with_norm_((p for p in net.parameters()), 0.5, norm)
        total = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        assert total.item() == pytest.approx(0.5, rel=1e-4)

    (clip,) = record(program).actions("clip")
    assert clip.optimizer is None


def test_unscaling_names_its_optimizer() -> None:
    def program(t: Trace) -> None:
        net = nn.Linear(4, 2)
        first = torch.optim.SGD(net.parameters(), lr=0.1)
        second = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        for optimizer in (first, second):
            scaler.scale(net(torch.ones(3, 4)).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    assert [a.optimizer for a in record(program).actions("unscale")] == [0, 1]


def test_a_gradient_that_is_another_tensor_with_the_identity_of_the_old_one_was_added_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With create_graph the sum is a new tensor: Python may give it the address of the old one, and
    # its version is as low.
    monkeypatch.setattr(carried, "id", lambda thing: 7, raising=False)
    optimizers = Optimizers()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    index = optimizers.index_of(optimizer)
    followed = carried.Carried(optimizers)
    for other, added in ((False, False), (True, True)):
        weight.grad = torch.ones(2)
        followed.stepped(index, optimizer)
        followed.since_step()
        kept = weight.grad
        if other:
            weight.grad = kept + 1
        followed.backward_ended()
        assert followed.added_to(index) is added


class Watched:
    """A parameter that notes which threads ask for its gradient."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    @property
    def grad(self) -> torch.Tensor:
        self.asked.add(threading.current_thread().name)
        return torch.ones(2)


def test_gradients_of_what_another_thread_trains_are_not_asked_for() -> None:
    optimizers = Optimizers()
    followed = carried.Carried(optimizers)
    ours, theirs = ([nn.Parameter(torch.ones(2))] for _ in range(2))
    both = [torch.optim.SGD(held) for held in (ours, theirs)]
    mine, other = map(optimizers.index_of, both)
    watched = Watched()
    both[1].param_groups[0]["params"] = [watched]
    ours[0].grad = torch.ones(2)
    begun, ended = threading.Event(), threading.Event()

    def train() -> None:
        followed.stepped(other, both[1])
        begun.set()
        ended.wait()

    slot.training.clear()
    thread = threading.Thread(target=train, name="theirs")
    thread.start()
    begun.wait()
    followed.stepped(mine, both[0])
    followed.since_step()
    followed.backward_ended()
    assert followed.owner([torch.ones(2)]) is None
    assert watched.asked == {"theirs"}
    ended.set()
    thread.join()
    # It has ended, and nobody writes there any more.
    assert followed.since_step()[str(mine)] == "kept"
    assert "MainThread" in watched.asked
    slot.training.clear()


_TWO_LEARNERS = """
import threading
import torch
from torch import nn
from tensortrace import trace
torch.set_num_threads(1)

def learn(steps):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        model(torch.randn(4, 8)).square().mean().backward()
        sgd.step()
        sgd.zero_grad()

for _ in range(3):
    with trace(out=lambda record: None, checks=["TT401"]) as t:
        threads = [threading.Thread(target=learn, args=(200,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        learn(200)
        for thread in threads:
            thread.join()
    assert all(t._recorder.on.values()), t._recorder.on
    assert not t.findings, t.findings
"""


def test_two_threads_may_train_beside_the_loop() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _TWO_LEARNERS], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "stopped" not in run.stderr
