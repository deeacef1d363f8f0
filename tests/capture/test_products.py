"""Gradients of large weights in steps at rest: a sample shows what is not finite in a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tensortrace import trace
from tensortrace.capture import compiled, rest
from tensortrace.capture.stats import StatsQueue, summarize
from tensortrace.records import Call, Finding, Step

pytestmark = pytest.mark.skipif(
    compiled.kernel is None, reason="the kernel is not built, or switched off"
)

FROM, STEPS, BAD_AT = 20, 32, 27
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where cores are shared, two of them wait for each other
    with patch.object(rest, "RESTS_FROM", FROM):
        yield
    torch.set_num_threads(threads)


def look(grad: Tensor) -> tuple[Any, int | None]:
    """Statistics as a step at rest takes them, and from how many elements."""
    queue = StatsQueue()
    queue.lean = True
    found = queue.look_thinly(grad, 0)
    assert found is not None
    assert queue.alarmed == (found[1][10] is not None)
    return found[1], found[2] if len(found) > 2 else None


def bad(grad: Tensor) -> tuple[int, int, int]:
    stats = summarize(grad)
    return stats.nan, stats.posinf, stats.neginf


SHAPES = [(256, 512), (300, 700), (512, 640), (73, 4600), (260, 513), (60, 130, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_and_every_column_is_met(shape: tuple[int, ...]) -> None:
    rows, columns = shape[0], math.prod(shape[1:])
    grad = torch.ones(rows, columns)
    assert look(grad.view(shape))[1] is not None
    for row in range(rows):
        grad[row] = NAN
        assert look(grad.view(shape))[0][:3] == (columns, 0, 0)
        grad[row] = 1
    # Runs of 64 meet all columns or, at their ends, fail to: each eighth and the ends of some.
    for column in {*range(0, columns, 8), *range(130), *range(columns - 130, columns)}:
        grad[:, column] = -INF
        assert look(grad.view(shape))[0][:3] == (0, 0, rows)
        grad[:, column] = 1


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_bad_element_in_a_factor_of_a_product_is_seen(value: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    given, x = torch.randn(8, 300, generator=random), torch.randn(8, 700, generator=random)
    given[:, ::3] = 0  # dead units: what is infinite times zero is seen, too
    factor = (given, x)[seed % 2]
    at = torch.randint(factor.numel(), (), generator=random)
    factor.view(-1)[at] = value
    grad = given.t() @ x
    stats, sampled = look(grad)
    assert sampled is None
    assert stats[:3] == bad(grad) != (0, 0, 0)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_one_bad_element_around_a_convolution_is_seen(kernel: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    stride, padding, dilation = 1 + seed % 2, seed % 3, 1 + seed // 2 % 2
    inputs = max(64, 1024 // kernel**2)
    x = torch.randn(2, inputs, 9, 9, generator=random)
    weight = torch.randn(256, inputs, kernel, kernel, generator=random).requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    given = torch.randn(y.shape, generator=random)
    factor = (given, x)[seed % 4 // 2]
    # Corners and borders are what padding and stride treat in their own way.
    place = torch.randint(factor.numel(), (), generator=random)
    factor.view(-1)[place if seed % 5 else (0, -1)[seed % 2]] = (NAN, INF)[seed % 2]
    (grad,) = torch.autograd.grad(
        F.conv2d(x, weight, None, stride, padding, dilation), weight, given
    )
    stats, sampled = look(grad)
    assert (sampled is not None) == (bad(grad) == (0, 0, 0))
    assert stats[:3] == bad(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_and_zeros_are_extrapolated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = torch.randn(32, 1024, dtype=dtype).relu() * torch.rand(1024, dtype=dtype)
    grad = (given * (torch.rand(1024) < 0.3)).t() @ torch.randn(32, 1024, dtype=dtype)
    stats, sampled = look(grad)
    whole = summarize(grad)
    assert sampled is not None
    assert grad.numel() / 17 < sampled < grad.numel() / 14
    assert stats[8] == pytest.approx(whole.norm, rel=0.05)
    assert stats[3] == pytest.approx(whole.zeros, rel=0.05)
    assert stats[4:8] == (None,) * 4


def test_where_a_sample_holds_nothing_but_zeros_all_is_read() -> None:
    grad = torch.zeros(1024, 1024)
    for at in ((0, 100), (511, 0), (1023, 900)):
        grad[at] = 2.0
    stats, sampled = look(grad)
    assert (sampled, stats[3], stats[8]) == (None, 1024 * 1024 - 3, pytest.approx(math.sqrt(12)))


@pytest.mark.parametrize(
    "grad",
    [torch.ones(255, 512), torch.ones(512, 511), torch.ones(8, 40_000), torch.ones(1 << 18),
     torch.ones(1024, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024).t()[:, ::2],
     torch.ones(512, 64, 3, 3).to(memory_format=torch.channels_last)],
    ids=["few", "narrow", "flat", "one dim", "half", "gaps", "channels last"],
)  # fmt: skip
def test_of_others_all_is_read(grad: Tensor) -> None:
    stats, sampled = look(grad)
    assert sampled is None
    assert stats[8] == pytest.approx(math.sqrt(grad.numel()))


class Penalised(nn.Module):
    """A linear layer with a way of its own to use the weight."""

    def __init__(self, extra: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(512, 512), extra

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if self.extra is None else y + self.extra(self.layer.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(512, 512), nn.Linear(512, 512)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table((x.abs() * 100).long().clamp(max=511)[:, 0]))
        return out


class Convolved(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(128, 256, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(len(x), 128, 2, 2)).flatten(1)  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(512, 512), nn.Linear(512, 512)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.layer, self.first(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def with_hook() -> nn.Module:
    model = nn.Linear(512, 512)
    model.weight.register_hook(lambda grad: grad * 2)
    return model


class ByHand(nn.Module):
    """As the Conv1D of GPT-2: a weight that is not transposed, and three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(512, 512) / 22),
            nn.Parameter(torch.ones(512)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def run(
    model: nn.Module,
    steps: int = STEPS,
    loss_of: Callable[[Tensor, int], Tensor] = lambda y, step: y.square().mean(),
    **options: Any,
) -> tuple[list[Any], list[Finding]]:
    torch.manual_seed(1)
    records: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with trace(out=records.append, **{"every": 20, **options}) as t:
        for step in range(steps):
            loss_of(model(torch.randn(3, 512)), step).backward()
            optimizer.step()
            optimizer.zero_grad()
    return records, t.findings


def spoilt(y: Tensor, step: int) -> Tensor:
    return y.square().mean() * (NAN if step == BAD_AT else 1)


def sampled_in(model: nn.Module, loss_of: Callable[[Tensor, int], Tensor] = spoilt) -> set[str]:
    """The parameters of whose gradient a step at rest has read a sample."""
    records, _ = run(model, loss_of=loss_of)
    # A finding makes its step full, and the one before: so the log has the records of both.
    before = BAD_AT - 1
    assert before in {r.step for r in records if isinstance(r, Step) and r.rested}
    calls = [r for r in records if isinstance(r, Call) and r.step == before]
    sampled = {t.id for call in calls for t in call.tensors if t.sampled}
    return {
        f"{call.module}.{name}".lstrip(".")
        for call in calls
        for name, number in call.outputs
        if number in sampled
    }


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Linear(512, 512), {"weight"}),
        (ByHand, {"weight"}),
        (Penalised, {"layer.weight"}),
        (lambda: Penalised(lambda w: w.abs().mean()), set()),
        (lambda: Convolved(1), {"layer.weight"}),
        (lambda: Convolved(2), set()),
        (Tied, set()),
        (lambda: Checkpointed(reentrant=False), {"first.weight", "layer.weight"}),
        (lambda: Checkpointed(reentrant=True), {"first.weight"}),
        (lambda: parametrizations.weight_norm(nn.Linear(512, 512)), set()),
        (with_hook, set()),
        (lambda: nn.Linear(512, 255), set()),
    ],
    ids=["linear", "addmm", "inside", "penalty", "convolution", "groups", "tied", "checkpoint",
         "reentrant", "weight norm", "hook", "small"],
)  # fmt: skip
def test_weights_are_sampled_that_only_products_take(
    make: Callable[[], nn.Module], names: set[str]
) -> None:
    torch.manual_seed(0)
    assert sampled_in(make()) == names


