"""Language models and other networks over sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from tests.healthy import healthy
from tests.healthy.data import PAD, sentences

WORDS = 20


class Encoder(nn.Module):
    """Tells whether a padded sentence begins with a low word."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=PAD)
        self.position = nn.Parameter(0.02 * torch.randn(12, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PAD
        hidden = self.encoder(
            self.embed(tokens) + self.position[: tokens.shape[1]], src_key_padding_mask=padding
        )
        kept = hidden.masked_fill(padding[..., None], 0.0)
        return self.head(kept.sum(1) / (~padding).sum(1, keepdim=True))


@healthy
def encoder_with_padding_mask(steps: int) -> None:
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        tokens = sentences()
        loss = F.cross_entropy(model(tokens), (tokens[:, 0] > 10).long(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


class Block(nn.Module):
    """Causal attention with a mask of -inf, written out."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )

    def attend(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Word embedding and output share one weight."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=PAD)
        self.position = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_word_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


@healthy
def tied_language_model_with_padding(steps: int) -> None:
    model = LanguageModel()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(steps):
        loss = next_word_loss(model, sentences())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


@healthy
def language_model_with_generation(steps: int) -> None:
    """Samples words every ten steps, as one does to look at the progress."""
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in range(steps):
        model.train()
        optimizer.zero_grad()
        next_word_loss(model, sentences()).backward()
        optimizer.step()
        if i % 10 == 9:
            model.eval()
            tokens = torch.ones(2, 1, dtype=torch.long)
            with torch.inference_mode():
                for _ in range(6):
                    logits = model(tokens)[:, -1]
                    lowest = logits.topk(5).values[:, -1:]
                    probs = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
                    tokens = torch.cat([tokens, torch.multinomial(probs, 1)], dim=1)


@healthy
def sequence_to_sequence(steps: int) -> None:
    """`nn.Transformer` with a causal and two padding masks, teacher forcing, warm-up."""
    embed = nn.Embedding(WORDS, 16, padding_idx=PAD)
    model = nn.ModuleDict({
        "embed": embed,
        "transformer": nn.Transformer(16, 2, 1, 1, 32, dropout=0.1, batch_first=True),
        "head": nn.Linear(16, WORDS),
    })  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 20))
    for _ in range(steps):
        source = sentences(length=8)
        target = torch.cat([torch.full((8, 1), WORDS - 1), source.flip(1)], dim=1)
        given, wanted = target[:, :-1], target[:, 1:]
        hidden = model["transformer"](
            embed(source), embed(given),
            tgt_mask=torch.ones(8, 8, dtype=torch.bool).triu(1),
            src_key_padding_mask=source == PAD, memory_key_padding_mask=source == PAD,
            tgt_is_causal=True,
        )  # fmt: skip
        logits = model["head"](hidden)
        loss = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()


class CharLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, dropout=0.1)
        self.head = nn.Linear(16, WORDS)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        hidden, state = self.lstm(self.embed(tokens), state)
        return self.head(hidden), state


@healthy
def truncated_backpropagation_through_time(steps: int) -> None:
    """A long text in chunks; the hidden state goes on, detached."""
    model = CharLSTM()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    text = 1 + (torch.arange(8 * steps + 1)[:, None] * torch.tensor([1, 2, 3])) % (WORDS - 1)
    state = None
    for i in range(steps):
        chunk = text[8 * i : 8 * i + 9]
        if state is not None:
            state = tuple(s.detach() for s in state)
        logits, state = model(chunk[:-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1), chunk[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()


@healthy
def tagger_with_summed_loss(steps: int) -> None:
    """A GRU over packed sentences; the loss is a sum over all words, not a mean."""
    embed, gru = nn.Embedding(WORDS, 12), nn.GRU(12, 12, bidirectional=True, batch_first=True)
    head = nn.Linear(24, 2)
    model = nn.ModuleList([embed, gru, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        tokens = sentences(16)
        lengths = (tokens != PAD).sum(1)
        packed = rnn.pack_padded_sequence(
            embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = rnn.pad_packed_sequence(gru(packed)[0], batch_first=True)
        tags = torch.where(tokens == PAD, -100, tokens % 2)[:, : hidden.shape[1]]
        loss = F.cross_entropy(head(hidden).flatten(0, 1), tags.flatten(), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def speech_with_ctc(steps: int) -> None:
    model = nn.Sequential(nn.Conv1d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 8, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        words = torch.randint(1, 6, (4, 5))
        sound = F.one_hot(words, 6).float().repeat_interleave(4, dim=1).transpose(1, 2)
        heard = model(sound + 0.1 * torch.randn_like(sound)).permute(2, 0, 1).log_softmax(-1)
        loss = F.ctc_loss(heard, words, torch.full((4,), 20), torch.full((4,), 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def skip_gram_with_sparse_embedding(steps: int) -> None:
    """Word vectors with negative sampling: sparse gradients, `SparseAdam`, logits and BCE."""
    center, around = nn.Embedding(200, 8, sparse=True), nn.Embedding(200, 8, sparse=True)
    nn.init.uniform_(center.weight, -0.06, 0.06)
    nn.init.zeros_(around.weight)
    optimizer = torch.optim.SparseAdam([*center.parameters(), *around.parameters()], lr=0.02)
    for _ in range(steps):
        word = torch.randint(200, (32, 1))
        context = torch.cat([(word + 1) % 200, torch.randint(200, (32, 4))], dim=1)
        scores = (center(word) * around(context)).sum(-1)
        wanted = torch.zeros_like(scores)
        wanted[:, 0] = 1.0
        loss = F.binary_cross_entropy_with_logits(scores, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Mixture(nn.Module):
    """Sends each row to the best of its experts; some experts get no row for a while."""

    def __init__(self, width: int = 8, experts: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.gate(x).softmax(-1)
        weight, chosen = probs.max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        load = F.one_hot(chosen, len(self.experts)).float().mean(0)
        return x + out, len(self.experts) * (load * probs.mean(0)).sum()


@healthy
def mixture_of_experts_with_idle_experts(steps: int) -> None:
    model = nn.ModuleDict({"inp": nn.Linear(2, 8), "moe": Mixture(), "out": nn.Linear(8, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x = torch.randn(6, 2)
        hidden, balance = model["moe"](model["inp"](x))
        loss = F.cross_entropy(model["out"](hidden), (x[:, 0] > x[:, 1]).long()) + 0.01 * balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
