"""Steps and updates: where a turn of the loop ends, for every shape that a loop has."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tensortrace import trace
from tensortrace.records import Action, Call, End, Header, Module, Optimizer, Source, Step
from tests.capture import Net, Recorded, record


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.rand(2 * batches, 4)), batch_size=2)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()


def root_calls(records: Recorded) -> list[tuple[int, int]]:
    """(step, update) of every forward call of the root."""
    return [(call.step, call.update) for call in records.modules(module="")]


def assert_ordered(records: Recorded) -> None:
    """Steps never decrease; within what one gate wrote, seq grows."""
    assert [r.step for r in records] == sorted(r.step for r in records)
    numbered = [r for r in records if not isinstance(r, (Header, Source, End, Module))]
    for before, after in itertools.pairwise(numbered):
        gate = isinstance(before, Optimizer) or (
            isinstance(before, Action) and before.action == "gate"
        )
        if before.step == after.step and not gate:
            assert before.seq < after.seq
    seen = Counter((r.step, r.seq) for r in numbered)
    assert max(seen.values()) == 1


def test_each_optimizer_step_without_a_loader_is_a_step() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(3):
            train(model, optimizer, torch.rand(2, 4))

    records = record(program)
    assert [step.step for step in records.steps()] == [0, 1, 2]
    assert root_calls(records) == [(0, 0), (1, 1), (2, 2)]
    assert [o.update for o in records.of(Optimizer)] == [0, 1, 2]
    assert records.of(End)[0].steps == 3
    assert records.of(End)[0].updates == 3
    assert_ordered(records)


def test_each_batch_of_a_loader_is_a_step() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for (x,) in loader(3):
            train(model, optimizer, x)

    records = record(program)
    assert root_calls(records) == [(0, 0), (1, 1), (2, 2)]
    assert [a.step for a in records.actions("fetch")] == [0, 1, 2]
    assert len(records.steps()) == 3


def test_two_optimizers_over_one_fetched_batch_are_one_step() -> None:
    generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = sgd(generator), sgd(discriminator)

    def program(t: Any) -> None:
        for (x,) in loader(2):
            train(discriminator, optimizers[1], x)
            optimizers[0].zero_grad()
            discriminator(generator(x)).sum().backward()
            optimizers[0].step()

    records = record(program)
    assert len(records.steps()) == 2
    assert [(o.step, o.update, o.index) for o in records.of(Optimizer)] == [
        (0, 0, 0), (0, 1, 1), (1, 2, 0), (1, 3, 1),
    ]  # fmt: skip
    assert [step.update for step in records.steps()] == [2, 4]
    assert_ordered(records)


def test_two_optimizers_without_a_loader_are_one_step_a_turn_and_one_each_without_a_loop() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizers = sgd(a), sgd(b)

    def turns(t: Any) -> None:
        for _ in range(2):
            train(a, optimizers[0], torch.rand(2, 4))
            train(b, optimizers[1], torch.rand(2, 4))

    def lines(t: Any) -> None:
        train(a, optimizers[0], torch.rand(2, 4))
        train(b, optimizers[1], torch.rand(2, 4))

    steps = [(o.step, o.index) for o in record(turns).of(Optimizer)]
    assert steps == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(o.step, o.index) for o in record(lines).of(Optimizer)] == [(0, 0), (1, 1)]


def test_a_turn_of_two_models_without_a_loader_is_one_step() -> None:
    generator, judge = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = sgd(generator), sgd(judge)

    def program(t: Any) -> None:
        for turn in range(5):
            for p in optimizers:
                p.zero_grad()
            fake = generator(torch.rand(2, 4))
            (judge(torch.rand(2, 4)) - judge(fake.detach())).mean().backward()
            optimizers[1].step()
            if turn % 2:
                judge(generator(torch.rand(2, 4))).mean().backward()
                optimizers[0].step()

    assert [step.update for step in record(program).steps()] == [1, 3, 4, 6, 7]


def test_what_a_loop_does_in_the_end_of_its_turn_belongs_to_that() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for turn in range(6):
            train(model, optimizer, torch.rand(2, 4))
            if turn % 3 == 2:
                with torch.no_grad():
                    model(torch.rand(2, 4))
        with torch.no_grad():
            for _ in range(3):
                model(torch.rand(2, 4))

    assert [step.update for step in record(program).steps()] == [1, 2, 3, 4, 5, 6, 6, 6, 6]


def test_turns_that_take_one_branch_or_another_are_steps_of_their_own() -> None:
    models = [nn.Linear(4, 4) for _ in range(3)]
    optimizers = [sgd(model) for model in models]

    def run(i: int) -> None:
        train(models[i], optimizers[i], torch.rand(2, 4))

    def program(t: Any) -> None:
        for turn in range(6):
            if turn % 3 == 0:
                run(0)
            elif turn % 3 == 1:
                run(1)
                continue
            else:
                run(2)
            run(0)

    assert [step.update for step in record(program).steps()] == [2, 3, 5, 7, 8, 10]


def test_a_turn_in_which_an_exception_is_handled_is_one_step() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for turn in range(6):
            try:
                train(model, optimizer, torch.rand(2, 4))
                if turn % 2:
                    raise KeyError
            except KeyError:
                train(model, optimizer, torch.rand(2, 4))

    assert [step.update for step in record(program).steps()] == [1, 3, 4, 6, 7, 9]


def test_a_call_without_grad_belongs_to_the_turn_that_trains_on_it() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(3):
            with torch.no_grad():
                guess = model(torch.rand(2, 4))
            train(model, optimizer, torch.rand(2, 4) + guess.mean())

    assert [step.update for step in record(program).steps()] == [1, 2, 3]


def test_a_call_before_a_loop_without_modules_does_not_make_that_one_step() -> None:
    def program(t: Any) -> None:
        features = nn.Linear(4, 3)(torch.rand(8, 4)).detach()
        weight = torch.zeros(3, 1, requires_grad=True)
        optimizer = torch.optim.SGD([weight], 0.1)
        for _ in range(6):
            optimizer.zero_grad()
            (features @ weight).square().mean().backward()
            optimizer.step()

    # That there are no modules is known when the optimizer steps again without one.
    assert [step.update for step in record(program).steps()][:5] == [2, 3, 4, 5, 6]


def test_two_optimizers_stepping_after_one_backward_share_a_step() -> None:
    model = Net()
    optimizers = sgd(model.net), sgd(model.head)

    def program(t: Any) -> None:
        for _ in range(2):
            model(torch.rand(2, 4)).sum().backward()
            optimizers[0].step()
            optimizers[1].step()

    records = record(program)
    assert [(o.step, o.index) for o in records.of(Optimizer)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [step.lr for step in records.steps()] == [[0.1, 0.1], [0.1, 0.1]]


@pytest.mark.parametrize("with_loader", [True, False])
def test_each_micro_batch_is_a_step_and_updates_count_optimizer_steps(with_loader: bool) -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        batches = loader(4) if with_loader else [(torch.rand(2, 4),) for _ in range(4)]
        for i, (x,) in enumerate(batches):
            model(x).sum().backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()

    records = record(program)
    assert root_calls(records) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [o.step for o in records.of(Optimizer)] == [1, 3]


def one_ahead(batches: Any) -> Iterator[Any]:
    """Hand out a batch when the next one is there, as the loaders of accelerate do."""
    batches = iter(batches)
    batch = next(batches)
    for following in batches:
        yield batch
        batch = following
    yield batch


def test_the_last_batch_of_a_loader_that_fetches_ahead_is_a_step_of_its_own() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(3):
            for (x,) in one_ahead(loader(3)):
                train(model, optimizer, x)

    assert [step for step, _ in root_calls(record(program))] == list(range(9))


def test_a_loader_that_is_begun_anew_in_a_turn_ends_none() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        short = iter(loader(2))
        for (x,) in loader(6):
            try:
                (other,) = next(short)
            except StopIteration:
                short = iter(loader(2))
                (other,) = next(short)
            optimizer.zero_grad()
            (model(x) + model(other)).sum().backward()
            optimizer.step()

    assert [step for step, _ in root_calls(record(program))] == sorted([*range(6), *range(6)])


def test_a_loader_that_was_only_looked_through_ends_no_turn_after_it() -> None:
    first, second = Net(), Net()

    def program(t: Any) -> None:
        for (x,) in loader(2):
            float(x.mean())
        for (x,) in loader(2):
            float(x.std())
        x = torch.rand(2, 4)
        (first(x) + second(x)).sum().backward()

    outermost = record(program).of(Call, parent=None, op=None, phase="forward")
    assert len(outermost) == 2 and len({call.step for call in outermost}) == 1


def test_what_is_called_after_the_last_batch_is_another_step() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            for (x,) in loader(2):
                train(model, optimizer, x)
            with torch.no_grad():
                model(torch.rand(2, 4))

    records = record(program)
    assert [step for step, _ in root_calls(records)] == [0, 1, 2, 3, 4, 5]
    assert [step.step for step in records.steps()] == [0, 1, 2, 3, 4, 5]


def test_t_step_alone_ends_a_step_once_it_was_used() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            for (x,) in loader(2):
                train(model, optimizer, x)
            t.step()

    # The first turn is cut by its loader, before anything says that the user counts himself.
    assert [step for step, _ in root_calls(record(program))] == [0, 1, 2, 2]


def test_each_call_of_a_decorated_function_is_a_step() -> None:
    model, records = Net(), Recorded()
    optimizer = sgd(model)
    t = trace(out=records.append, every=1)

    @t
    def train_step(x: torch.Tensor) -> int:
        train(model, optimizer, x)
        train(model, optimizer, x)
        return 7

    assert [train_step(torch.rand(2, 4)) for _ in range(3)] == [7, 7, 7]
    t.close()
    assert [step for step, _ in root_calls(records)] == [0, 0, 1, 1, 2, 2]
    assert [update for _, update in root_calls(records)] == [0, 1, 2, 3, 4, 5]
    assert_ordered(records)


def test_each_item_of_a_decorated_generator_is_a_step() -> None:
    model, records = Net(), Recorded()
    t = trace(out=records.append, every=1)

    @t
    def outputs() -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield model(torch.rand(2, 4))

    for _ in outputs():
        model(torch.rand(2, 4))  # outside: the generator is suspended
    t.close()
    assert [step for step, _ in root_calls(records)] == [0, 1, 2]


def test_each_call_of_a_decorated_async_function_is_a_step() -> None:
    model, records = Net(), Recorded()
    t = trace(out=records.append, every=1)

    @t
    async def infer() -> None:
        model(torch.rand(2, 4))
        await asyncio.sleep(0)
        model(torch.rand(2, 4))

    async def main() -> None:
        await infer()
        await infer()

    asyncio.run(main())
    t.close()
    assert [step for step, _ in root_calls(records)] == [0, 0, 1, 1]


@pytest.mark.parametrize("grad", [False, True])
def test_a_loop_that_awaits_its_turns_has_a_step_for_each(grad: bool) -> None:
    model = Net()
    optimizer = sgd(model)

    async def turn() -> None:
        await asyncio.sleep(0)
        with torch.set_grad_enabled(grad):
            if grad:
                train(model, optimizer, torch.rand(2, 4))
            else:
                model(torch.rand(2, 4))

    async def serve() -> None:
        for _ in range(4):
            await turn()

    records = record(lambda t: asyncio.run(serve()))
    assert [step for step, _ in root_calls(records)] == [0, 1, 2, 3]


def test_a_loop_that_yields_from_its_turns_has_a_step_for_each() -> None:
    model = Net()

    def tokens() -> Iterator[torch.Tensor]:
        with torch.no_grad():
            made = model(torch.rand(2, 4))
        yield made

    def stream() -> Iterator[torch.Tensor]:
        for _ in range(4):
            yield from tokens()

    records = record(lambda t: list(stream()))
    assert [step for step, _ in root_calls(records)] == [0, 1, 2, 3]


def test_evaluation_without_grad_turns_with_the_second_call_of_the_same_module() -> None:
    encoder, decoder = nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.no_grad()
    def program(t: Any) -> None:
        for _ in range(3):
            decoder(encoder(torch.rand(2, 4)))

    records = record(program)
    assert [(c.step, c.module) for c in records.modules()] == [
        (0, ""), (0, "Linear"), (1, ""), (1, "Linear"), (2, ""), (2, "Linear"),
    ]  # fmt: skip
    assert records.of(End)[0].updates == 0


def test_validation_inside_the_block_has_a_step_for_each_batch() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            model.train()
            for (x,) in loader(2):
                train(model, optimizer, x)
            model.eval()
            with torch.no_grad():
                for (x,) in loader(2):
                    model(x)

    records = record(program)
    assert [step for step, _ in root_calls(records)] == list(range(8))
    roots = records.modules(module="")
    assert [c.training for c in roots] == [True, True, False, False] * 2
    assert [c.grad_enabled for c in roots] == [True, True, False, False] * 2
    assert [c.update for c in roots] == [0, 1, 2, 2, 2, 3, 4, 4]


def test_training_that_goes_on_after_a_validation_without_a_loader_is_another_step() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            for _ in range(2):
                train(model, optimizer, torch.rand(2, 4))
            with torch.no_grad():
                for _ in range(2):
                    model(torch.rand(2, 4))

    records = record(program)
    assert [step for step, _ in root_calls(records)] == list(range(8))


def test_a_state_looked_up_without_grad_is_of_the_turn_that_unrolls_from_it() -> None:
    encoder, cell = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = sgd(cell)

    def program(t: Any) -> None:
        for _ in range(3):
            with torch.no_grad():
                h = encoder(torch.rand(2, 4))
            for _ in range(4):
                h = cell(h)
            optimizer.zero_grad()
            h.sum().backward()
            optimizer.step()

    calls = record(program).modules()
    assert [call.step for call in calls] == [0] * 5 + [1] * 5 + [2] * 5


def test_backward_without_an_optimizer_turns_the_step() -> None:
    model = Net()

    def program(t: Any) -> None:
        for _ in range(3):
            model(torch.rand(2, 4)).sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None

    records = record(program)
    assert root_calls(records) == [(0, 0), (1, 0), (2, 0)]
    assert [a.step for a in records.actions("gate")] == [0, 1]


def test_autograd_grad_turns_the_step_unless_its_graph_goes_on() -> None:
    model = Net()
    parameters = list(model.parameters())

    def program(t: Any) -> None:
        for _ in range(3):
            x = torch.rand(2, 4, requires_grad=True)
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            loss = model(x).sum() + slope.square().sum()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for p, grad in zip(parameters, grads, strict=True):
                    p.sub_(0 if grad is None else 0.1 * grad)

    assert [step for step, _ in root_calls(record(program))] == [0, 0, 1, 1, 2, 2]


def penalised(model: nn.Module) -> Callable[..., torch.Tensor]:
    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, parameters, (x,))
        return out.square().sum()

    return loss


def test_gradients_of_torch_func_turn_the_step() -> None:
    model = Net()
    take = torch.func.grad_and_value(penalised(model))

    def program(t: Any) -> None:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        for _ in range(4):
            grads, _ = take(parameters, torch.rand(2, 4))
            parameters = {name: p - 0.1 * grads[name] for name, p in parameters.items()}

    records = record(program)
    assert [step for step, _ in root_calls(records)] == [0, 1, 2, 3]
    (last,) = {c.seq for c in records.ops(op="autograd.grad") if c.step == 3}
    # The weights are moved by what the derivative has made, and not by data that came in.
    taken = next(c for c in records.ops(op="mul") if (c.step, c.seq) > (3, last)).tensors[0]
    made = next(c for c in records.ops(op="autograd.grad") if c.step == 3)
    assert taken.view_of in {number for _, number in made.outputs}


@pytest.mark.parametrize("inner", [1, 3])
def test_gradients_of_torch_func_with_a_graph_are_part_of_the_turn(inner: int) -> None:
    """The inner steps of meta-learning, which the outer backward goes through."""
    model = Net()
    optimizer = sgd(model, 1e-3)
    take = torch.func.grad(penalised(model))

    def program(t: Any) -> None:
        for _ in range(3):
            fast = dict(model.named_parameters())
            for _ in range(inner):
                grads = take(fast, torch.rand(2, 4))
                fast = {name: p - 0.01 * grads[name] for name, p in fast.items()}
            optimizer.zero_grad()
            torch.func.functional_call(model, fast, (torch.rand(2, 4),)).sum().backward()
            optimizer.step()

    calls = inner + 1
    assert [step for step, _ in root_calls(record(program))] == [
        *[0] * calls, *[1] * calls, *[2] * calls,
    ]  # fmt: skip


@pytest.mark.parametrize("wanted", [3, 7])
def test_autograd_grad_is_part_of_the_turn_that_an_optimizer_ends(wanted: int) -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(3):
            x = torch.rand(2, 4)
            for _ in range(wanted):
                x.requires_grad_()
                (slope,) = torch.autograd.grad(model(x).sum(), x)
                x = (x + 0.1 * slope.sign()).detach()
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

    calls = wanted + 1
    # Before its first step nobody knows of an optimizer.
    assert [step for step, _ in root_calls(record(program))] == [
        *range(calls), *[calls] * calls, *[calls + 1] * calls,
    ]  # fmt: skip


def test_autograd_grad_turns_the_step_again_where_the_optimizer_has_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tensortrace.capture.loop.optimizers._MOST_DERIVATIVES", 2)
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).sum().backward()
        optimizer.step()
        for _ in range(5):
            parameters = list(model.parameters())
            torch.autograd.grad(model(torch.rand(2, 4)).sum(), parameters, allow_unused=True)

    assert [step for step, _ in root_calls(record(program))] == [0, 1, 1, 1, 2, 3]


def test_module_calls_between_forward_and_backward_stay_in_the_step() -> None:
    model, critic = Net(), nn.Linear(2, 1)
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            out = model(torch.rand(2, 4)) + model(torch.rand(2, 4))
            critic(out).sum().backward()
            optimizer.step()

    assert [(c.step, c.nth) for c in record(program).modules(module="")] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("with_loader", [True, False])
def test_lbfgs_evaluates_many_times_in_one_step_and_each_is_gated(with_loader: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, max_eval=3)
    evaluations = 0

    def program(t: Any) -> None:
        batches = loader(2) if with_loader else [(torch.rand(2, 4),) for _ in range(2)]
        for (x,) in batches:

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                loss = (model(x) - 1).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    records = record(program)
    assert evaluations > 2
    assert [step.step for step in records.steps()] == [0, 1]
    assert [(o.step, o.update, o.cls) for o in records.of(Optimizer)] == [
        (0, 0, "LBFGS"), (1, 1, "LBFGS"),
    ]  # fmt: skip
    assert len(root_calls(records)) == evaluations
    assert len(records.actions("gate")) == len(records.actions("loss")) == evaluations
    # Each evaluation is decided before the next begins.
    for step in range(2):
        order = [
            "gate" if isinstance(r, Action) else "call"
            for r in records
            if r.step == step
            and ((isinstance(r, Action) and r.action == "gate") or r in records.modules(module=""))
        ]
        assert order == ["call", "gate"] * (len(order) // 2)
    assert_ordered(records)


def test_closure_gets_its_loss_back() -> None:
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    results: list[Any] = []

    def closure() -> torch.Tensor:
        loss: torch.Tensor = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    records = record(lambda t: results.append(optimizer.step(closure)))
    assert records.actions("loss")[0].detail["value"] == pytest.approx(results[0].item())
    assert len(records.steps()) == 1


def test_truncated_backpropagation_has_a_step_for_each_chunk() -> None:
    cell = nn.GRUCell(3, 4)
    optimizer = sgd(cell)

    def program(t: Any) -> None:
        hidden = torch.zeros(1, 4)
        for _ in range(3):
            hidden = hidden.detach()
            for _ in range(2):
                hidden = cell(torch.rand(1, 3), hidden)
            optimizer.zero_grad()
            hidden.sum().backward()
            optimizer.step()

    records = record(program)
    assert [(c.step, c.nth, c.update) for c in records.modules()] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 2), (2, 1, 2),
    ]  # fmt: skip


def test_tensor_program_without_modules_has_a_step_for_each_optimizer_step() -> None:
    w = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def program(t: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            (w - 1).square().sum().backward()
            optimizer.step()

    records = record(program)
    assert [step.step for step in records.steps()] == [0, 1, 2]
    assert [o.step for o in records.of(Optimizer)] == [0, 1, 2]
    assert_ordered(records)


@pytest.mark.parametrize("way", ["no_grad", "data", "graph"])
def test_tensor_program_that_moves_its_weights_itself_has_a_step_for_each_graph(way: str) -> None:
    losses: list[float] = []

    def program(t: Any) -> None:
        w = torch.zeros(3, requires_grad=True)
        for _ in range(4):
            loss = (w - 1).square().sum()
            losses.append(loss.item())
            if way == "graph":
                (slope,) = torch.autograd.grad(loss, w)
                w = torch.sub(w.detach(), slope, alpha=0.1).requires_grad_()
                continue
            loss.backward()
            if way == "no_grad":
                with torch.no_grad():
                    w -= 0.1 * w.grad
            else:
                w.data = w.data - 0.1 * w.grad.data
            w.grad = None

    records = record(program)
    assert [step.step for step in records.steps()] == [0, 1, 2, 3]
    if way != "graph":  # autograd.grad tells of no loss
        assert [step.loss for step in records.steps()] == pytest.approx(losses)
    # The update belongs to the step whose gradient it takes.
    assert [call.step for call in records.ops() if call.op in ("sub_", "sub")][-1] == 3
    assert_ordered(records)


def test_backward_beside_an_optimizer_ends_no_step_of_a_tensor_program() -> None:
    w = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def program(t: Any) -> None:
        optimizer.zero_grad()
        optimizer.step()
        for _ in range(3):
            (w - 1).square().sum().backward()
            w.norm().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert [step.step for step in record(program).steps()] == [0, 1, 2, 3]


def test_program_of_a_few_ops_is_one_step() -> None:
    records = record(lambda t: torch.ones(2).exp())
    assert [call.op for call in records.ops()] == ["ones", "exp"]
    assert len(records.steps()) == 1


def test_block_that_does_nothing_has_no_step() -> None:
    records = record(lambda t: None)
    assert [type(r) for r in records] == [Header, End]


def test_end_is_in_the_last_step_that_has_a_record() -> None:
    model = Net()

    def program(t: Any) -> None:
        model(torch.rand(2, 4))
        t.step()
        torch.ones(2).exp()

    records = record(program)
    assert records.op("exp").step == 1
    assert_ordered(records)


def test_fetching_inside_a_module_ends_no_step() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for (y,) in loader(2):
                x = x + y
            return x

    records = record(lambda t: Reads()(torch.zeros(2, 4)))
    assert len(records.steps()) == 1
    assert records.actions("fetch") == []


def test_calls_of_another_thread_join_the_step_and_never_end_it() -> None:
    model, other = Net(), nn.Linear(4, 1)
    optimizer = sgd(model)

    def elsewhere() -> None:
        for _ in range(3):
            other(torch.rand(2, 4)).sum().backward()

    def program(t: Any) -> None:
        for (x,) in loader(2):
            train(model, optimizer, x)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    records = record(program)
    assert len(records.steps()) == 2
    others = records.modules(module="Linear")
    assert [call.step for call in others] == [0, 0, 0, 1, 1, 1]
    assert all(call.thread > 0 for call in others)
    assert {c.thread for c in records.modules(module="")} == {0}


def test_call_that_outlives_its_step_does_not_turn_the_log_back() -> None:
    class Turns(nn.Module):
        def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            t.step()
            return x + 1

    records = record(lambda t: Turns()(torch.zeros(2), t))
    (call,) = records.modules()
    assert call.step == 1
    assert records.output(call).shape == (2,)
    assert_ordered(records)


def test_loader_with_workers_is_followed_and_workers_stay_silent() -> None:
    model = Net()

    def program(t: Any) -> None:
        data = TensorDataset(torch.rand(4, 4))
        for (x,) in DataLoader(data, batch_size=2, num_workers=1):
            model(x)

    assert [step for step, _ in root_calls(record(program))] == [0, 1]


def test_step_line_has_times_and_counts_the_records_of_its_step() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            train(model, optimizer, torch.rand(2, 4))

    records = record(program)
    for step in records.steps():
        mine = [r for r in records if r.step == step.step]
        mine = [r for r in mine if not isinstance(r, (Header, Step, End))]
        assert step.records == len(mine)
        assert step.host_ns > 0
        assert step.full


def test_every_call_of_a_module_has_the_update_it_ran_under() -> None:
    model = Net()
    optimizer = sgd(model)

    def program(t: Any) -> None:
        for _ in range(2):
            train(model, optimizer, torch.rand(2, 4))

    records = record(program)
    for update in range(2):
        calls = [call for call in records.of(Call, step=update) if call.module is not None]
        assert {(call.update, call.phase) for call in calls} == {
            (update, "forward"), (update, "backward"),
        }  # fmt: skip
    assert [a.update for a in records.actions("loss")] == [0, 1]


def test_loader_class_is_what_it_was_after_the_block() -> None:
    before = _BaseDataLoaderIter.__next__
    record(lambda t: list(loader(1)))
    assert _BaseDataLoaderIter.__next__ is before
