from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from tensortrace.records import Action
from tests.checks import closing, find, optimizer
from tests.checks.traced import find_live

CODE = "TT615"
DATA = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))


def distributed(**options):
    return DistributedSampler(DATA, num_replicas=2, rank=0, **options)


def train(begin, *, sampler=RandomSampler, epochs=5, anew=False, batch_size=4):
    """Train epoch by epoch; `begin` gets the sampler and the epoch before it begins."""

    def program():
        drawn = sampler(DATA) if isinstance(sampler, type) else sampler()
        loader = DataLoader(DATA, sampler=drawn, batch_size=batch_size)
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(epochs):
            begin(drawn, epoch)
            if anew:
                model = nn.Linear(4, 3)
                sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            for x, y in loader:
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                sgd.step()

    return program


def nothing(drawn, epoch):
    pass


def seed(drawn, epoch):
    torch.manual_seed(0)


def test_a_distributed_sampler_without_set_epoch_is_told_in_the_third_epoch():
    (found,) = find_live(train(nothing, sampler=distributed), CODE)
    # Three batches of twelve samples an epoch.
    assert (found.severity, found.step, found.value) == ("warning", 6, 3)
    assert found.message == (
        "3 epochs running (limit 3) TensorDataset comes in the same order: set_epoch of its "
        "DistributedSampler is not called in between"
    )
    assert found.location.code == "for x, y in loader:"
    assert "set_epoch(epoch)" in found.fix


def test_set_epoch_mends_it():
    assert find_live(train(lambda s, e: s.set_epoch(e), sampler=distributed), CODE) == []


def test_a_seed_that_is_set_in_each_epoch_is_told():
    (found,) = find_live(train(seed), CODE)
    assert found.message.endswith(
        "the generator that its RandomSampler draws from is in the same state each time"
    )
    assert "set seeds once" in found.fix
    assert find_live(train(lambda s, e: torch.manual_seed(e)), CODE) == []
    assert find_live(train(nothing), CODE) == []


def test_a_generator_of_its_own_is_what_counts():
    def drawn():
        return RandomSampler(DATA, generator=torch.Generator())

    assert find_live(train(seed, sampler=drawn), CODE) == []
    assert len(find_live(train(lambda s, e: s.generator.manual_seed(3), sampler=drawn), CODE)) == 1


@pytest.mark.parametrize(
    ("sampler", "begin"),
    [
        (lambda: distributed(shuffle=False), nothing),
        (SequentialSampler, seed),
        # The search for a learning rate, and then the first epoch.
        (distributed, lambda s, e: s.set_epoch(max(e - 1, 0))),
    ],
    ids=["in order", "sequential", "twice"],
)
def test_what_is_meant_is_silent(sampler, begin):
    assert find_live(train(begin, sampler=sampler), CODE) == []


def test_trials_with_the_same_seed_are_silent():
    assert find_live(train(seed, anew=True, batch_size=1), CODE) == []


def test_one_batch_has_no_order():
    assert find_live(train(nothing, sampler=distributed, batch_size=12), CODE) == []


def test_an_evaluation_in_the_same_order_is_silent():
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        training, validation = (DataLoader(DATA, 4, sampler=distributed()) for _ in range(2))
        for epoch in range(5):
            training.sampler.set_epoch(epoch)
            for x, y in training:
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                sgd.step()
            with torch.no_grad():
                for x, _ in validation:
                    model(x)

    assert find_live(program, CODE) == []


def epochs(orders, **changes):
    """One step an epoch; `orders` are how often running each had the same order."""
    for step, times in enumerate(orders):
        detail = {"same_order": times, "sampler": "RandomSampler", **changes}
        yield Action(step=step, seq=1, action="loader", of="Data", detail=detail)
        yield Action(step=step, seq=2, action="fetch")
        yield optimizer(step=step, seq=5)
        yield closing(step)


def test_the_number_of_epochs_is_a_setting():
    assert [f.step for f in find(epochs([1, 2, 3, 4]), CODE)] == [2]
    assert [f.step for f in find(epochs([1, 2, 3, 4]), CODE, sustain=2)] == [1]
    assert find(epochs([1, 2, 1, 2, 1, 2]), CODE) == []
    assert find(epochs([1, 2, 3, 4], batches=1), CODE) == []


def test_the_program_draws_what_it_draws_untraced():
    torch.manual_seed(5)
    loader = DataLoader(DATA, batch_size=4, shuffle=True)
    alone = [x for _ in range(3) for x, _ in loader]
    seen = []

    def program():
        torch.manual_seed(5)
        seen.extend(x for _ in range(3) for x, _ in loader)

    find_live(program, CODE)
    assert all(map(torch.equal, alone, seen)) and len(alone) == len(seen)
