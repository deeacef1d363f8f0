from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import brief, call, closing, find, module, ok, op, optimizer
from tests.checks.traced import find_live
from tests.healthy.data import images, loader
from tests.healthy.vision import convnet


def accuracy(logits, y):
    return (logits.argmax(1) == y).float().mean().item()


def classifier(switch, judge=accuracy, with_loader=True):
    def run():
        model = convnet(4)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        train = loader(32) if with_loader else [images(16) for _ in range(2)]
        test = loader(48) if with_loader else [images(16) for _ in range(3)]
        for x, y in train:
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()
        if switch:
            model.eval()
        with torch.no_grad():
            for x, y in test:
                judge(model(x), y)

    return run


@pytest.mark.parametrize("with_loader", [True, False])
@pytest.mark.parametrize("judge", [accuracy, F.cross_entropy, nn.CrossEntropyLoss()])
def test_validation_of_a_classifier_without_eval(judge, with_loader):
    (found,) = find_live(classifier(False, judge, with_loader), "TT702")
    assert (found.severity, found.module, found.value, found.limit) == ("warning", "", 2, 2)
    assert "evaluated in train mode: 3 BatchNorm or Dropout modules" in found.message
    assert find_live(classifier(True, judge, with_loader), "TT702") == []


def test_predictions_that_nobody_judges_are_silent():
    recalibrate = lambda logits, y: logits.softmax(1).mean(0)  # noqa: E731
    assert find_live(classifier(False, recalibrate), "TT702") == []


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.qkv, self.head, self.dropout = nn.Linear(16, 48), nn.Linear(16, 2), dropout

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = self.dropout(self, (q @ k.mT).softmax(-1))
        return self.head(weights @ v).mean(1)


def left_on(dropout, judged=True):
    def run():
        model = Attention(dropout)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(model(torch.randn(4, 6, 16)), torch.tensor([0, 1, 0, 1])).backward()
        sgd.step()
        model.eval()
        with torch.no_grad():
            guess = model(torch.randn(4, 6, 16))
            if judged:
                F.cross_entropy(guess, torch.tensor([0, 1, 0, 1]))

    return run


def test_functional_dropout_that_does_not_know_of_eval():
    (found,) = find_live(left_on(lambda m, x: F.dropout(x, 0.1)), "TT702", level="op")
    assert (found.severity, found.op, found.step) == ("warning", "dropout", 1)
    fixed = left_on(lambda m, x: F.dropout(x, 0.1, training=m.training))
    assert find_live(fixed, "TT702", level="op") == []
    (alone,) = find_live(left_on(lambda m, x: F.dropout(x), judged=False), "TT702", level="op")
    assert alone.severity == "note"
    assert find_live(left_on(lambda m, x: F.dropout(x, p=0)), "TT702", level="op") == []


class Scorer(nn.Module):
    """Scores the rows of a table; what is left of them in eval mode is for a subclass to say."""

    def __init__(self):
        super().__init__()
        self.table, self.weigh = nn.Embedding(50, 8), nn.Linear(8, 1)


class AlwaysDrops(Scorer):
    def forward(self, ids):
        rows = self.table(ids)
        rows = F.dropout(rows, p=0.2)
        return self.weigh(rows).mean((1, 2))


class Asks(Scorer):
    def forward(self, ids):
        return self.weigh(F.dropout(self.table(ids), 0.2, self.training)).mean((1, 2))


class AsksElsewhere(Scorer):
    def forward(self, ids):
        rows = self.table(ids)
        if self.training:
            rows = F.dropout(rows)
        return self.weigh(rows + torch.randn(8)).mean((1, 2))


class OnPurpose(Scorer):
    def forward(self, ids):
        return self.weigh(F.dropout(self.table(ids), 0.2, training=True)).mean((1, 2))


class NeverGetsThere(Scorer):
    def forward(self, ids):
        rows = self.table(ids)
        return self.weigh(F.dropout(rows) if len(ids) > 100 else rows).mean((1, 2))


class NoneDropped(Scorer):
    def forward(self, ids):
        return self.weigh(F.dropout(self.table(ids), p=0)).mean((1, 2))


def scored(make, judged=True, **options):
    """An epoch with an evaluation at its end."""

    def run():
        model = nn.Sequential(make())
        sgd, labels = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(50)
        for turn in range(4):
            model.train(turn != 3)
            ids = torch.randint(0, 50, (16, 4))
            y = (labels[ids].sum(1) > 0).float()
            if model.training:
                sgd.zero_grad()
                F.binary_cross_entropy_with_logits(model(ids), y).backward()
                sgd.step()
                continue
            with torch.no_grad():
                guess = model(ids)
                if judged:
                    ((guess > 0) == y.bool()).float().mean()

    return find_live(run, "TT702", **options)


@pytest.mark.parametrize("level", ["module", "op"])
def test_functional_dropout_inside_a_module_is_found_at_both_levels(level):
    (found,) = scored(AlwaysDrops, level=level)
    assert (found.severity, found.module, found.op) == ("warning", "0", "dropout")
    assert found.location.code == "rows = F.dropout(rows, p=0.2)"
    (alone,) = scored(AlwaysDrops, judged=False, level=level)
    assert alone.severity == "note"


@pytest.mark.parametrize("make", [Asks, AsksElsewhere, OnPurpose, NeverGetsThere, NoneDropped])
def test_functional_dropout_that_is_meant_or_off_is_silent(make):
    assert scored(make) == []


