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
