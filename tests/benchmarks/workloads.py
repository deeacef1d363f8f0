"""The four training loops of which the cost of tracing is stated.

They differ in what a step is made of: few large tensors (mlp), many middling ones (resnet, gpt2),
and hundreds of tiny ones between which nothing else happens (lstm), which is the worst case.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Workload:
    """A model with its data; `step` trains it once, `forward` only runs it.

    `steps` are timed in one go, so that a turn of any workload lasts some tenths of a
    second or more.
    """

    name: str
    steps: int
    model: nn.Module
    inputs: torch.Tensor
    forward: Callable[[], torch.Tensor]
    step: Callable[[], None]


NAMES = ("mlp", "resnet", "gpt2", "lstm")
MLP_WIDTHS = (64, 128, 256, 512, 1024, 2048, 3072)
# Width, texts, tokens of each.
GPT2_SIZES = ((32, 1, 16), (64, 2, 32), (128, 2, 64), (192, 4, 64), (256, 4, 128), (384, 6, 128))


def build(name: str) -> Workload:
    """Make a workload, seeded: two of the same name start equal."""
    torch.manual_seed(0)
    return {"mlp": _mlp, "resnet": _resnet, "gpt2": _gpt2, "lstm": _lstm}[name]()


def build_mlp(width: int) -> Workload:
    """Make the MLP of another width, seeded."""
    torch.manual_seed(0)
    return _mlp(width)


def build_gpt2(width: int, texts: int, tokens: int) -> Workload:
    """Make the GPT-2 of another size, in plain torch, seeded."""
    torch.manual_seed(0)
    return _transformer(_PlainGPT2(8192, tokens, width, 6, width // 32), (texts, tokens))


def gpt2_origin() -> str:
    """Say which GPT-2 is run."""
    return "transformers" if _has_transformers() else "written in plain torch"


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _workload(
    name_steps: tuple[str, int],
    model: nn.Module,
    inputs: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> Workload:
    def forward() -> torch.Tensor:
        output: Any = model(inputs)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits

    def step() -> None:
        loss_of(forward()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Workload(*name_steps, model, inputs, forward, step)


def _mlp(width: int = 1024) -> Workload:
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(width, width), nn.ReLU())))
    x, y = torch.randn(64, width), torch.randn(64, width)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    return _workload(("mlp", 10), model, x, optimizer, lambda out: F.mse_loss(out, y))


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        h += x if self.downsample is None else self.downsample(x)
        return self.relu(h)


def _resnet() -> Workload:
    """ResNet-18 as in torchvision, 100 classes."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    width = 64
    for planes, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers.append(nn.Sequential(_Block(width, planes, stride), _Block(planes, planes, 1)))
        width = planes
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))
    x, y = torch.randn(16, 3, 64, 64), torch.randint(100, (16,))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    return _workload(("resnet", 3), model, x, optimizer, lambda out: F.cross_entropy(out, y))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.mlp_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.c_fc, self.act = nn.Linear(width, 4 * width), nn.GELU("tanh")
        self.mlp_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(width, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + self.attn_drop(self.attn_proj(mixed))
        return x + self.mlp_drop(self.mlp_proj(self.act(self.c_fc(self.ln_2(x)))))


class _PlainGPT2(nn.Module):
    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


def _gpt2() -> Workload:
    """Six layers of 384, vocabulary 8192, four texts of 128 tokens."""
    model: nn.Module
    if _has_transformers():
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=8192, n_positions=128, n_embd=384, n_layer=6, n_head=6, use_cache=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        model = GPT2LMHeadModel(config).train()
    else:
        model = _PlainGPT2(8192, 128, 384, 6, 6)
    return _transformer(model, (4, 128))


def _transformer(model: nn.Module, shape: tuple[int, int]) -> Workload:
    ids = torch.randint(8192, shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return _workload(("gpt2", 3), model, ids, optimizer, loss_of)


class _Unrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = torch.zeros(len(x), 64, device=x.device)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


def _lstm() -> Workload:
    """A cell of 64, unrolled 100 times."""
    model = _Unrolled()
    x, y = torch.randn(16, 100, 64), torch.randint(10, (16,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return _workload(("lstm", 10), model, x, optimizer, lambda out: F.cross_entropy(out, y))
