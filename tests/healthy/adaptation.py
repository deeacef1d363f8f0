"""Networks of which only a part is trained: frozen, adapted, averaged, distilled."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.healthy import healthy
from tests.healthy.data import PAD, images, loader, sentences
from tests.healthy.language import LanguageModel, next_word_loss
from tests.healthy.vision import convnet


def pretrained_convnet() -> nn.Sequential:
    """A few steps are enough for statistics that are not those of a fresh network."""
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in loader():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@healthy
def frozen_backbone(steps: int) -> None:
    """Feature extraction: the backbone is frozen and in eval mode, the head is new."""
    backbone = pretrained_convnet()[:-2]
    backbone.requires_grad_(False)
    backbone.eval()
    head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = images(16)
        with torch.no_grad():
            features = backbone(x)
        optimizer.zero_grad()
        F.cross_entropy(head(features), y).backward()
        optimizer.step()


@healthy
def fine_tuning_with_frozen_batch_norm(steps: int) -> None:
    """All weights are trained, at two rates; the norms keep their statistics in eval mode."""
    model = pretrained_convnet()
    model.train()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
    body = [p for p in model[:-1].parameters() if p.requires_grad]
    groups = [{"params": body, "lr": 1e-3}, {"params": model[-1].parameters(), "lr": 1e-2}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for _ in range(steps):
        x, y = images(16)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@healthy
def gradual_unfreezing(steps: int) -> None:
    """The head alone at first; halfway the rest joins the optimizer as a group of its own."""
    model = pretrained_convnet()
    model[:-1].requires_grad_(False)
    optimizer = torch.optim.Adam(model[-1].parameters(), lr=1e-2)
    for i in range(steps):
        if i == steps // 2:
            model.requires_grad_(True)
            optimizer.add_param_group({"params": model[:-1].parameters(), "lr": 1e-3})
        x, y = images(16)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class LoRA(nn.Module):
    """A frozen linear layer plus a product of two thin ones, of which one starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


@healthy
def low_rank_adaptation(steps: int) -> None:
    model = LanguageModel().requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.out = LoRA(block.qkv), LoRA(block.out)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        loss = next_word_loss(model, sentences())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@healthy
def prompt_tuning(steps: int) -> None:
    """Only a few virtual words are trained, in front of a frozen model in eval mode."""
    model = LanguageModel().requires_grad_(False).eval()
    prompt = nn.Parameter(0.02 * torch.randn(2, 16))
    optimizer = torch.optim.Adam([prompt], lr=0.1)
    for _ in range(steps):
        tokens = sentences(length=10)
        x = torch.cat([prompt.expand(len(tokens), -1, -1), model.embed(tokens[:, :-1])], dim=1)
        x = x + model.position(torch.arange(x.shape[1]))
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.norm(x))[:, 2:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def averaged_teacher(steps: int) -> None:
    """Mean teacher: the average of the student's weights judges data without labels."""
    student = convnet()
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for i in range(steps):
        x, y = images(16)
        unlabelled, _ = images(16)
        with torch.no_grad():
            soft = teacher(unlabelled).softmax(1)
        seen = student(unlabelled + 0.1 * torch.randn_like(unlabelled))
        agree = F.mse_loss(seen.softmax(1), soft)
        loss = F.cross_entropy(student(x), y) + min(1.0, i / 10) * agree
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)


@healthy
def distillation(steps: int) -> None:
    """A teacher in eval mode, temperature, KL between log-probabilities and probabilities."""
    teacher, student = pretrained_convnet().eval(), convnet(4)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = images(16)
        with torch.no_grad():
            hints = teacher(x)
        logits = student(x)
        soft = F.kl_div((logits / 2).log_softmax(1), (hints / 2).softmax(1), reduction="batchmean")
        loss = 0.5 * F.cross_entropy(logits, y) + 0.5 * 4 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def perceptual_loss(steps: int) -> None:
    """A frozen network that the gradient passes through on its way to another."""
    features = pretrained_convnet()[:6].eval().requires_grad_(False)
    painter = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))
    optimizer = torch.optim.Adam(painter.parameters(), lr=3e-3)
    for _ in range(steps):
        x, _ = images(8)
        made = painter(x + 0.3 * torch.randn_like(x))
        loss = F.l1_loss(made, x) + F.mse_loss(features(made), features(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def self_supervision_without_negatives(steps: int) -> None:
    """BYOL: a predictor learns to say what a slow copy of the encoder sees."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.BatchNorm1d(32), nn.ReLU(),
                            nn.Linear(32, 8))  # fmt: skip
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.Adam([*student.parameters(), *predictor.parameters()], lr=1e-3)
    for _ in range(steps):
        x, _ = images(16)
        guess = F.normalize(predictor(student(x + 0.1 * torch.randn_like(x))), dim=1)
        with torch.no_grad():
            seen = F.normalize(teacher(x), dim=1)
        loss = (2 - 2 * (guess * seen).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.mul_(0.99).add_(fast, alpha=0.01)
