"""Networks over images: classifiers, segmentation, pruning to int8, autoencoders."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.healthy import healthy
from tests.healthy.data import images, loader


def convnet(width: int = 8, dropout: float = 0.2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width, 4),
    )  # fmt: skip


@healthy
def classifier_with_dropout_and_evaluation(steps: int) -> None:
    """Epochs over a loader, a scheduler, validation without gradients, the best state kept."""
    model, train, valid = convnet(), loader(), loader(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    best, kept = float("inf"), model.state_dict()
    for _ in range(max(1, steps // (len(train) + len(valid)))):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()
        total = correct = 0.0
        with torch.no_grad():
            for x, y in valid:
                logits = model(x)
                total += F.cross_entropy(logits, y, reduction="sum").item()
                correct += (logits.argmax(1) == y).float().mean().item()
        schedule.step(total)
        if total < best:
            best, kept = total, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)


@healthy
def training_that_has_converged(steps: int) -> None:
    """All is learnt after a few steps; loss and gradients go on towards zero."""
    x, y = images(16)
    model = convnet(dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(out)))


class ResNet(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@healthy
def zero_initialised_residual_branches(steps: int) -> None:
    model, data = ResNet(), loader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
    done = 0
    while done < steps:
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            if (done := done + 1) >= steps:
                break


def train_with_checkpoints(steps: int, reentrant: bool) -> None:
    stem, head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
    blocks = nn.ModuleList(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(),
                      nn.Dropout(0.1)) for _ in range(3)
    )  # fmt: skip
    model = nn.ModuleList([stem, blocks, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = images(16)
        x = stem(x)
        for block in blocks:
            x = x + checkpoint(block, x, use_reentrant=reentrant)
        loss = F.cross_entropy(head(x.mean((2, 3))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def activation_checkpoints(steps: int) -> None:
    train_with_checkpoints(steps, reentrant=False)


@healthy
def activation_checkpoints_reentrant(steps: int) -> None:
    train_with_checkpoints(steps, reentrant=True)


@healthy
def quantization_aware_training(steps: int) -> None:
    """Fake quantization from the tenth step on, observers frozen near the end."""
    quant = torch.ao.quantization
    model = nn.Sequential(
        quant.QuantStub(),
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
        quant.DeQuantStub(),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it moves to another package
        model.qconfig = quant.get_default_qat_qconfig("x86")
        model = quant.prepare_qat(quant.fuse_modules_qat(model, [["1", "2"], ["4", "5"]]).train())
    model.apply(quant.disable_fake_quant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for i in range(steps):
        if i == steps // 3:
            model.apply(quant.enable_fake_quant)
        if i == steps - 5:
            model.apply(quant.disable_observer)
        x, y = images(16)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.1))
        self.down2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * width),
            nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Conv2d(2 * width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        return self.head(torch.cat([fine, self.up(self.down2(fine))], dim=1))


@healthy
def segmentation_with_ignored_border(steps: int) -> None:
    """Cross entropy with an ignored label and class weights, beside a soft Dice loss."""
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weight = torch.tensor([0.5, 1.0, 1.0])
    for _ in range(steps):
        x, _ = images(8)
        target = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        target[:, 0] = target[:, -1] = 255
        logits = model(x)
        known = (target != 255)[:, None]
        onehot = F.one_hot(target.clamp(max=2), 3).movedim(-1, 1) * known
        probs = logits.softmax(1) * known
        overlap = (2 * (probs * onehot).sum((0, 2, 3)) + 1) / ((probs + onehot).sum((0, 2, 3)) + 1)
        entropy = F.cross_entropy(logits, target, weight=weight, ignore_index=255)
        loss = entropy + 1 - overlap.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def denoising_diffusion(steps: int) -> None:
    """Predicts the noise at a random time, with an embedding of the time."""
    time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 8))
    inp, mid = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    out = nn.Conv2d(8, 1, 3, padding=1)
    nn.init.zeros_(out.weight)
    model = nn.ModuleList([time, inp, mid, out])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    kept = torch.linspace(0.999, 0.01, 50)
    for _ in range(steps):
        x, _ = images(16)
        when = torch.randint(50, (16,))
        share = kept[when].view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        noisy = share.sqrt() * x + (1 - share).sqrt() * noise
        hidden = F.silu(inp(noisy) + time(when[:, None] / 50)[..., None, None])
        loss = F.mse_loss(out(F.silu(mid(hidden) + hidden)), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def variational_autoencoder_with_summed_loss(steps: int) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 8))
    decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 144))
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for i in range(steps):
        x = images(16)[0].flatten(1).sigmoid()
        mean, logvar = encoder(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        drawn = F.binary_cross_entropy_with_logits(decoder(code), x, reduction="sum")
        divergence = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()
        loss = drawn + min(1.0, i / 10) * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def contrastive_learning_with_momentum_teacher(steps: int) -> None:
    """MoCo: two views, InfoNCE on normalised features, a teacher that follows slowly."""

    def encoder() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.Flatten(), nn.Linear(200, 16))  # fmt: skip

    student, teacher = encoder(), encoder()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9)
    queue = F.normalize(torch.randn(64, 16), dim=1)
    for _ in range(steps):
        x, _ = images(16)
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            key = F.normalize(teacher(x.flip(-1)), dim=1)
        query = F.normalize(student(x + 0.1 * torch.randn_like(x)), dim=1)
        same = (query * key).sum(1, keepdim=True)
        logits = torch.cat([same, query @ queue.T], dim=1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(16, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([key, queue])[:64]


@healthy
def multi_label_with_heads_of_their_own(steps: int) -> None:
    """Two heads, three losses that are summed, BCE with logits and positive weights."""
    trunk = convnet()[:-1]
    labels, side = nn.Linear(16, 4), nn.Linear(16, 1)
    optimizer = torch.optim.RMSprop(
        [*trunk.parameters(), *labels.parameters(), *side.parameters()], lr=1e-3
    )
    for _ in range(steps):
        x, y = images(16)
        hidden = trunk(x)
        wanted = F.one_hot(y, 4).float()
        entropy = F.binary_cross_entropy_with_logits(
            labels(hidden), wanted, pos_weight=torch.full((4,), 3.0)
        )
        row = F.smooth_l1_loss(side(hidden).squeeze(1), y.float() / 4)
        loss = entropy + 0.5 * row + 1e-3 * hidden.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
