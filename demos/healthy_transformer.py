"""A character-level transformer learns this repository's README: nothing is wrong with it.

You will see the summary line only. Its causal mask is full of -inf, on purpose, and no finding.

Expect: nothing
"""

import sys
from pathlib import Path

import torch
from torch import nn

from tensortrace import trace

CONTEXT, WIDTH = 32, 32
TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


class CharTransformer(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, batch_first=True, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight
        return self.head(self.norm(self.encoder(x, mask=self.mask, is_causal=True)))


def main():
    torch.manual_seed(0)
    characters = sorted(set(TEXT))
    text = torch.tensor([characters.index(c) for c in TEXT])
    model = CharTransformer(len(characters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with trace(*sys.argv[1:]):
        for step in range(40):
            starts = torch.randint(len(text) - CONTEXT, (8, 1))
            window = text[starts + torch.arange(CONTEXT + 1)]
            logits = model(window[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 9:
                print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
