from __future__ import annotations

import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn

from tests.checks import brief, closing, find, module, optimizer, row
from tests.checks.traced import find_live
from tests.healthy.data import images, sentences
from tests.healthy.language import WORDS, Block, next_word_loss


class Decoder(nn.Module):
    """A small language model whose blocks are kept as `keep` makes it."""

    def __init__(self, keep):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.blocks = keep([Block(16) for _ in range(3)])

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train_decoder(keep, held=lambda model: model.parameters()):
    def program():
        model = Decoder(keep)
        adam = torch.optim.Adam(held(model), lr=1e-3)
        for _ in range(6):
            next_word_loss(model, sentences()).backward()
            adam.step()
            adam.zero_grad()

    return program


def test_blocks_in_a_plain_list_are_one_finding_and_a_module_list_is_silent():
    (found,) = find_live(train_decoder(list), "TT401", "TT406")
    assert brief([found]) == [("TT406", "warning", "Block")]
    assert (found.step, found.value) == (3, 3 * len(list(Block(16).parameters())))
    assert found.message.startswith("3 modules (Block) run inside")
    assert "block(x)" in found.location.code
    assert "ModuleList" in found.fix
    assert find_live(train_decoder(nn.ModuleList), "TT401", "TT406") == []


def test_list_whose_parameters_the_optimizer_got_is_silent():
    def everything(model):
        return [*model.parameters(), *(p for b in model.blocks for p in b.parameters())]

    assert find_live(train_decoder(list, everything), "TT401", "TT406") == []


def test_teacher_hidden_in_a_list_on_purpose_is_silent():
    def hidden(blocks):
        return [block.requires_grad_(False) for block in blocks]

    assert find_live(train_decoder(hidden), "TT406") == []


class Classifier(nn.Module):
    """A convolution and a head that is made at the first call, or in each."""

    def __init__(self, *, anew):
        super().__init__()
        self.stem, self.anew = nn.Conv2d(1, 4, 3), anew
        self.norm = self.head = None

    def forward(self, x):
        x = F.relu(self.stem(x)).flatten(1)
        if self.anew:
            return nn.Linear(x.shape[1], 4)(x)
        if self.head is None:
            self.norm = nn.LayerNorm(x.shape[1])
            x = self.norm(x)
            self.head = nn.Linear(x.shape[1], 4)
            return self.head(x)
        return self.head(self.norm(x))


def train_classifier(*, anew):
    def program():
        model = Classifier(anew=anew)
        if not anew:
            model(images(2)[0])
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(6):
            x, y = images(8)
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            sgd.zero_grad()

    return program


def test_layer_made_in_each_forward_is_told():
    (found,) = find_live(train_classifier(anew=True), "TT401", "TT406")
    assert brief([found]) == [("TT406", "warning", "Linear")]
    assert "not in forward" in found.fix


def test_layers_made_at_the_first_call_are_registered():
    assert find_live(train_classifier(anew=False), "TT401", "TT406") == []


def steps(count=6, *, registered=False, held=("stem.weight",), **changes):
    yield module("stem", "weight")
    for path in ("Linear", "Linear.inner"):
        made = module(path, "weight", training=changes.get("training", True))
        yield structs.replace(made, registered=registered or path != "Linear")
    for step in range(count):
        yield optimizer(step=step, parameters=list(held) if not step else None)
        rms = {"stem": 1.0, "Linear": changes.get("rms", 1.0), "Linear.inner": 1.0}
        yield closing(step, modules=row(param_grad_rms=rms))


def test_what_it_holds_itself_counts_with_it_and_four_steps_are_the_limit():
    (found,) = find(steps(4), "TT406")
    assert (found.step, found.module, found.value) == (3, "Linear", 2)
    assert found.evidence["parameters"] == ["Linear.weight", "Linear.inner.weight"]
    assert find(steps(3), "TT406") == []
    assert len(find(steps(3), "TT406", updates=3)) == 1


def test_registered_held_evaluated_and_absent_modules_are_silent():
    both = ("stem.weight", "Linear.weight", "Linear.inner.weight")
    assert find(steps(registered=True), "TT406") == []
    assert find(steps(held=both), "TT406") == []
    assert find(steps(0), "TT406") == []
    assert find([], "TT406") == []
