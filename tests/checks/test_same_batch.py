from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tensortrace import trace
from tensortrace.records import Action, Finding
from tests.builders import HERE
from tests.checks import call, closing, find, ok
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def batches(batch_size=16, shuffle=False):
    return DataLoader(TensorDataset(*images(64)), batch_size=batch_size, shuffle=shuffle)


def train(fetch, steps=8):
    """Train a convnet on what `fetch` gives, step by step."""

    def program():
        model = convnet()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        given = fetch()
        for _ in range(steps):
            x, y = next(given)
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

    return program


def always_the_first(**options):
    loader = batches(**options)
    while True:
        yield next(iter(loader))


def epochs(**options):
    loader = batches(**options)
    while True:
        yield from loader


def test_next_of_iter_in_each_step_gives_the_first_batch_only():
    (found,) = find_live(train(always_the_first), "TT602")
    assert (found.severity, found.step, found.value) == ("warning", 4, 5)
    assert "an epoch has 4" in found.message
    assert found.location.file == __file__
    assert find_live(train(epochs), "TT602") == []


def test_next_of_iter_of_a_shuffled_loader_gives_random_batches():
    assert find_live(train(lambda: always_the_first(shuffle=True)), "TT602") == []


@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_of_one_batch_is_full_batch_training(shuffle):
    assert find_live(train(lambda: epochs(batch_size=64, shuffle=shuffle)), "TT602") == []


class Sentences(Dataset):
    def __init__(self, shift):
        self.all, self.shift = sentences(64), shift

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.all[i * self.shift]


@pytest.mark.parametrize(("shift", "count"), [(0, 1), (1, 0)])
def test_dataset_that_ignores_its_index(shift, count):
    def program():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for tokens in DataLoader(Sentences(shift), batch_size=8):
            next_word_loss(model, tokens).backward()
            adam.step()
            adam.zero_grad()

    assert len(find_live(program, "TT602")) == count


@pytest.mark.parametrize(("decorated", "count"), [("epoch", 0), ("two lines", 1)])
def test_an_epoch_that_is_a_step_may_come_in_the_order_of_the_last(decorated, count):
    model, loader = convnet(), batches()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)

    def learn(x, y):
        adam.zero_grad()
        F.cross_entropy(model(x), y).backward()
        adam.step()

    def epoch():
        for x, y in loader:
            learn(x, y)

    def two_lines():
        learn(*next(iter(loader)))
        learn(*next(iter(loader)))

    records = []
    t = trace(out=records.append, every=1)
    run = t(epoch if decorated == "epoch" else two_lines)
    for _ in range(8):
        run()
    t.close()
    assert len({r.id for r in records if isinstance(r, Finding) and r.code == "TT602"}) == count


def one_hot(count, width):
    return F.one_hot(torch.randint(width, (count,)), width).float()


def permutations(count, width):
    return torch.rand(count, width).argsort(1).float()


@pytest.mark.parametrize("make", [one_hot, permutations])
def test_other_rows_with_the_same_statistics_are_no_same_batch(make):
    def program():
        torch.manual_seed(0)
        model = torch.nn.Linear(32, 4)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        for (x,) in DataLoader(TensorDataset(make(96, 32)), batch_size=8, shuffle=True):
            sgd.zero_grad()
            model(x).pow(2).mean().backward()
            sgd.step()

    assert find_live(program, "TT602") == []


def steps(count, *, batches=9, change=lambda i: {}, loss=True):
    for i in range(count):
        if i == 0:
            yield Action(step=i, seq=1, action="loader", of="Data", detail={"batches": batches})
        yield Action(step=i, seq=2, action="fetch", location=HERE)
        yield call(3, "", [1], [2], [ok(1, 4, 3, **change(i)), ok(2, 4)], step=i)
        if loss:
            yield Action(step=i, seq=4, action="loss", detail={"value": 1.0})
        yield closing(i)


def test_five_steps_running_are_the_limit():
    assert [f.step for f in find(steps(9), "TT602")] == [4]
    assert find(steps(4), "TT602") == []
    assert find(steps(9, change=lambda i: {"mean": i // 4 / 10}), "TT602") == []
    assert len(find(steps(4), "TT602", sustain=4)) == 1


@pytest.mark.parametrize("changes", [{"batches": 1}, {"batches": None}, {"loss": False}])
def test_what_cannot_be_told_is_silent(changes):
    assert find(steps(9, **changes), "TT602") == []


def test_empty_run_is_silent():
    assert find([], "TT602") == []
    assert find([closing()], "TT602") == []
