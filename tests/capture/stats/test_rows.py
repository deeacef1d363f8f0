"""How far rows differ, against float64 and on the tensors that a run describes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.stats.rows import row_spread, row_spread_now
from tensortrace.records import Call, Param
from tests.capture import Recorded


def oracle(x):
    wide = x.detach().flatten(1).double()
    return ((wide - wide.mean(0)).norm() / wide.norm()).item()


TENSORS = {
    "matrix": lambda: torch.randn(8, 5),
    "images": lambda: 3 + torch.randn(4, 3, 8, 8),
    "parameter": lambda: nn.Parameter(torch.randn(6, 7)),
    "half": lambda: torch.randn(8, 16).half(),
    "transposed": lambda: torch.randn(5, 8).t(),
    "channels last": lambda: torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 5).expand(8, 5),
}


needs_kernel = pytest.mark.skipif(compiled.kernel is None, reason="without the compiled kernel")
CONTIGUOUS = {
    "matrix": lambda: torch.randn(8, 5),
    "double": lambda: torch.randn(8, 5, dtype=torch.float64),
    "half": lambda: torch.randn(8, 16).half(),
    "bfloat16": lambda: torch.randn(8, 16).bfloat16(),
    "some rows": lambda: torch.randn(33, 5),
    "some columns": lambda: 1 + torch.randn(3, 1025),
    "images": lambda: 3 + torch.randn(100, 3, 33, 31),
    "alike": lambda: torch.randn(1, 700).repeat(20, 1),
    "nearly alike": lambda: 1e6 + torch.randn(20, 700, dtype=torch.float64),
    "first row apart": lambda: torch.cat([torch.full((1, 9), 1e3), torch.randn(7, 9)]),
    "zeros": lambda: torch.zeros(3, 4),
    "not finite": lambda: torch.tensor([[1.0, torch.inf], [2.0, 3.0]]),
}


@needs_kernel
@pytest.mark.parametrize("kind", CONTIGUOUS)
def test_the_compiled_kernel_says_what_torch_says_of_the_same_sample(kind):
    torch.manual_seed(0)
    x = CONTIGUOUS[kind]()
    wide = row_spread(x.double()) if kind == "nearly alike" else row_spread(x)
    assert row_spread_now(x) == pytest.approx(wide.item(), rel=1e-3, abs=1e-6, nan_ok=True)
    sample = x[:: -(-len(x) // 16)].flatten(1)
    sample = sample[:, :: -(-sample.shape[1] // 512)]
    assert row_spread_now(x) == pytest.approx(oracle(sample), rel=1e-9, abs=1e-9, nan_ok=True)


@needs_kernel
@pytest.mark.parametrize(
    "x",
    [torch.randn(5), torch.randn(1, 5), torch.arange(6).view(2, 3), torch.empty(0, 3),
     torch.empty(3, 0), torch.eye(3).to_sparse(), torch.empty(2, 3, device="meta"),
     torch.randn(5, 8).t(), torch.randn(1, 5).expand(8, 5), torch.randn(4, 6)[:, ::2]],
)  # fmt: skip
def test_what_the_compiled_kernel_may_not_read_is_left_to_torch(x):
    assert row_spread_now(x) is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_not_measured():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    assert row_spread_now(nested) is row_spread(nested) is None


@needs_kernel
def test_nonsense_about_rows_is_refused():
    with pytest.raises(TypeError, match="spread"):
        compiled.kernel.spread(torch.zeros(2, 3))
    assert compiled.kernel.spread(torch.zeros(2, 3), 4, 16, 512) is None
    assert compiled.kernel.spread(torch.zeros(2, 3), 2, 0, 512) is None


@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_small_is_measured_whole(kind):
    torch.manual_seed(0)
    x = TENSORS[kind]()
    assert row_spread(x).item() == pytest.approx(oracle(x), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_of_what_is_large_a_sample_is_enough(layout):
    torch.manual_seed(0)
    x = (2 + torch.randn(100, 16, 32, 32)).to(memory_format=layout)
    assert row_spread(x).item() == pytest.approx(oracle(x), rel=0.05)


@pytest.mark.parametrize(
    "x",
    [torch.randn(5), torch.randn(1, 5), torch.arange(6).view(2, 3), torch.empty(0, 3),
     torch.empty(3, 0), torch.eye(3).to_sparse(), torch.empty(2, 3, device="meta")],
)  # fmt: skip
def test_what_has_no_two_rows_of_numbers_is_not_measured(x):
    assert row_spread(x) is None


def test_zeros_have_no_spread():
    assert row_spread(torch.zeros(3, 4)).isnan()


def steps(count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made, before = [], []
    for _ in range(count):
        out = model(torch.randn(16, 4))
        made.append(oracle(out))
        F.cross_entropy(out, torch.zeros(16, dtype=torch.long)).backward()
        before.append([(oracle(p), oracle(p.grad)) for p in model.parameters() if p.dim() > 1])
        optimizer.step()
        optimizer.zero_grad()
    return made, before


def test_outputs_of_the_model_say_it_in_the_first_steps_and_then_in_one_of_ten():
    records = Recorded()
    with trace(out=records.append, every=1):
        made, _ = steps(31)
    told = {r.step: t.row_spread for r in records.of(Call) for t in r.tensors
            if r.phase == "forward" and t.row_spread is not None}  # fmt: skip
    assert list(told) == [*range(20), 20, 30]
    assert told == {step: pytest.approx(made[step], rel=1e-5) for step in told}


def test_weights_and_their_gradients_say_it_at_their_first_two_steps():
    records = Recorded()
    with trace(out=records.append, every=1):
        _, before = steps(6)
    told = [(p.value.row_spread, p.grad.row_spread) for p in records.of(Param)
            if len(p.value.shape) > 1]  # fmt: skip
    expected = [pair for step in before[:2] for pair in step]
    assert told[:4] == [pytest.approx(pair, rel=1e-5) for pair in expected]
    assert told[4:] == [(None, None)] * 8


def test_a_cell_that_is_called_over_and_over_is_compared_four_times_a_step():
    records = Recorded()
    with trace(out=records.append, every=1):
        cell, state = nn.LSTMCell(3, 5), None
        for _ in range(9):
            state = cell(torch.randn(4, 3), state)
        state[0].sum().backward()
    spread = [t for r in records.of(Call) for t in r.tensors if t.row_spread is not None]
    assert len(spread) == 4
