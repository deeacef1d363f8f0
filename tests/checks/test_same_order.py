from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tensortrace.engine import Engine
from tensortrace.records import Action
from tests.builders import HERE
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
    """One step an epoch; `orders` are their hashes."""
    for step, order in enumerate(orders):
        detail = {"order": order, "sampler": "RandomSampler", **changes}
        yield Action(step=step, seq=1, action="loader", of="Data", detail=detail)
        yield Action(step=step, seq=2, action="fetch")
        yield optimizer(step=step, seq=5)
        yield closing(step)


def test_the_number_of_epochs_is_a_setting():
    assert [f.step for f in find(epochs("aaaa"), CODE)] == [2]
    assert [f.step for f in find(epochs("aaaa"), CODE, sustain=2)] == [1]
    assert find(epochs("aabbaabb"), CODE) == []
    assert find(epochs("abab"), CODE) == []
    assert find(epochs([None] * 4), CODE) == []
    assert find(epochs("aaaa", batches=1), CODE) == []


def step_with(model, sgd, batch):
    sgd.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    sgd.step()


def evaluated_first(training, model, sgd, epoch):
    training.sampler.set_epoch(epoch)
    with torch.no_grad():
        for x, _ in training:
            model(x)
    for batch in training:
        step_with(model, sgd, batch)


def evaluated_first_in_one_loop(training, model, sgd, epoch):
    training.sampler.set_epoch(epoch)
    for learns in (False, True):
        for batch in training:
            if learns:
                step_with(model, sgd, batch)


def looked_at_first(training, model, sgd, epoch):
    training.sampler.set_epoch(epoch)
    model(next(iter(training))[0])
    for batch in training:
        step_with(model, sgd, batch)


def trained_on_twice(training, model, sgd, epoch):
    training.sampler.set_epoch(epoch)
    for batch in training:
        step_with(model, sgd, batch)
    for batch in training:
        step_with(model, sgd, batch)


def validated_before_the_step(training, model, sgd, epoch):
    training.sampler.set_epoch(epoch)
    fixed = DataLoader(DATA, 4, sampler=distributed())
    for x, y in training:
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for held_out, _ in fixed:
                model(held_out)
        sgd.step()


def validated_between_two_optimizers(training, model, sgd, epoch):
    training.sampler.set_epoch(epoch)
    weight, bias = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    fixed = DataLoader(DATA, 4, sampler=distributed())
    for x, y in training:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for held_out, _ in fixed:
                model(held_out)
        weight.step()
        bias.step()


def loaded_anew(training, model, sgd, epoch):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for batch in training:
        step_with(model, sgd, batch)


@pytest.mark.parametrize(
    "turn",
    [evaluated_first, evaluated_first_in_one_loop, looked_at_first, trained_on_twice,
     validated_before_the_step, validated_between_two_optimizers, loaded_anew],
)  # fmt: skip
def test_a_loader_that_is_read_again_in_an_epoch_is_no_epoch_in_the_same_order(turn):
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        training = DataLoader(DATA, 4, sampler=distributed())
        for epoch in range(5):
            turn(training, model, sgd, epoch)

    assert find_live(program, CODE) == []


def test_an_average_of_the_weights_that_is_loaded_hides_nothing():
    def program():
        model, average = nn.Linear(4, 3), nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        training = DataLoader(DATA, 4, sampler=distributed())
        for _ in range(3):
            for batch in training:
                step_with(model, sgd, batch)
            average.load_state_dict(model.state_dict())

    assert [f.value for f in find_live(program, CODE)] == [3]


def test_the_fault_is_found_beside_an_evaluation_in_the_same_loop():
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        training = DataLoader(DATA, 4, sampler=distributed())
        for _ in range(3):
            for learns in (False, True):
                for batch in training:
                    if learns:
                        step_with(model, sgd, batch)

    assert [f.value for f in find_live(program, CODE)] == [3]


@pytest.mark.parametrize(
    "change",
    [
        lambda sampler, epoch: setattr(sampler, "indices", list(range(8 + 4 * epoch))),
        lambda sampler, epoch: setattr(sampler, "indices", list(range(epoch, epoch + 12))),
    ],
    ids=["more", "others"],
)
def test_other_samples_are_no_same_order(change):
    def begin(sampler, epoch):
        torch.manual_seed(0)
        change(sampler, epoch)

    program = train(begin, sampler=lambda: SubsetRandomSampler(list(range(8))))
    assert find_live(program, CODE) == []


