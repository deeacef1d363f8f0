"""Dead units are counted as one would by hand, at either level, whatever shape they come in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.stats.queue import StatsQueue, stats_of
from tensortrace.capture.stats.units import Units
from tensortrace.records import Call
from tests.capture import Recorded
from tests.neutral import one_thread

DEAD = 3


def kill(layer, count=DEAD):
    """Give the first units of a layer a bias that nothing can lift above 0."""
    with torch.no_grad():
        layer.bias[:count] = -1e6
    return layer


def flattened_images():
    conv = kill(nn.Conv2d(2, 8, 3))
    return lambda: F.max_pool2d(F.relu(conv(torch.randn(16, 2, 6, 6))), 2).flatten(1), 8


def rectified_after_flatten(norm=None):
    conv = nn.Conv2d(2, 8, 3)
    kill(conv if norm is None else norm)
    return lambda: F.relu((norm or nn.Identity())(conv(torch.randn(16, 2, 6, 6))).flatten(1)), 8


def with_shortcut():
    conv, norm = nn.Conv2d(3, 8, 1), kill(nn.BatchNorm2d(8))
    return lambda: F.relu(norm(conv(torch.randn(16, 3, 6, 6))) + 0.1), 8


def simple(layer, *shape, act=F.relu):
    kill(layer)
    return lambda: act(layer(torch.randn(shape))), len(layer.bias)


KINDS = {
    "linear": lambda: simple(nn.Linear(4, 10), 64, 4),
    "linear over positions": lambda: simple(nn.Linear(4, 10), 16, 10, 4),
    "linear over images": lambda: simple(nn.Linear(4, 10), 4, 10, 10, 4),
    "convolution": lambda: simple(nn.Conv2d(2, 9, 3), 8, 2, 7, 7),
    "convolution over time": lambda: simple(nn.Conv1d(2, 9, 3), 8, 2, 11),
    "convolution over space": lambda: simple(nn.Conv3d(2, 9, 3), 4, 2, 6, 6, 6),
    "spectral norm": lambda: simple(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 10)), 64, 4
    ),
    "relu6": lambda: simple(nn.Linear(4, 10), 64, 4, act=nn.ReLU6()),
    "in place": lambda: simple(nn.Linear(4, 10), 64, 4, act=nn.ReLU(inplace=True)),
    "threshold": lambda: simple(nn.Linear(4, 10), 64, 4, act=lambda x: F.threshold(x, 0, 0)),
    "pooled": lambda: simple(nn.Conv2d(2, 9, 3), 8, 2, 8, 8,
                             act=lambda x: F.max_pool2d(F.relu(x), 2)),
    "flattened": flattened_images,
    "flattened before": rectified_after_flatten,
    "normed and flattened before": lambda: rectified_after_flatten(nn.BatchNorm2d(8)),
    "positions as rows": lambda: simple(
        nn.Linear(4, 10), 16, 10, 4, act=lambda x: F.relu(x.view(160, 10))
    ),
    "with a shortcut": with_shortcut,
}  # fmt: skip


def look(units, make, step):
    queue = StatsQueue()
    tickets = units.look(make(), step, queue)
    queue.resolve()
    return tickets and (
        tickets.units, stats_of(tickets.dead).min, stats_of(tickets.since).min
    )  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_units_that_are_never_above_zero_are_dead_after_eight_steps(name):
    torch.manual_seed(0)
    make, count = KINDS[name]()
    units = Units()
    said = [look(units, make, step) for step in range(3, 11)]
    assert said[:7] == [None] * 7
    assert said[7] == (count, DEAD, 3)


def test_few_rows_take_more_steps():
    make, _ = simple(nn.Linear(4, 10), 20, 4)
    units = Units()
    said = [look(units, make, step) for step in range(15)]
    assert [step for step, one in enumerate(said) if one] == [14]


def test_a_unit_that_is_above_zero_once_is_alive_and_dies_again():
    layer = kill(nn.Linear(4, 10))
    units = Units()
    said = {}
    for step in range(20):
        x = torch.randn(64, 4)
        pushed = torch.zeros(10)
        pushed[0] = 2e6 if step == 6 else 0
        said[step] = look(units, lambda x=x, pushed=pushed: F.relu(layer(x) + pushed), step)
    assert said[13] == (10, DEAD - 1, 0)
    assert said[14] == (10, DEAD, 7)


def test_a_layer_that_is_called_twice_lives_in_either_call():
    layer = nn.Linear(4, 10)
    units = Units()
    for step in range(12):
        low = look(units, lambda: F.relu(layer(torch.randn(64, 4)) - 1e6), step)
        high = look(units, lambda: F.relu(layer(torch.randn(64, 4)) + 1e6), step)
        assert (low is None) == (step < 7)
        assert (high is None) == (step < 7)
    assert (low[1], high[1]) == (0, 0)


def test_a_nan_is_no_sign_of_death():
    layer = nn.Linear(4, 10)
    with torch.no_grad():
        layer.bias[0] = torch.nan
    units = Units()
    said = [look(units, lambda: F.relu(layer(torch.randn(64, 4))), step) for step in range(9)]
    assert said[-1][1] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(64, 10).relu(),  # no layer
        lambda: torch.randn(64, 10, requires_grad=True).relu(),
        lambda: F.gelu(nn.Linear(4, 10)(torch.randn(64, 4))),
        lambda: F.relu(nn.Linear(4, 10)(torch.randn(4))),
        lambda: F.relu(nn.Linear(4, 10)(torch.randn(0, 4))),
        lambda: F.relu(nn.Linear(4, 5000)(torch.randn(2, 4))),
        lambda: F.relu(nn.Linear(4, 6)(torch.randn(4, 5, 4))).flatten(1),
        lambda: torch.randn(4, 6).view(6, 4),
        lambda: F.relu(nn.Conv1d(2, 4, 3)(torch.randn(64, 2, 6)).transpose(1, 2).flatten(1)),
        lambda: F.relu(nn.Conv1d(2, 4, 3)(torch.randn(64, 2, 6)).view(128, 8)),
    ],
)
def test_what_has_no_units_is_left_alone(make):
    assert [look(Units(), make, step) for step in range(9)] == [None] * 9


def test_no_parameter_is_kept_alive_and_its_address_may_be_used_again():
    units = Units()
    for step in range(30):  # a layer made anew in each step has no history
        layer = kill(nn.Linear(4, 10))
        assert look(units, lambda layer=layer: F.relu(layer(torch.randn(64, 4))), step) is None


needs_kernel = pytest.mark.skipif(compiled.kernel is None, reason="without the compiled kernel")
LAYOUTS = {
    "features": (lambda x: x.flatten(0, 1), 1),
    "features over positions": (lambda x: x, 2),
    "channels": (lambda x: x.movedim(2, 1).contiguous(), 1),
    "channels last": (lambda x: x.movedim(2, 1).unsqueeze(-1).contiguous(
        memory_format=torch.channels_last), 1),
    "transposed": (lambda x: x.flatten(0, 1).t().contiguous().t(), 1),
    "one channel": (lambda x: x.amax(2, keepdim=True).movedim(2, 1).contiguous(), 1),
}  # fmt: skip


def rectified(dtype, rows, dead):
    """``(rows, 70, 90)`` with so many dead units, and what is not above 0 written in all ways."""
    x = torch.randn(rows, 70, 90).relu_().to(dtype)
    x[:, :, torch.randperm(90)[:dead]] = 0
    x[x == 0] = -0.0
    x[:, ::2][x[:, ::2] == 0] = -torch.inf
    x[:, ::3][x[:, ::3] == 0] = 0
    return x


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dead"), [(1, 3), (3, 0), (3, 20), (3, 89), (3, 90), (40, 31)])
def test_the_compiled_kernel_finds_the_units_that_torch_finds(layout, dtype, rows, dead):
    torch.manual_seed(rows + dead)
    lay, dim = LAYOUTS[layout]
    x = lay(rectified(dtype, rows, dead))
    others = [d for d in range(x.dim()) if d != dim]
    last = torch.randint(-1, 6, (x.shape[dim],)).float()
    expected = torch.where(~(x.amax(others) <= 0), 7.0, last)
    gone = expected[expected < 4]
    since = gone.max().item() + 1 if len(gone) else 0
    said = compiled.kernel.count_dead(x, last, x.stride(dim), 7, 4)
    assert torch.equal(last, expected)
    assert said == (len(gone), since)


@needs_kernel
@pytest.mark.parametrize("value", [1e-45, torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (4, 0), (4, 299), (2, 63), (2, 64)])
@pytest.mark.parametrize("apart", [1, 300])
def test_one_element_that_is_not_below_zero_keeps_a_unit_alive(value, at, apart):
    x = -torch.ones(5, 7, 300) if apart > 1 else -torch.ones(5, 300, 7)
    row, column = at
    (x[row, 3] if apart > 1 else x[row, :, 3])[column] = value
    last = torch.zeros(7)
    torch.set_flush_denormal(True)
    try:
        said = compiled.kernel.count_dead(x, last, apart, 2, 1)
    finally:
        torch.set_flush_denormal(False)
    assert (said, last.tolist()) == ((6, 1), [0, 0, 0, 2, 0, 0, 0])


@needs_kernel
@pytest.mark.parametrize(
    ("x", "last", "apart"),
    [
        (torch.zeros(4, 6)[:, ::2], torch.zeros(3), 1),
        (torch.zeros(4, 6, dtype=torch.int64), torch.zeros(6), 1),
        (torch.zeros(4, 6, device="meta"), torch.zeros(6), 1),
        (torch.zeros(0, 6), torch.zeros(6), 1),
        (torch.zeros(4, 6), torch.zeros(5), 1),
        (torch.zeros(4, 6), torch.zeros(6), 5),
        (torch.zeros(4, 6), torch.zeros(6), 0),
        (torch.zeros(4, 6), torch.zeros(6), 2**62),
        (torch.zeros(4, 6), torch.zeros(6, dtype=torch.float64), 1),
        (torch.zeros(2, 5000), torch.zeros(5000), 1),
        (torch.zeros(4, 6).to_sparse(), torch.zeros(6), 1),
        (None, torch.zeros(6), 1),
    ],
)
def test_what_the_compiled_kernel_may_not_read_is_left_to_torch(x, last, apart):
    assert compiled.kernel.count_dead(x, last, apart, 2, 1) is None
    assert not last.any()


@needs_kernel
def test_nonsense_about_units_is_refused():
    with pytest.raises(TypeError, match="count_dead"):
        compiled.kernel.count_dead(torch.zeros(2, 3))
    with pytest.raises(TypeError):
        compiled.kernel.count_dead(torch.zeros(2, 3), torch.zeros(3), "1", 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_that_moves_to_a_device_is_followed_there():
    units, layer = Units(), kill(nn.Linear(4, 10))
    look(units, lambda: F.relu(layer(torch.randn(64, 4))), 0)
    layer.cuda()
    told = [look(units, lambda: F.relu(layer(torch.randn(64, 4, device="cuda"))), step)
            for step in range(1, 10)]  # fmt: skip
    assert [t for t in told if t] == [(10, DEAD, 1)] * 2


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("act", [nn.ReLU(), F.relu])
def test_the_records_of_full_steps_carry_the_counts(level, act):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.act = kill(nn.Linear(4, 10)), nn.Linear(10, 2), act

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    records = Recorded()
    net = Net()
    with one_thread(), trace(out=records.append, level=level):
        for _ in range(12):
            net(torch.randn(64, 4)).sum().backward()
    told = {(r.step, t.units, t.dead, t.dead_since)
            for r in records.of(Call) for t in r.tensors if t.dead is not None}  # fmt: skip
    assert told == {(step, 10, DEAD, 0) for step in range(7, 12)}
