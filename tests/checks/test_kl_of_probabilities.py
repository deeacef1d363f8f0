from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checks import call, closing, find, module, ok, op
from tests.checks.traced import find_live


def distilled(loss_of):
    """A student learns the classes of a teacher."""

    def run():
        student, teacher = nn.Linear(8, 5), nn.Linear(8, 5)
        optimizer = torch.optim.Adam(student.parameters())
        for _ in range(4):
            x = torch.randn(16, 8)
            with torch.no_grad():
                wanted = teacher(x)
            optimizer.zero_grad()
            loss_of(student(x), wanted).backward()
            optimizer.step()

    return run


def kl(p, q, **options):
    return F.kl_div(p, q, reduction="batchmean", **options)


FAULTY = {
    "probabilities": (lambda s, t: kl(s.softmax(-1), t.softmax(-1)), "error", "input of kl_div"),
    "a module": (lambda s, t: nn.KLDivLoss(reduction="batchmean")(nn.Softmax(-1)(s), t.softmax(-1)),
                 "error", "input of KLDivLoss"),
    "logits": (lambda s, t: kl(s, t.softmax(-1)), "warning", "values up to"),
    "log target": (lambda s, t: kl(s.log_softmax(-1), t.softmax(-1), log_target=True),
                   "error", "target of kl_div"),
}  # fmt: skip
FIXED = {
    "log": lambda s, t: kl(s.log_softmax(-1), t.softmax(-1)),
    "a module": lambda s, t: nn.KLDivLoss(reduction="batchmean")(s.log_softmax(-1), t.softmax(-1)),
    "both logarithms": lambda s, t: kl(s.log_softmax(-1), t.log_softmax(-1), log_target=True),
    "log of softmax": lambda s, t: kl(s.softmax(-1).log(), t.softmax(-1)),
}


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", FAULTY)
def test_probabilities_for_logarithms_are_told(name, level):
    loss_of, severity, words = FAULTY[name]
    (found,) = find_live(distilled(loss_of), "TT614", level=level)
    assert (found.severity, found.step) == (severity, 0)
    assert words in found.message
    assert found.location is not None
    assert found.location.file == __file__


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", FIXED)
def test_logarithms_are_silent(name, level):
    assert find_live(distilled(FIXED[name]), "TT614", level=level) == []


@pytest.mark.parametrize(("most", "count"), [(0.0, 0), (0.01, 0), (0.011, 1)])
def test_the_largest_logarithm_is_zero_but_for_rounding(most, count):
    records = [op(1, "kl_div", [1, 2], [3], [ok(1, max=most), ok(2, max=1.0), ok(3)]), closing()]
    assert len(find(records, "TT614")) == count


def test_nothing_is_said_of_what_is_not_measured():
    records = [module("loss", cls="KLDivLoss"), call(1, "loss", [], [3], [ok(3)]),
               op(2, "kl_div", [7, 8], [9]), closing()]  # fmt: skip
    assert find(records, "TT614") == []
    assert find([closing()], "TT614") == []


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("dim", [0, -2])
def test_logarithms_over_another_dim_than_the_target_are_told(dim, level):
    def beside(s, t):
        logs = s.log_softmax(dim)
        return kl(logs, t.softmax(1))

    (found,) = find_live(distilled(beside), "TT614", level=level)
    assert (found.severity, found.step, found.value, found.limit) == ("warning", 0, 0, 1)
    assert "over dim 0 of [16, 5], and its target adds up to 1 over dim 1" in found.message
    assert found.location.code == "logs = s.log_softmax(dim)"
    (found,) = find_live(
        distilled(lambda s, t: kl(s.log_softmax(dim), t.log_softmax(1), log_target=True)), "TT614"
    )
    assert found.value == 0


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda s, t: kl(s.log_softmax(1), t.softmax(-1)),
        lambda s, t: kl(s.log_softmax(0), t.softmax(0)),
        # Turned round, by rows of as many, and of unknown dims.
        lambda s, t: kl(s.T.log_softmax(0).T, t.softmax(1)),
        lambda s, t: kl(s[:5].log_softmax(0), t[:5].softmax(1)),
        lambda s, t: kl(nn.LogSoftmax(1)(s), t.softmax(1)),
    ],
)
def test_logarithms_over_the_dim_of_the_target_are_silent(loss_of):
    assert find_live(distilled(loss_of), "TT614") == []


@pytest.mark.parametrize("dim", [2, -3, None, "1", True])
def test_a_dim_that_somebody_wrote_is_no_finding(dim):
    records = [
        op(1, "log_softmax", [1], [2], [ok(1, 16, 5), ok(2, 16, 5, max=0.0)], arguments={"dim": 0}),
        op(2, "softmax", [1], [3], [ok(3, 16, 5)], arguments={"dim": dim}),
        op(3, "kl_div", [2, 3], [4], [ok(4)]),
        closing(),
    ]
    assert find(records, "TT614") == []