def test_other_weights_are_no_same_order():
    def begin(sampler, epoch):
        torch.manual_seed(0)
        sampler.weights = torch.arange(24.0).roll(epoch).double()

    program = train(begin, sampler=lambda: WeightedRandomSampler(torch.ones(24), 24))
    assert find_live(program, CODE) == []
    kept = train(seed, sampler=lambda: WeightedRandomSampler(torch.ones(24), 24))
    assert len(find_live(kept, CODE)) == 1


@pytest.mark.parametrize("part", [slice(1, None, 3), 600 - 1])
def test_one_other_weight_of_many_is_no_same_order(part):
    def program():
        data = TensorDataset(torch.randn(600, 4), torch.randint(3, (600,)))
        sampler = WeightedRandomSampler(torch.ones(600), 60, generator=torch.Generator())
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(5):
            sampler.generator.manual_seed(0)
            sampler.weights[part] = 1 + epoch / 10
            for batch in DataLoader(data, 20, sampler=sampler):
                step_with(model, sgd, batch)

    assert find_live(program, CODE) == []


class Shards(Dataset):
    """One at a time; `drawn` may be a part of it."""

    def __init__(self):
        self.of = [torch.randn(12, 4) for _ in range(5)]
        self.number, self.labels, self.now = 0, torch.randint(3, (12,)), self.of[0]

    def by_number(self, number):
        self.number = number

    def by_data(self, number):
        self.now = self.of[number].clone()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return (self.now if self.number == 0 else self.of[self.number])[index], self.labels[index]


@pytest.mark.parametrize("swap", [Shards.by_number, Shards.by_data, None])
@pytest.mark.parametrize("part", [lambda shards: shards, lambda shards: Subset(shards, range(12))])
def test_shards_that_take_turns_in_a_dataset_are_no_same_order(swap, part):
    def program():
        shards, model = Shards(), nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        drawn = part(shards)
        sampler = DistributedSampler(drawn, num_replicas=1, rank=0)
        for number in range(5):
            if swap is not None:
                swap(shards, number)
            for batch in DataLoader(drawn, 4, sampler=sampler):
                step_with(model, sgd, batch)

    assert len(find_live(program, CODE)) == (swap is None)


def in_turn(loaders, model, sgd):
    for loader in loaders:
        for batch in loader:
            step_with(model, sgd, batch)


def side_by_side(loaders, model, sgd):
    for (x, y), (other, labels) in zip(*loaders, strict=True):
        step_with(model, sgd, (torch.cat([x, other]), torch.cat([y, labels])))


@pytest.mark.parametrize("forgotten", [[], [0], [1], [0, 1]])
@pytest.mark.parametrize("read", [in_turn, side_by_side])
def test_of_two_loaders_on_one_line_each_is_judged(read, forgotten):
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        loaders = [DataLoader(DATA, 4, sampler=distributed()) for _ in range(2)]
        for epoch in range(5):
            for i, loader in enumerate(loaders):
                if i not in forgotten:
                    loader.sampler.set_epoch(epoch)
            read(loaders, model, sgd)

    found = find_live(program, CODE)
    assert {f.evidence["sampler_index"] for f in found} <= set(forgotten)
    assert bool(found) == bool(forgotten)


def test_training_and_validation_may_take_turns_on_one_line():
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        loaders = {phase: DataLoader(DATA, 4, sampler=distributed()) for phase in "tv"}
        for epoch in range(5):
            loaders["t"].sampler.set_epoch(epoch)
            for phase, loader in loaders.items():
                for batch in loader:
                    if phase == "t":
                        step_with(model, sgd, batch)
                    else:
                        model(batch[0])

    assert find_live(program, CODE) == []


@pytest.mark.parametrize("at", [None, HERE])
def test_samplers_that_are_made_anew_leave_little_behind(at):
    records = []
    for step in range(700):
        detail = {"order": str(step), "sampler": "RandomSampler", "sampler_index": step}
        records.append(Action(step=step, seq=1, action="loader", of="Data", detail=detail))
        # As next() does, which need not be where iter() was.
        records += [Action(step=step, seq=2, action="fetch", location=at)]
        records += [optimizer(step=step, seq=5)]
        records.append(closing(step))
    engine = Engine()
    for record in records:
        engine.feed(record)
    memory = engine._memory[CODE]
    assert len(memory["series"]) == (256 if at is None else 0)
    assert [len(epochs) for epochs in memory["begun"].values()] == [1]


def test_parts_of_the_data_in_the_same_order_are_silent():
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            part = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
            torch.manual_seed(0)
            for batch in DataLoader(part, 4, shuffle=True):
                step_with(model, sgd, batch)

    assert find_live(program, CODE) == []


def test_short_trials_of_a_few_batches_with_the_same_seed_are_silent():
    assert find_live(train(seed, anew=True, epochs=5, batch_size=6), CODE) == []


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