def test_a_dropout_that_forward_makes_anew_does_not_know_of_eval():
    anew = lambda m, x: nn.Dropout(0.5)(x)  # noqa: E731
    (found,) = find_live(left_on(anew), "TT702")
    assert (found.severity, found.module, found.step) == ("warning", "Dropout", 1)
    assert found.location.code.startswith("anew =")
    (alone,) = find_live(left_on(anew, judged=False), "TT702")
    assert alone.severity == "note"
    assert find_live(left_on(lambda m, x: nn.Dropout(0.5).train(m.training)(x)), "TT702") == []


def test_dropout_that_is_switched_on_for_monte_carlo_is_silent():
    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.head = nn.Dropout(), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.dropout(x))

    def run():
        model = Sampled().eval()
        model.dropout.train()
        with torch.no_grad():
            x = torch.randn(4, 8)
            guess = torch.stack([model(x) for _ in range(8)]).mean(0)
            F.cross_entropy(guess, torch.tensor([0, 1, 0, 1]))

    assert find_live(run, "TT702") == []


@pytest.mark.parametrize("norms_in_eval", [False, True])
def test_frozen_norms_whose_statistics_move_are_a_note(norms_in_eval):
    def run():
        model = convnet(4)
        model[:-1].requires_grad_(False)
        if norms_in_eval:
            model[:-2].eval()
        sgd = torch.optim.SGD(model[-1].parameters(), lr=0.1)
        for _ in range(4):
            x, y = images(8)
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            sgd.zero_grad()

    found = find_live(run, "TT702")
    assert [f.severity for f in found] == ([] if norms_in_eval else ["note"])


def averaged(update, trained=True):
    """Judge averaged weights; the copy was made before training and keeps its own buffers."""

    def run():
        model = convnet(4)
        average = copy.deepcopy(model)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in loader(48) if trained else ():
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.data.lerp_(new.data, 0.1)
        if update:
            torch.optim.swa_utils.update_bn(loader(32), average)
        average.eval()
        with torch.no_grad():
            for x, y in loader(32):
                accuracy(average(x), y)

    return run


def test_averaged_weights_whose_norms_were_never_fed():
    (found,) = find_live(averaged(False), "TT702")
    assert (found.severity, found.value) == ("warning", 3)
    assert "evaluated with the statistics of a new norm, after 3 optimizer steps" in found.message
    assert len(found.evidence["modules"]) == 2
    assert find_live(averaged(True), "TT702") == []


def test_a_look_at_the_network_before_it_is_trained_is_a_note():
    (found,) = find_live(averaged(False, trained=False), "TT702")
    assert found.severity == "note"


def test_norms_that_were_loaded_or_keep_no_statistics_are_silent():
    def run(model):
        model.eval()
        with torch.no_grad():
            F.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 2, 0]))

    trained = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    trained(torch.randn(8, 3))
    loaded = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    loaded.load_state_dict(trained.state_dict())
    ported = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ported[1].running_var.fill_(2.0)
    plain = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    iterated = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    for model in (trained, loaded, ported, plain, nn.Sequential(iterated)):
        assert find_live(lambda model=model: run(model), "TT702") == []


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
def test_a_spectral_norm_whose_iteration_never_ran():
    def run(warm):
        judge = nn.Sequential(nn.utils.spectral_norm(nn.Linear(32, 32)), nn.Linear(32, 1))
        if warm:
            judge(torch.randn(4, 32))
        judge.eval()
        with torch.no_grad():
            judge(torch.randn(4, 32))

    (found,) = find_live(lambda: run(False), "TT702")
    assert (found.severity, found.module) == ("note", "0")
    assert find_live(lambda: run(True), "TT702") == []


def steps(count, *, cls="Dropout", zeros=4, judge="cross_entropy", held=("a.weight",), **changes):
    yield module("a", "weight", cls="Net")
    yield module("a.drop", cls=cls)
    yield optimizer(parameters=list(held))
    yield closing(0)
    fields = {"training": True, "grad_enabled": False, **changes}
    for i in range(1, count + 1):
        yield call(0, "a", [0], [2], [ok(0), ok(2)], step=i, **fields)
        yield call(1, "a.drop", [0], [1], [ok(1, zeros=zeros)], step=i, parent=0, **fields)
        yield op(2, judge, [2], [3], step=i)
        yield closing(i)


def test_two_steps_are_the_edge_and_a_setting():
    assert find(steps(1), "TT702") == []
    assert brief(find(steps(2), "TT702")) == [("TT702", "warning", "a")]
    assert len(find(steps(1), "TT702", batches=1)) == 1


def test_what_makes_no_difference_is_silent():
    assert find(steps(4, zeros=0), "TT702") == []  # p=0
    assert len(find(steps(4, cls="BatchNorm1d", zeros=0), "TT702")) == 1
    assert find(steps(4, cls="LayerNorm"), "TT702") == []
    assert find(steps(4, training=False), "TT702") == []
    assert find(steps(4, grad_enabled=True), "TT702") == []
    assert find(steps(4, judge="argmax"), "TT702") == []
    assert find(steps(4, held=("teacher.weight",)), "TT702") == []


def test_nothing_says_nothing():
    assert find([], "TT702") == []
    assert find([optimizer(parameters=[]), closing(), closing(1), closing(2)], "TT702") == []
