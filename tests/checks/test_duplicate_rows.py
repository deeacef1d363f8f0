from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from tensortrace.records import Action
from tests.builders import HERE
from tests.checks import closing, find
from tests.checks.traced import find_live


class Noise(IterableDataset):
    """Pictures that are made up, with a generator that each worker has a copy of."""

    def __init__(self, own_seed):
        self.random, self.own_seed = torch.Generator().manual_seed(0), own_seed

    def __iter__(self):
        worker = get_worker_info()
        if self.own_seed and worker is not None:
            self.random.manual_seed(worker.seed)
        for _ in range(24):
            yield torch.randn(1, 8, 8, generator=self.random)


class Ignoring(Dataset):
    """One picture, whatever the index; or one for each."""

    def __init__(self, by_index):
        self.all, self.by_index = torch.randn(40, 1, 8, 8), by_index

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return self.all[i if self.by_index else 3]


def reconstruct(make, **options):
    def program():
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, 1, 1))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x in DataLoader(make(), **{"batch_size": 8, **options}):
            adam.zero_grad()
            F.mse_loss(model(x), x).backward()
            adam.step()

    return program


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_workers_with_copies_of_one_generator_give_each_batch_twice():
    (found,) = find_live(reconstruct(lambda: Noise(False), num_workers=2), "TT611")
    assert (found.severity, found.value) == ("warning", 1.0)
    assert "8 of 8 rows of a batch are equal to rows of the batches before it" in found.message
    assert "from 2 workers" in found.message
    assert found.location.file == __file__
    assert find_live(reconstruct(lambda: Noise(True), num_workers=2), "TT611") == []


def test_dataset_that_ignores_its_index_gives_one_row():
    (found,) = find_live(reconstruct(lambda: Ignoring(False)), "TT611")
    assert found.step == 2
    assert find_live(reconstruct(lambda: Ignoring(True), shuffle=True), "TT611") == []


class Poisson(torch.utils.data.Sampler):
    """Batches that each draw from all, as differential privacy has them."""

    def __iter__(self):
        for _ in range(20):
            yield torch.randint(2, (2,)).tolist()


@pytest.mark.parametrize("given", ["sampler in batches", "batches of its own"])
def test_batches_that_draw_again_are_meant(given):
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(2), 40)
    batches = {
        "sampler in batches": torch.utils.data.BatchSampler(sampler, 2, False),
        "batches of its own": Poisson(),
    }
    program = reconstruct(lambda: Ignoring(True), batch_size=1, batch_sampler=batches[given])
    assert find_live(program, "TT611") == []


def test_sampling_with_replacement_is_meant():
    sampler = torch.utils.data.RandomSampler(range(2), replacement=True, num_samples=40)
    program = reconstruct(lambda: Ignoring(True), sampler=sampler)
    assert find_live(program, "TT611") == []


def test_iterator_made_before_the_run_may_draw_with_replacement():
    sampler = torch.utils.data.RandomSampler(range(4), replacement=True, num_samples=80)
    batches = iter(DataLoader(Ignoring(True), batch_size=8, sampler=sampler))

    def program():
        model = nn.Conv2d(1, 1, 3, padding=1)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        for x in batches:
            sgd.zero_grad()
            F.mse_loss(model(x), x).backward()
            sgd.step()

    assert find_live(program, "TT611") == []


def steps(*found, replacement=False, epochs=1):
    for i, detail in enumerate(found):
        if i % (len(found) // epochs) == 0:
            yield Action(step=i, seq=1, action="loader", of="Data",
                         detail={"workers": 2, "replacement": replacement})  # fmt: skip
        if detail:
            yield Action(step=i, seq=2, action="duplicates", location=HERE, detail=detail)
        yield closing(i)


HALF = {"rows": 10, "within": 0, "earlier": 5}
LESS = {"rows": 10, "within": 4, "earlier": 4}


def test_half_of_the_rows_in_three_steps_is_the_limit():
    assert [f.step for f in find(steps(HALF, None, HALF, HALF), "TT611")] == [3]
    assert find(steps(HALF, HALF, LESS, LESS), "TT611") == []
    assert find(steps(HALF, HALF, HALF, HALF, epochs=2), "TT611") == []
    assert find(steps(*[HALF] * 4, replacement=True), "TT611") == []
    assert len(find(steps(LESS, LESS, LESS), "TT611", share=0.4)) == 1


def test_rows_of_the_same_batch_are_told_from_those_of_batches_before():
    within = {"rows": 10, "within": 6, "earlier": 0}
    (found,) = find(steps(within, within, within), "TT611")
    assert "6 of 10 rows of a batch are equal to rows before them in it" in found.message


def test_empty_run_is_silent():
    assert find([], "TT611") == []
    assert find([closing()], "TT611") == []
