"""Training programs that use torch in every way there is: the same bits traced, nothing found."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

from tensortrace.records import Module
from tests.neutral import (
    EVERY,
    STEPS,
    assert_neutral,
    assert_seen,
    assert_silent,
    descend,
    one_thread,
    state,
)

WEIGHT_NORM = r"`torch\.nn\.utils\.weight_norm` is deprecated"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def rings(n: int = 32) -> tuple[Tensor, Tensor]:
    """Points (n, 2) and their class (n,): inside the unit circle or not."""
    x = torch.randn(n, 2)
    return x, (x.square().sum(1) > 1.4).long()


def classifier(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))


def fit_rings(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    x, y = rings()
    return descend(model, lambda i: F.cross_entropy(model(x), y), optimizer)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(16, 2)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        packed = rnn.pack_sequence(sequences, enforce_sorted=False)
        packed = packed._replace(data=self.embed(packed.data))
        output, _ = rnn.pad_packed_sequence(self.lstm(packed)[0])
        return self.head(output.mean(0))


def lstm_with_packed_sequences() -> list[Any]:
    model = Tagger()
    sequences = [torch.randint(12, (n,)) for n in (5, 7, 2, 4)]
    labels = torch.tensor([0, 1, 1, 0])
    return descend(model, lambda i: F.cross_entropy(model(sequences), labels))


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(2, 16)), nn.LeakyReLU(), norm(nn.Linear(16, 2)))


def spectral_norm_by_hook() -> list[Any]:
    return fit_rings(normed(nn.utils.spectral_norm))


def spectral_norm_by_parametrization() -> list[Any]:
    return fit_rings(normed(parametrizations.spectral_norm))


def weight_norm_by_hook() -> list[Any]:
    return fit_rings(normed(nn.utils.weight_norm))


def weight_norm_by_parametrization() -> list[Any]:
    return fit_rings(normed(parametrizations.weight_norm))


def checkpointed(use_reentrant: bool) -> list[Any]:
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh()) for _ in range(3)
    )
    model = nn.ModuleDict({"stem": nn.Linear(2, 8), "blocks": blocks, "head": nn.Linear(8, 2)})
    x, y = rings()

    def loss(i: int) -> Tensor:
        hidden = model["stem"](x)
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=use_reentrant)
        return F.cross_entropy(model["head"](hidden), y)

    return descend(model, loss)


def checkpoint_reentrant() -> list[Any]:
    return checkpointed(use_reentrant=True)


def checkpoint_without_reentrance() -> list[Any]:
    return checkpointed(use_reentrant=False)


def autocast_with_scaler() -> list[Any]:
    model = nn.Sequential(nn.Linear(2, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10)
    x, y = rings()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return state(model, optimizer, losses, scaler)


def replica_of(module: nn.Module) -> nn.Module:
    """What `nn.parallel.replicate` makes, which itself wants GPUs: shallow, with copied weights."""
    replica: Any = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    for name, parameter in module._parameters.items():
        copied = parameter.clone()  # the copy belongs to the graph, as broadcast makes it
        setattr(replica, name, copied)
        replica._former_parameters[name] = copied
    return replica


class DataParallel(nn.DataParallel):
    """`nn.DataParallel` without GPUs: a replica and a thread for each half of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(2)
        replicas = [replica_of(self.module) for _ in parts]
        outputs: list[Any] = [None] * len(parts)

        def work(rank: int) -> None:
            with torch.enable_grad():
                outputs[rank] = replicas[rank](parts[rank])

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat(outputs)


def data_parallel_threads() -> list[Any]:
    return fit_rings(DataParallel(classifier()))


def functional_gradients() -> list[Any]:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = rings()

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    losses = []
    for _ in range(STEPS):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        grads, loss = torch.func.grad_and_value(loss_of)(parameters)
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name]
        optimizer.step()
        losses.append(loss)
    return state(model, optimizer, losses)


def per_sample_gradients() -> list[Any]:
    """Each sample's gradient clipped on its own, as for differential privacy."""
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = rings()

    def loss_of(parameters: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (xi[None],)), yi[None])

    each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0))
    losses = []
    for _ in range(STEPS):
        grads, loss = each({n: p.detach() for n, p in model.named_parameters()}, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        scale = (1.0 / norms).clamp(max=1.0)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.tensordot(scale, grads[name], dims=1) / len(x)
        optimizer.step()
        losses.append(loss.mean())
    return state(model, optimizer, losses)


def ensemble_by_vmap() -> list[Any]:
    models = [classifier() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    x, y = rings()

    def call(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x,))

    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = torch.func.vmap(call)(parameters, buffers)
        loss = F.cross_entropy(outputs.flatten(0, 1), y.repeat(3))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    kept = [t for p in parameters.values() for t in (p.detach(), p.grad)]
    return state(kept, optimizer, losses)


def gradient_penalty() -> list[Any]:
    critic = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 1))
    real, fake = torch.randn(16, 2) + 1, torch.randn(16, 2)

    def loss(i: int) -> Tensor:
        mixed = torch.lerp(fake, real, torch.rand(16, 1)).requires_grad_()
        (grad,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (grad.norm(dim=1) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + penalty

    return descend(critic, loss)


def lbfgs() -> list[Any]:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4, history_size=5)
    x = torch.rand(24, 2)
    y = (x[:, :1] * x[:, 1:]).sin()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).detach() for _ in range(STEPS)]
    return state(model, losses)


def sparse_embedding() -> list[Any]:
    embed, head = nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, 2)
    model = nn.Sequential(embed, head)
    optimizers = (
        torch.optim.SparseAdam(embed.parameters(), lr=0.05),
        torch.optim.Adam(head.parameters(), lr=0.05),
    )
    words, labels = torch.randint(20, (16, 5)), torch.arange(16) % 2
    losses = []
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(words), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return state(model, *optimizers, losses)


PROGRAMS: dict[Callable[[], list[Any]], tuple[str, ...]] = {
    lstm_with_packed_sequences: (),
    spectral_norm_by_hook: (),
    spectral_norm_by_parametrization: (),
    weight_norm_by_hook: (WEIGHT_NORM,),
    weight_norm_by_parametrization: (),
    checkpoint_reentrant: (),
    checkpoint_without_reentrance: (),
    autocast_with_scaler: (),
    data_parallel_threads: (),
    functional_gradients: (),
    per_sample_gradients: (),
    ensemble_by_vmap: (),
    gradient_penalty: (),
    lbfgs: (),
    sparse_embedding: (),
}
# Under functorch no module sees a gradient, and these two put theirs into .grad by hand.
WITHOUT_BACKWARD = {functional_gradients, per_sample_gradients, ensemble_by_vmap}


@pytest.mark.parametrize(("level", "every"), [*(("module", every) for every in EVERY), ("op", 1)])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_training_is_the_same_traced_and_nothing_is_found(
    program: Callable[[], list[Any]], level: str, every: Any
) -> None:
    records = assert_neutral(program, PROGRAMS[program], level=level, every=every)
    assert_silent(records)
    updates = 2 * STEPS if program is sparse_embedding else STEPS
    assert_seen(records, updates, backward=program not in WITHOUT_BACKWARD)


def test_modules_made_anew_in_each_step_are_described_once() -> None:
    records = assert_neutral(data_parallel_threads, every=1)
    described = Counter((module.path, module.cls) for module in records.of(Module) if module.cls)
    assert described["Sequential.0", "Linear"] == 1
    assert set(described.values()) == {1}
