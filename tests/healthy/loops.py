"""Loops that take their steps in an unusual order or number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.healthy import healthy
from tests.healthy.data import line, loader, points


def perceptron(width: int = 16, outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                         nn.Linear(width, outputs))  # fmt: skip


@healthy
def gradient_accumulation(steps: int) -> None:
    """Four micro-batches of a loader to one clipped optimizer step."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    done = 0
    optimizer.zero_grad()
    while done < steps:
        for x, y in loader(batch_size=8):
            (F.cross_entropy(model(x), y) / 4).backward()
            done += 1
            if done % 4 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


@healthy
def gradient_accumulation_without_a_loader(steps: int) -> None:
    """An inner loop over micro-batches; gradients are zeroed in place."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps // 3):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            x, y = points(32)
            loss = F.cross_entropy(model(x), y) / 3
            loss.backward()
        optimizer.step()


@healthy
def gradients_set_to_none_by_hand(steps: int) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = points()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for p in model.parameters():
            p.grad = None


@healthy
def gradients_zeroed_in_place_by_hand(steps: int) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = points()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@healthy
def gradients_taken_by_autograd_grad(steps: int) -> None:
    """`torch.autograd.grad` and an update by hand: no optimizer, nothing ever accumulates."""
    model = perceptron()
    for _ in range(steps):
        x, y = points()
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(g, alpha=0.1)


@healthy
def gradients_zeroed_by_the_model(steps: int) -> None:
    """`model.zero_grad()` at the top of the loop, as older tutorials have it."""
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x, y = points()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@healthy
def full_batch_with_lbfgs(steps: int) -> None:
    x, y = points()
    model = perceptron(8)
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@healthy
def warm_up_from_zero(steps: int) -> None:
    """A linear warm-up whose first learning rate is exactly 0, then a cosine."""
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 10))
    for _ in range(steps):
        x, y = points()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rise.step()


@healthy
def sharpness_aware_minimisation(steps: int) -> None:
    """Two passes for one step: climb to the worst neighbour, take the gradient, come back."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        x, y = points()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            grads = [p.grad.clone() for p in model.parameters()]
            norm = torch.stack([g.norm() for g in grads]).norm()
            for p, g in zip(model.parameters(), grads, strict=True):
                p.add_(0.05 * g / (norm + 1e-12))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(0.05 * g / (norm + 1e-12))
        optimizer.step()
        optimizer.zero_grad()


@healthy
def evaluation_only(steps: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.BatchNorm1d(16), nn.ReLU(),
                          nn.Dropout(0.5), nn.Linear(16, 4))  # fmt: skip
    # A network that was trained before: its statistics are no longer those of a fresh one.
    for x, _ in loader():
        model(x)
    model.eval()
    correct = seen = done = 0
    with torch.no_grad():
        while done < steps:
            for x, y in loader():
                correct += int((model(x).argmax(1) == y).sum())
                seen += len(y)
                done += 1


@healthy
def regression_with_several_losses_backward(steps: int) -> None:
    """Two calls of backward() over one graph, for two losses, then one step."""
    trunk, mean, spread = nn.Linear(8, 16), nn.Linear(16, 1), nn.Linear(16, 1)
    model = nn.ModuleList([trunk, mean, spread])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = line()
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = F.softplus(trunk(x))
        F.mse_loss(mean(hidden), y).backward(retain_graph=True)
        (0.1 * F.l1_loss(spread(hidden), (y - mean(hidden)).abs().detach())).backward()
        optimizer.step()


@healthy
def one_optimizer_for_each_part(steps: int) -> None:
    """Encoder and head have an optimizer each; both step after one backward."""
    encoder, head = nn.Sequential(nn.Linear(2, 16), nn.ELU()), nn.Linear(16, 2)
    slow = torch.optim.SGD(encoder.parameters(), lr=0.01)
    fast = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(steps):
        x, y = points()
        slow.zero_grad()
        fast.zero_grad()
        F.cross_entropy(head(encoder(x)), y).backward()
        slow.step()
        fast.step()
