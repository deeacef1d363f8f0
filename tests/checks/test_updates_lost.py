from __future__ import annotations

import math

import pytest
import torch

from tensortrace.capture.stats import queue as stats
from tests.checks import closing, find, ok, optimizer, param
from tests.checks.traced import find_live
from tests.healthy.data import sentences
from tests.healthy.language import LanguageModel, next_word_loss


def language(make, lr, *, dtype=torch.bfloat16, autocast=False, steps=6, same=None):
    def program():
        model = LanguageModel().to(dtype)
        optimizer = make(model.parameters(), lr)
        for _ in range(steps):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = next_word_loss(model, sentences())
            optimizer.zero_grad()
            loss.backward()
            before = [p.detach().clone() for p in model.parameters() if p.dim() > 1]
            optimizer.step()
            if same is not None:
                after = [p.detach() for p in model.parameters() if p.dim() > 1]
                equal = sum(int((a == b).sum()) for a, b in zip(before, after, strict=True))
                same.append(equal / sum(a.numel() for a in after))

    return program


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


def test_bfloat16_weights_do_not_feel_a_rate_of_1e_5():
    same = []
    (found,) = find_live(language(adamw, 1e-5, same=same), "TT503")
    assert (found.severity, found.step) == ("warning", 4)
    # An element cannot move by less than the distance to the next number.
    assert found.value < min(same)
    assert found.value > 0.8
    assert "bf16" in found.message


def test_sgd_with_small_gradients_is_lost_too():
    same = []
    (found,) = find_live(language(sgd, 1e-5, same=same), "TT503")
    assert min(same) > found.value > 0.5


def test_weights_in_float32_under_autocast_are_the_repair():
    fixed = language(adamw, 1e-5, dtype=torch.float32, autocast=True)
    assert find_live(fixed, "TT503") == []


def test_rate_that_is_high_enough_is_silent():
    same = []
    assert find_live(language(adamw, 3e-3, same=same), "TT503") == []
    assert max(same) < 0.5


class RoundedAtRandom(torch.optim.AdamW):
    """Adds in float32 and rounds up or down by chance, so that nothing is lost on average."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moved = p.float() - group["lr"] * p.grad.float().sign()
                noise = torch.randint(0, 1 << 16, p.shape, dtype=torch.int32)
                bits = moved.view(torch.int32) + noise
                p.copy_(((bits >> 16) << 16).view(torch.float32))


def test_stochastic_rounding_moves_further_and_is_silent():
    assert find_live(language(RoundedAtRandom, 1e-5), "TT503") == []


def steps(count, *, lr=1e-5, rms=0.02, cls="AdamW", update=1e-6, grad=1.0, n=100, **changes):
    rates = lr if isinstance(lr, list) else [lr] * count
    for i in range(count):
        fields = {"dtype": "bfloat16", "norm": rms * n**0.5, "numel": n, **changes}
        value = ok(1, 10, 10, **fields)
        gradient = ok(2, 10, 10, norm=grad, numel=n) if grad is not None else None
        yield optimizer(1, step=i, cls=cls, lr=[rates[i]])
        yield param(2, "fc.weight", value, step=i, grad=gradient, update_norm=update, sampled=n)
        yield closing(i)


def rate_for(share, rms=0.02, half_ulp=2.0**-9):
    """The rate that loses a share of normal weights: the quantile of their size."""
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - math.erf(middle / math.sqrt(2)) > share else (low, middle)
    return low * rms * half_ulp


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"lr": rate_for(0.51)}, 1),
        ({"lr": rate_for(0.49)}, 0),
        ({"lr": rate_for(0.51, half_ulp=2.0**-12), "dtype": "float16"}, 1),
        ({"lr": rate_for(0.49, half_ulp=2.0**-12), "dtype": "float16"}, 0),
        ({"dtype": "float32"}, 0),
        ({"shape": (100,)}, 0),
        ({"cls": "Muon"}, 0),
        ({"cls": "SGD", "grad": 1.0}, 1),
        ({"cls": "SGD", "grad": 100.0, "lr": 1e-3}, 0),
        ({"grad": None}, 0),
        ({"grad": 0.0}, 0),
        ({"update": 1.01e-4}, 0),
        ({"update": 0.99e-4}, 1),
        ({"lr": 0.0}, 0),
        ({"lr": math.nan}, 0),
        ({"lr": [1e-6, 2e-6, 3e-6, 4e-6, 5e-6]}, 0),
    ],
)
def test_thresholds(changes, count):
    assert len(find(steps(5, **changes), "TT503")) == count
    assert find(steps(4, **{**changes, "lr": 1e-5}), "TT503") == []


def ranges(**counts):
    """`ranges(r7=5)`: five weights from 2 ** -8 up to 2 ** -4."""
    return tuple(counts.get(f"r{i}", 0) for i in range(16))


# A rate at the lower end of range 7: what lies in it and beyond is lost, what lies below is not.
EDGE = 2.0**-8 * 2.0**-9


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"exponents": ranges(r6=49, r7=51)}, 1),
        ({"exponents": ranges(r6=50, r7=50)}, 0),
        ({"exponents": ranges(r5=95, r9=5), "rms": 1.0}, 0),  # normal, 100 % of them were lost
        ({"exponents": ranges(r7=100), "rms": 2.0**-8}, 1),  # normal, it were 32 %
        ({"exponents": ranges(r6=4, r7=96), "zeros": 50}, 0),
        ({"exponents": ranges(r6=4, r7=96), "zeros": 47}, 1),
        ({"exponents": ranges(r6=50, r7=50)[:15], "rms": 1.0}, 1),  # no such counts
    ],
)
def test_exponents_bound_how_many_are_lost(changes, count):
    assert len(find(steps(5, lr=EDGE, **changes), "TT503")) == count


def test_zeros_take_any_update():
    assert find(steps(5, zeros=55), "TT503") == []
    assert len(find(steps(5, zeros=20), "TT503")) == 1


def test_few_large_weights_do_not_stand_for_the_many(monkeypatch):
    """Nine in ten are far smaller than the rms: they do move, which the exponents know."""

    def program():
        model = LanguageModel().to(torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_().mul_(torch.where(torch.rand(p.shape) < 0.9, 1e-5, 0.05))
        optimizer = adamw(model.parameters(), 1e-5)
        for _ in range(6):
            optimizer.zero_grad()
            next_word_loss(model, sentences()).backward()
            optimizer.step()

    assert find_live(program, "TT503") == []
    monkeypatch.setattr(stats, "LEAST", 10**9)
    monkeypatch.setattr(stats, "_CLOSELY", stats._FULLY)
    assert len(find_live(program, "TT503")) == 1


def test_empty_run_is_silent():
    assert find([], "TT503") == []
    assert find([closing()], "TT503") == []
