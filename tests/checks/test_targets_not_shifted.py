from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.checks.traced import find_live

CODE = "TT617"
CLASSES, WIDTH, LENGTH = 20, 16, 8
pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"),
    reason="this torch does not tell what unpacks a saved tensor",
)


class Block(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), attend
        self.heads, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unsqueeze(1) for part in self.heads(self.norm(x)).chunk(3, -1))
        x = x + self.last(self.attend(q, k, v).squeeze(1))
        return x + F.gelu(self.last(x))


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def both_ways(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q, k, v):
    scores = q @ k.transpose(-2, -1) / WIDTH**0.5
    ones = torch.ones(q.shape[-2], q.shape[-2])
    return scores.masked_fill(ones.tril() == 0, float("-inf")).softmax(-1) @ v


def by_mask(q, k, v):
    mask = torch.full((q.shape[-2], q.shape[-2]), float("-inf")).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_sum(q, k, v):
    scores = q @ k.transpose(-2, -1) / WIDTH**0.5
    mask = torch.full((q.shape[-2], q.shape[-2]), -1e9).triu(1)
    return F.dropout(F.softmax(scores + mask, -1), 0.1) @ v


def with_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)


class Model(nn.Module):
    """A small GPT, which computes its loss itself if it is given targets."""

    def __init__(self, attend=causal, shift=None, again=False):
        super().__init__()
        self.tokens = nn.Embedding(CLASSES, WIDTH)
        self.places = nn.Embedding(LENGTH + 1, WIDTH)
        self.drop, self.blocks = nn.Dropout(0.1), nn.ModuleList(Block(attend) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.shift, self.again = shift, again

    def forward(self, tokens, targets=None):
        x = self.tokens(tokens)
        x = self.shift(x) if self.shift is not None else x
        x = self.drop(x + self.places(torch.arange(x.shape[1])))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else cross_entropy(logits, targets)


class Encoder(nn.Module):
    """As PyTorch's tutorial has it, in which the mask is given."""

    def __init__(self, **options):
        super().__init__()
        self.embed, self.options = nn.Embedding(CLASSES, WIDTH), options
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens, mask=None):
        return self.head(self.encoder(self.embed(tokens), mask=mask, **self.options))


def cross_entropy(logits, targets, **options):
    return F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1), **options)


def training(build, loss_of, batch=lambda: torch.randint(CLASSES, (4, LENGTH)), steps=4):
    def run():
        model = build()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            adam.zero_grad()
            loss_of(model, batch()).backward()
            adam.step()

    return run


def plain(model, tokens):
    return cross_entropy(model(tokens), tokens)


def of_the_loader(model, tokens):
    """Labels that are a tensor of their own."""
    labels = torch.tensor(tokens.tolist())
    return cross_entropy(model(tokens), labels)


def classes_second(model, tokens):
    return nn.CrossEntropyLoss(label_smoothing=0.1)(model(tokens).transpose(1, 2), tokens)


def masked(model, tokens):
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return cross_entropy(model(tokens, mask), tokens)


def masked_by_truth(model, tokens):
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()
    return cross_entropy(model(tokens, mask), tokens)


FAULTS = {
    "plain": (Model, plain),
    "loader": (Model, of_the_loader),
    "inside": (Model, lambda model, tokens: model(tokens, tokens.clone())),
    "classes second": (Model, classes_second),
    "by hand": (lambda: Model(by_hand), plain),
    "by mask": (lambda: Model(by_mask), plain),
    "by sum": (lambda: Model(by_sum), plain),
    "with dropout": (lambda: Model(with_dropout), plain),
    "tutorial": (Encoder, masked),
    "tutorial with truth": (Encoder, masked_by_truth),
}


@pytest.mark.parametrize(("build", "loss_of"), FAULTS.values(), ids=FAULTS.keys())
def test_model_that_is_asked_for_what_it_sees_is_told_once(build, loss_of):
    (found,) = find_live(training(build, loss_of), CODE)
    assert (found.severity, found.step, found.value) == ("warning", 1, 2)
    assert "each at its own place" in found.message
    assert "tokens[:, 1:]" in found.fix


