from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action, Step
from tests.builders import make_tensor
from tests.checks import brief, closing, find, module, optimizer, param, row
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss


def decayed(rate):
    """A language model with weight decay written by hand, of which the sign matters."""

    def program():
        model = LanguageModel()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(16):
            penalty = sum(p.square().sum() for p in model.parameters() if p.dim() > 1)
            sgd.zero_grad()
            (next_word_loss(model, sentences()) + rate * penalty).backward()
            sgd.step()

    return program


def test_weight_decay_of_the_wrong_sign_is_told_and_the_right_one_is_silent():
    (found,) = find_live(decayed(-2.0), "TT404")
    assert brief([found])[0][:2] == ("TT404", "warning")
    assert "times its first norm: rms * sqrt(fan-in) is" in found.message
    assert find_live(decayed(0.02), "TT404") == []


def shrunk(threshold):
    """Proximal L1: what is smaller than the threshold after a step becomes 0."""

    def program():
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)
        )
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(6):
            x, y = images(8)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() > 1:
                        p.copy_(F.softshrink(p, threshold))

    return program


@pytest.mark.parametrize(
    ("threshold", "said"),
    [(10.0, [("warning", "0")]), (0.008, [("note", "3")]), (1e-6, [])],
)
def test_a_threshold_that_wipes_out_a_layer_is_told_and_sparsity_is_a_note(threshold, said):
    found = find_live(shrunk(threshold), "TT404")
    assert [(f.severity, f.module) for f in found] == said
    if said:
        assert "have become exactly 0" in found[0].message


def steps(values, *, cls="Linear", kind="SGD", **changes):
    """A weight [4, 16] that is first ordinary, and then as `values` say for a step each."""
    yield module("fc", "weight", cls=cls, shape=(4, 16))
    for i, fields in enumerate([{"norm": 2.0}, *values]):
        yield optimizer(1, step=i, cls=kind)
        value = make_tensor(1, 4, 16, **{**fields, **changes})
        yield param(2, "fc.weight", value, step=i)
        yield closing(i)


@pytest.mark.parametrize(
    ("fields", "dtype", "severity"),
    [
        ({"zeros": 64}, "float32", "warning"),
        ({"zeros": 33}, "float32", "note"),
        ({"zeros": 33}, "float16", "warning"),
        ({"zeros": 32}, "float16", None),
        ({"norm": 100.2}, "float32", "warning"),
        ({"norm": 100.0}, "float32", None),  # 100 / sqrt(4) is the limit
    ],
)
def test_limits_and_three_full_steps(fields, dtype, severity):
    found = find(steps([fields] * 3, dtype=dtype), "TT404")
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert find(steps([fields] * 2, dtype=dtype), "TT404") == []
    assert find(steps([fields, {"norm": 2.0}] * 4, dtype=dtype), "TT404") == []


def test_what_was_so_from_the_start_and_embeddings_and_lbfgs_are_silent():
    zero = {"zeros": 60, "norm": 2.0}
    assert find(steps([zero] * 4, zeros=60), "TT404") == []
    assert find(steps([zero] * 4, cls="Embedding"), "TT404") == []
    assert find(steps([{"norm": 200.0}] * 4, kind="LBFGS"), "TT404") == []
    assert find(steps([{"norm": 200.0}] * 4, norm=200.0), "TT404") == []
    # 200 / sqrt(64) is 25: an embedding is not summed over.
    assert find(steps([{"norm": 200.0}] * 4, cls="Embedding"), "TT404") == []


def test_growth_in_steps_that_are_too_long_only_counts_under_those():
    def records(ratio):
        for one in steps([{"norm": 2.0}] * 5 + [{"norm": 200.0}] * 4):
            closes = isinstance(one, Step)
            columns = row(update_ratio={"fc": ratio})
            yield closing(one.step, modules=columns) if closes else one

    assert [f.code for f in find(records(0.01), "TT402", "TT404")] == ["TT404"]
    assert [f.code for f in find(records(0.9), "TT402", "TT404")] == ["TT402"]


def test_a_state_dict_that_is_loaded_starts_anew():
    records = list(steps([{"norm": 200.0}] * 4))
    loaded = Action(step=1, seq=0, action="load_state_dict")
    assert len(find(records, "TT404")) == 1
    assert find([*records[:4], loaded, *records[4:]], "TT404") == []
    assert find([], "TT404") == []
