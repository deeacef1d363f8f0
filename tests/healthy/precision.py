"""Training in less than 32 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.healthy import healthy
from tests.healthy.data import images
from tests.healthy.vision import convnet


@healthy
def scaler_that_skips(steps: int) -> None:
    """float16 with a scale that is too high at first and is raised every ten steps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=10)
    for _ in range(steps):
        x, y = images(16)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@healthy
def scaler_with_unscaled_clipping(steps: int) -> None:
    model = convnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=12)
    for _ in range(steps):
        x, y = images(16)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@healthy
def scaler_with_accumulation(steps: int) -> None:
    """Three micro-batches under one scale, then unscale, clip and step."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.GELU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for i in range(steps):
        x, y = images(8)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y) / 3
        scaler.scale(loss).backward()
        if i % 3 == 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)


@healthy
def bfloat16_with_scaler_turned_off(steps: int) -> None:
    model = convnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(steps):
        x, y = images(16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


@healthy
def double_precision(steps: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Softplus(), nn.Linear(16, 4))
    model.double()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for _ in range(steps):
        x, y = images(16)
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
