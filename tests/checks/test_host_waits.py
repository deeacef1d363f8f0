from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from tensortrace.capture.ops import function_mode as ops
from tensortrace.records import Action, Location
from tests.builders import HERE
from tests.checks import closing, find, ok, op, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


class Clock:
    """Goes on by a microsecond each time that it is read."""

    def __init__(self):
        self.now_ns = 0

    def __call__(self):
        self.now_ns += 1_000
        return self.now_ns


class Slow(Dataset):
    """Pictures that take a while to be read."""

    def __init__(self, clock, each_ms):
        self.clock, self.each_ms, (self.x, self.y) = clock, each_ms, images(96)

    def __len__(self):
        return 96

    def __getitem__(self, i):
        self.clock.now_ns += int(self.each_ms * 1e6)
        return self.x[i], self.y[i]


@pytest.mark.parametrize(("each_ms", "count"), [(5.0, 1), (0.5, 0)])
def test_pictures_that_are_slow_to_read_dominate_the_step(each_ms, count, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter_ns", clock)

    def program():
        model = convnet()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for x, y in DataLoader(Slow(clock, each_ms), batch_size=4):
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            clock.now_ns += 4_000_000
            sgd.step()

    found = find_live(program, "TT706")
    assert [(f.severity, f.step) for f in found] == [("warning", 20)][:count]
    if count:
        assert "takes 20 ms" in found[0].message
        assert "num_workers=4 (it is 0)" in found[0].fix


def language(read):
    def program():
        model = LanguageModel()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        total = 0.0
        for _ in range(6):
            loss = next_word_loss(model, sentences())
            loss.backward()
            adam.step()
            adam.zero_grad()
            total = read(total, loss)

    return program


def many(total, loss):
    rows = loss.detach().expand(12)
    return total + sum(row.item() for row in rows)


def test_one_item_a_step_is_a_note_and_a_dozen_are_a_warning(monkeypatch):
    monkeypatch.setattr(ops, "_HOSTS", frozenset())  # the CPU stands for a device
    (note,) = find_live(language(lambda total, loss: total + loss.item()), "TT706")
    assert (note.severity, note.step) == ("note", 4)
    assert "1 times a step (limit 10), in 5 full steps running, by .item()" in note.message
    (warning,) = find_live(language(many), "TT706")
    assert (warning.severity, warning.value) == ("warning", 12)
    assert find_live(language(lambda total, loss: total + loss.detach()), "TT706") == []


def test_host_alone_waits_for_nothing():
    assert find_live(language(many), "TT706") == []


def steps(count, *, name="item", copies=False, times=1, trains=True):
    for i in range(count):
        for n in range(times):
            at = Location("train.py", 20 + n, "main")
            if copies:
                tensors = [ok(1, device="cuda:0"), ok(2)]
                yield op(n, "cpu", [1], [2], tensors, step=i, location=at)
            else:
                yield Action(step=i, seq=n, action="sync", of=name, location=at)
        if trains:
            yield optimizer(step=i)
        yield closing(i)


@pytest.mark.parametrize(
    ("changes", "severities"),
    [
        ({"count": 5}, ["note"]),
        ({"count": 4}, []),
        ({"count": 5, "copies": True}, ["note"]),
        ({"count": 5, "times": 10}, ["warning"]),
        ({"count": 5, "times": 9}, ["note"]),
        ({"count": 5, "trains": False}, []),
    ],
)
def test_thresholds_of_waiting_for_a_device(changes, severities):
    assert [f.severity for f in find(steps(**changes), "TT706")] == severities


def test_printing_is_called_by_its_name():
    (found,) = find(steps(5, name="__format__"), "TT706")
    assert "by an f-string in 1 lines" in found.message


def fetches(*pairs):
    for i, (fetch_ms, step_ms) in enumerate(pairs):
        ns = int(fetch_ms * 1e6)
        yield Action(step=i, seq=1, action="fetch", location=HERE, detail={"host_ns": ns})
        yield closing(i, host_ns=int(step_ms * 1e6))


@pytest.mark.parametrize(
    ("fetch_ms", "step_ms", "count"),
    [(6.0, 11.9, 1), (6.0, 12.0, 0), (5.0, 6.0, 0), (5.1, 6.0, 1)],
)
def test_thresholds_of_waiting_for_data(fetch_ms, step_ms, count):
    assert len(find(fetches(*[(fetch_ms, step_ms)] * 21), "TT706")) == count
    assert find(fetches(*[(fetch_ms, step_ms)] * 20), "TT706") == []


def test_slow_start_of_each_epoch_is_not_told():
    epoch = [(2000.0, 10.0), *[(1.0, 10.0)] * 4]
    assert find(fetches(*epoch * 6), "TT706") == []


def test_empty_run_is_silent():
    assert find([], "TT706") == []
    assert find([closing()], "TT706") == []
