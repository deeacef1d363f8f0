from __future__ import annotations

import pytest
import torch
from torch import nn

from tensortrace.records import Action
from tests.checks import closing, find
from tests.checks.traced import find_live
from tests.healthy.adaptation import LoRA
from tests.healthy.data import sentences
from tests.healthy.language import LanguageModel, next_word_loss


def fine_tune(prepare, *, wrap=None):
    """Load into a language model what `prepare` makes of a pretrained state, and train on."""

    def program():
        saved = nn.DataParallel(LanguageModel()).state_dict()
        model = LanguageModel()
        if wrap is not None:
            wrap(model)
        model.load_state_dict(prepare(saved, model), strict=False)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(2):
            next_word_loss(model, sentences()).backward()
            adam.step()
            adam.zero_grad()

    return program


def stripped(saved, model):
    return {name.removeprefix("module."): value for name, value in saved.items()}


def test_prefix_of_data_parallel_is_named_with_the_line_that_takes_it_off():
    (found,) = find_live(fine_tune(lambda saved, model: saved), "TT408")
    assert (found.step, found.severity, found.value) == (0, "error", 0)
    assert f"0 of the {len(LanguageModel().state_dict())} names" in found.message
    assert "those of the state dict begin with 'module.'" in found.message
    assert "k.removeprefix('module.')" in found.fix
    assert "strict=False" in found.location.code
    assert find_live(fine_tune(stripped), "TT408") == []


def test_prefix_on_the_side_of_the_module_is_named_too():
    def program():
        model = nn.DataParallel(LanguageModel())
        model.load_state_dict(LanguageModel().state_dict(), strict=False)
        next_word_loss(model, sentences()).backward()

    (found,) = find_live(program, "TT408")
    assert "those of the module begin with 'module.'" in found.message
    assert "'module.' + k" in found.fix


def test_filter_that_leaves_nothing_is_told():
    def keep_known(saved, model):
        known = model.state_dict()
        return {name: value for name, value in saved.items() if name in known}

    (found,) = find_live(fine_tune(keep_known), "TT408")
    assert found.severity == "error"
    assert "0 of the 0 names" in found.message


def test_adapters_alone_and_a_backbone_with_another_head_are_meant():
    def adapt(model):
        for block in model.blocks:
            block.qkv = LoRA(block.qkv)

    def adapters(saved, model):
        return {name: value for name, value in model.state_dict().items() if ".down." in name}

    def without_head(saved, model):
        state = stripped(saved, model)
        state["classifier.weight"] = state.pop("head.weight")
        return state

    assert find_live(fine_tune(adapters, wrap=adapt), "TT408") == []
    assert find_live(fine_tune(without_head), "TT408") == []


def load(matched, missing, unexpected, **detail):
    counts = {"matched": matched, "missing": missing, "unexpected": unexpected, "examples": []}
    yield Action(step=0, seq=0, action="load_state_dict", of="Net", detail={**counts, **detail})
    yield closing()


@pytest.mark.parametrize(
    ("counts", "severity"),
    [
        ((5, 5, 5), None),  # half of ten
        ((4, 6, 6), "warning"),
        ((4, 96, 4), None),  # half of the eight that were given
        ((3, 96, 5), "warning"),
        ((0, 1, 0), "error"),
        ((0, 0, 3), None),  # a module without state
        ((0, 0, 0), None),
    ],
)
def test_less_than_half_of_the_fewer_names_is_the_limit(counts, severity):
    assert [f.severity for f in find(load(*counts), "TT408")] == [severity] * bool(severity)


def test_limit_is_a_setting_and_other_actions_say_nothing():
    assert len(find(load(5, 5, 5), "TT408", least=0.6)) == 1
    assert find([Action(step=0, seq=0, action="fetch"), closing()], "TT408") == []
    assert find([], "TT408") == []