def test_doubles_are_sampled_too() -> None:
    model = nn.Linear(512, 512, dtype=torch.float64)
    model.register_forward_pre_hook(lambda module, args: args[0].double())
    assert sampled_in(model) == {"weight"}


def test_a_gradient_that_also_comes_past_the_loss_is_read_in_full() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))

    def also(y: Tensor, step: int) -> Tensor:
        torch.autograd.grad(y.mean(), model[0].weight, retain_graph=True)
        return spoilt(y, step)

    assert sampled_in(model, also) == {"1.weight"}


def test_the_norm_in_the_step_line_is_near_the_true_one() -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    norms: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(
            math.hypot(*(p.grad.norm().item() for p in model.parameters()))  # type: ignore[union-attr]
        )
    )
    try:
        records, findings = run(model)
    finally:
        hook.remove()
    assert not findings
    lines = [r for r in records if isinstance(r, Step)]
    at_rest = [line for line in lines if line.rested]
    assert len(at_rest) > 8
    for line in at_rest:
        assert line.grad_norm == pytest.approx(norms[line.step], rel=0.03)
        assert line.grad_norm != pytest.approx(norms[line.step], rel=1e-5)


def key(finding: Finding) -> tuple[Any, ...]:
    location = finding.location
    return (finding.step, finding.code, finding.module, finding.op, finding.param,
            location and location.line, finding.evidence["placed"])  # fmt: skip


class Faulty(nn.Module):
    """A layer before what is healthy until a step, and behind it another."""

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(512, 512), nn.Linear(512, 512)
        self.fault, self.calls = fault, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.calls += 1
        return self.last(h if self.calls <= BAD_AT else self.fault(h))  # type: ignore[no-any-return]


def root_of_one_zero(h: Tensor) -> Tensor:
    none = torch.ones_like(h)
    none[1, 300] = 0
    return h + (h * none).abs().sqrt()


@pytest.mark.parametrize("kernel", ["compiled", "torch"])
def test_a_nan_of_one_element_in_backward_is_found_as_in_a_full_step(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch":
        monkeypatch.setattr(compiled, "kernel", None)
    torch.manual_seed(0)
    records, findings = run(Faulty(root_of_one_zero))
    assert BAD_AT in {r.step for r in records if isinstance(r, Step) and r.rested}
    torch.manual_seed(0)
    _, full = run(Faulty(root_of_one_zero), every=1)
    assert [f.code for f in findings] == ["TT102"]
    assert findings[0].location is not None
    assert findings[0].location.function == "root_of_one_zero"
    assert list(map(key, findings)) == list(map(key, full))


def test_a_penalty_that_spoils_one_element_of_a_weight_is_found_at_once() -> None:
    model = Penalised(lambda weight: (weight * zero).abs().sqrt().mean())
    zero = torch.ones(512, 512)
    calls = iter(range(STEPS))

    def spoil(*args: Any) -> None:
        if next(calls) == BAD_AT:
            zero[300, 7] = 0

    model.register_forward_pre_hook(spoil)
    _, findings = run(model)
    assert [(f.step, f.code) for f in findings] == [(BAD_AT, "TT102")]