def shifted(model, tokens):
    return cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])


def shifted_before(model, tokens):
    return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def rolled(model, tokens):
    return cross_entropy(model(tokens), tokens.roll(-1, 1))


def padded(model, tokens):
    """As models of transformers shift the labels that they are given."""
    return cross_entropy(model(tokens), F.pad(tokens, (0, 1), value=-100)[:, 1:])


def some(model, tokens):
    """As BERT: a part of the input is hidden, and that alone is asked for."""
    hidden = torch.rand(tokens.shape) < 0.3
    return cross_entropy(model(tokens.masked_fill(hidden, 0)), tokens.masked_fill(~hidden, -100))


def noisy(model, tokens):
    """A causal model that is to correct what it sees."""
    spoilt = torch.rand(tokens.shape) < 0.3
    return cross_entropy(model(tokens.masked_fill(spoilt, 1)), tokens)


def first_is_empty(x):
    """The model shifts by itself: before the first token stands nothing."""
    return F.pad(x, (0, 0, 1, -1))


def first_is_learnt(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def rolls(x):
    return x.roll(1, 1)


SILENT = {
    "shifted": (Model, shifted),
    "shifted before": (Model, shifted_before),
    "rolled": (Model, rolled),
    "padded": (Model, padded),
    "some": (lambda: Model(both_ways), some),
    "some, causal": (Model, some),
    "noisy": (Model, noisy),
    "autoencoder": (lambda: Model(both_ways), plain),
    "tutorial without a mask": (Encoder, plain),
    "embedding alone": (
        lambda: nn.Sequential(nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES)), plain
    ),
    "shifts inside by padding": (lambda: Model(shift=first_is_empty), plain),
    "shifts inside by cat": (lambda: Model(shift=first_is_learnt), plain),
    "rolls inside": (lambda: Model(shift=rolls), plain),
    "tutorial, shifted": (Encoder, lambda m, t: masked(lambda x, y: m(x, y).roll(1, 1), t)),
}  # fmt: skip


@pytest.mark.parametrize(("build", "loss_of"), SILENT.values(), ids=SILENT.keys())
def test_what_is_shifted_or_not_causal_is_silent(build, loss_of):
    assert find_live(training(build, loss_of), CODE) == []


@pytest.mark.parametrize(
    "batch",
    [
        lambda: torch.randint(CLASSES, (4, 1)).expand(4, LENGTH).contiguous(),
        lambda: torch.randint(CLASSES, (4, 1)),
        lambda: torch.zeros(4, LENGTH, dtype=torch.long),
    ],
)
def test_rows_of_one_token_are_shifted_or_not(batch):
    assert find_live(training(Model, plain, batch), CODE) == []


def test_two_losses_of_one_line_are_needed():
    assert find_live(training(Model, plain, steps=1), CODE) == []
    assert len(find_live(training(Model, plain, steps=2), CODE)) == 1


def test_nothing_is_run_again_to_look_at_what_a_checkpoint_has_saved():
    """The tokens and targets of a model in a checkpoint can only be had by running it again."""
    runs = 0

    class Counted(Model):
        def forward(self, tokens, targets=None):
            nonlocal runs
            runs += 1
            return super().forward(tokens, targets)

    def inside(model, tokens):
        return checkpoint(model, tokens, tokens, use_reentrant=False)

    assert find_live(training(Counted, inside, steps=3), CODE) == []
    assert runs == 6


def test_blocks_in_checkpoints_are_no_obstacle_where_one_is_in_none():
    class Half(Model):
        def forward(self, tokens, targets=None):
            x = self.blocks[0](self.tokens(tokens))
            return self.head(checkpoint(self.blocks[1], x, use_reentrant=False))

    assert len(find_live(training(Half, plain), CODE)) == 1
