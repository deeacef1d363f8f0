"""`trace(level="op")`: every tensor function call is a record, and no program notices."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.records import Call, Location
from tests.capture import Recorded, record
from tests.neutral import assert_neutral

Level = Literal["module", "op"]
LEVELS: tuple[Level, ...] = ("module", "op")


def line_of(location: Location | None) -> str:
    assert location is not None
    lines, _ = inspect.getsourcelines(inspect.getmodule(line_of))  # type: ignore[arg-type]
    return lines[location.line - 1].strip()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return torch.exp(h)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x) - 1
        return self.head(h)


def at_op_level(program: Callable[[], Any], **options: Any) -> Recorded:
    return record(lambda t: program(), level="op", **options)


def test_op_inside_modules_has_its_module_its_parent_and_its_line() -> None:
    model, x = Net(), torch.rand(2, 4)
    records = at_op_level(lambda: model(x))
    placed = {(c.module, c.op): c for c in records.ops()}
    assert list(placed) == [
        ("block.fc", "linear"), ("block", "exp"), ("", "sub"), ("head", "linear"),
    ]  # fmt: skip
    for (path, _), call in placed.items():
        assert call.parent == records.module(str(path)).seq
    assert line_of(placed["block", "exp"].location) == "return torch.exp(h)"
    assert line_of(placed["", "sub"].location) == "h = self.block(x) - 1"
    # The user's own line, not torch's.
    assert line_of(placed["head", "linear"].location) == "return self.head(h)"
    assert all(c.training for c in placed.values())


def test_values_can_be_followed_from_op_to_op_and_through_modules() -> None:
    records = at_op_level(lambda: Net()(torch.rand(2, 4)))
    exp, sub, (_, head) = records.op("exp"), records.op("sub"), records.ops(op="linear")
    assert sub.inputs[0][1] == exp.outputs[0][1] == records.module("block").outputs[0][1]
    assert head.inputs[0][1] == sub.outputs[0][1]


def test_backward_op_has_the_line_and_the_module_of_its_forward() -> None:
    records = at_op_level(lambda: Net()(torch.rand(2, 4)).sum().backward())
    (node,) = [c for c in records.of(Call, phase="backward") if c.node == "ExpBackward0"]
    forward = records.op("exp")
    assert (node.op, node.module, node.forward) == ("exp", "block", forward.seq)
    assert node.location == forward.location
    assert len(node.inputs) == len(node.outputs) == 1


def test_gradients_that_did_not_arrive_leave_their_place_empty() -> None:
    class Uses(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            _, last = (x * y).chunk(2, 1)
            return last

    records = at_op_level(
        lambda: Uses()(torch.rand(2, 4, requires_grad=True), torch.rand(2, 4)).sum().backward()
    )
    nodes = {c.node: c for c in records.of(Call, phase="backward")}
    product, parts = nodes["MulBackward0"], nodes["SplitBackward0"]
    assert [name for name, _ in product.inputs] == ["output[0]"]
    assert [name for name, _ in product.outputs] == ["input[0]"]
    assert [name for name, _ in parts.inputs] == ["output[1]"]
    assert [t.id for t in parts.tensors] == [n for _, n in (*parts.inputs, *parts.outputs)]


def test_without_the_compiled_kernel_the_same_backward_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def program() -> None:
        torch.manual_seed(0)
        x = torch.rand(3, 4, requires_grad=True)
        h = Net()(x.t().contiguous().t()).exp().chunk(2, 1)[0]
        (grad,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        (grad.square().sum() * math.inf).backward()

    def backward() -> list[dict[str, Any]]:
        calls = at_op_level(program).of(Call, phase="backward")
        return [
            {f: getattr(c, f) for f in c.__struct_fields__ if f not in ("host_ns", "tensors")}
            | {"tensors": [(t.id, t.shape, t.stride, t.nan, t.grad_fn) for t in c.tensors]}
            for c in calls
        ]

    compiled_ones = backward()
    monkeypatch.setattr("tensortrace.capture.compiled.kernel", None)
    assert backward() == compiled_ones
    assert len(compiled_ones) > 20


@pytest.mark.parametrize(
    ("run", "name", "expected"),
    [
        (lambda x: x.softmax(1), "softmax", {"dim": 1}),
        (lambda x: F.softmax(x, dim=-1, dtype=torch.float64), "softmax",
         {"dim": -1, "dtype": "float64"}),
        (lambda x: F.layer_norm(x, (4,), eps=1e-3), "layer_norm", {"eps": 1e-3}),
        (lambda x: F.dropout(x, p=0.25), "dropout", {"p": 0.25}),
        (lambda x: x.norm(p=3, dim=0), "norm", {"p": 3, "dim": 0}),
        (lambda x: x.add(x, alpha=0.5), "add", {"alpha": 0.5}),
        (lambda x: x.to(torch.float16), "to", {"dtype": "float16"}),
        (lambda x: x.sum((0, 1), True), "sum", {"dim": [0, 1], "keepdim": True}),
        (lambda x: x.clamp(0, math.inf), "clamp", {"min": 0, "max": "Infinity"}),
        (lambda x: x**0.5, "pow", {"exponent": 0.5}),
    ],
)  # fmt: skip
def test_arguments_that_matter_are_recorded(
    run: Callable[[Tensor], Any], name: str, expected: dict[str, Any]
) -> None:
    class Computes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return run(x)

    call = at_op_level(lambda: Computes()(torch.rand(2, 4))).op(name)
    assert expected.items() <= call.arguments.items()


@pytest.mark.parametrize(
    ("run", "name", "expected"),
    [
        (lambda x: 2**x, "pow", {"base": 2}),
        (lambda x: torch.pow(3.0, x), "pow", {"base": 3.0}),
        (lambda x: 5 / x, "div", {"self": 5}),
        (lambda x: x / 5, "div", {"other": 5}),
        (lambda x: 2 - x, "sub", {"self": 2}),
        (lambda x: x - 2, "sub", {"other": 2}),
        (lambda x: 5 // x, "floor_divide", {"self": 5}),
        (lambda x: 5 % x, "remainder", {"self": 5}),
        (lambda x: x.view(4, 2), "view", {"shape": [4, 2]}),
        (lambda x: x.reshape((4, -1)), "reshape", {"shape": [4, -1]}),
        (lambda x: x.sum().view(()), "view", {"shape": []}),
        (lambda x: x.view(torch.int32), "view", {"dtype": "int32"}),
        (lambda x: x.permute(1, 0), "permute", {"dims": [1, 0]}),
        (lambda x: x + torch.randn(2, 4), "randn", {"shape": [2, 4]}),
        (lambda x: x + torch.full((2, 4), 7.0), "full", {"shape": [2, 4], "fill_value": 7.0}),
        (lambda x: x + torch.arange(4), "arange", {"0": 4}),
        (lambda x: x @ torch.eye(4), "eye", {"n": 4}),
        (lambda x: torch.einsum("ij,ij->i", x, x), "einsum", {"equation": "ij,ij->i"}),
        (lambda x: torch.cat([x, x], 1), "cat", {"1": 1}),
        (lambda x: x + torch.tensor(3.0), "tensor", {}),
    ],
)
def test_arguments_by_position_are_told_apart(
    run: Callable[[Tensor], Any], name: str, expected: dict[str, Any]
) -> None:
    call = at_op_level(lambda: run(torch.rand(2, 4))).op(name)
    assert call.arguments == expected


def test_op_in_place_has_its_input_as_it_was_and_the_output_says_previous() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.zero_()

    records = at_op_level(lambda: Overwrites()(torch.full((3,), 7.0)))
    call = records.op("zero_")
    before, after = records.input(call), records.output(call)
    assert (before.max, after.max) == (7.0, 0.0)
    assert after.previous == before.id


def test_view_names_the_tensor_that_it_is_a_view_of() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, 3).t()[1:]

    x = torch.rand(3, 4)
    records = at_op_level(lambda: Views()(x))
    assert [c.op for c in records.ops()] == ["view", "t", "getitem"]
    source = records.input(records.op("view"))
    for call in records.ops():
        assert records.output(call).view_of == source.id


def test_ops_of_worker_threads_are_seen_inside_their_modules() -> None:
    model = Net()

    def program() -> None:
        model(torch.rand(2, 4))
        thread = threading.Thread(target=lambda: model(torch.rand(2, 4)))
        thread.start()
        thread.join()

    records = at_op_level(program)
    threads = {c.thread for c in records.ops(op="exp")}
    assert len(threads) == 2
    for call in records.ops(op="exp"):
        (parent,) = [c for c in records.modules(module="block") if c.seq == call.parent]
        assert parent.thread == call.thread


def test_compiled_function_is_not_compiled_anew_when_the_block_opens_and_closes() -> None:
    frames = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x * 2).exp().sum(), backend=backend, fullgraph=True)
    x = torch.rand(3)
    expected = compiled(x)
    for _ in range(6):
        with trace(out=lambda _: None, level="op"):
            assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()
    assert len(frames) <= 2


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("make", [attention, encoder])
@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_fused_attention_is_taken_as_without_a_trace(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 5, 8)

    def program() -> list[Tensor]:
        with torch.no_grad():
            out = model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
        return [out]

    records = assert_neutral(program, level="op", every=1)
    # The fused kernel is one call of torch's own: nothing inside it is a record.
    assert "softmax" not in {c.op for c in records.ops()}
    # With grad there is no fast path: the ops are seen, by the names that their user knows.
    records = at_op_level(lambda: model.train()(*(x,) * (3 if make is attention else 1)))
    assert "multi_head_attention_forward" in {c.op for c in records.ops()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_ops_that_a_checkpoint_recomputes_are_marked(use_reentrant: bool) -> None:
    block = Block()
    x = torch.rand(2, 4, requires_grad=True)

    def program() -> None:
        out = checkpointing.checkpoint(block, x, use_reentrant=use_reentrant)
        assert isinstance(out, Tensor)
        out.sum().backward()

    records = at_op_level(program)
    first, again = records.ops(op="exp")
    assert (first.recompute, again.recompute) == (False, True)
    modules = records.modules(module=first.module)
    assert again.parent == next(c.seq for c in modules if c.recompute)


def test_functorch_transforms_run_and_their_ops_are_described() -> None:
    model = Net()
    parameters = dict(model.named_parameters())
    x = torch.rand(3, 4)

    def loss(values: Any, one: Tensor) -> Tensor:
        out = torch.func.functional_call(model, values, (one,))
        assert isinstance(out, Tensor)
        return out.square().sum()

    def program() -> list[Tensor]:
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return [*per_sample.values()]

    records = assert_neutral(program, level="op", every=1)
    assert "square" in {c.op for c in records.ops()}


def test_data_parallel_without_devices_is_transparent() -> None:
    model = nn.DataParallel(Net())
    records = at_op_level(lambda: model(torch.rand(2, 4)))
    assert {c.module for c in records.ops()} >= {"block", "block.fc", "head"}


def test_no_mode_is_left_on_the_stack_after_a_module_that_raises() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    def program() -> None:
        with pytest.raises(ValueError):
            nn.Sequential(Fails())(torch.rand(2))
        torch.exp(torch.rand(2))

    depth = torch._C._len_torch_function_stack()
    records = at_op_level(program)
    assert torch._C._len_torch_function_stack() == depth
    assert records.op("exp").module is None


# What is not finite by design, at both levels, inside a module and outside of all.


def causal_mask(x: Tensor) -> Tensor:
    scores = x @ x.mT
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def additive_mask(x: Tensor) -> Tensor:
    mask = torch.full((4, 4), -math.inf).triu(1)
    return (x @ x.mT + mask).softmax(-1)


def log_of_one_hot(x: Tensor) -> Tensor:
    allowed = F.one_hot(torch.tensor([0, 1, 2, 3]), 4).float()
    return (x + allowed.log()).softmax(-1)


def log_of_one_hot_multiplied_away(x: Tensor) -> Tensor:
    p = F.one_hot(torch.tensor([0, 1, 2, 3]), 4).float()
    entropy = torch.where(p > 0, p * p.log(), torch.zeros(()))
    return x + entropy


def logsumexp_with_hidden_entries(x: Tensor) -> Tensor:
    return x.index_fill(-1, torch.tensor([1]), -math.inf).logsumexp(-1)


def zero_times_a_mask_replaced(x: Tensor) -> Tensor:
    return x + (torch.full((4,), -math.inf) * 0).nan_to_num(0)


def attention_with_a_row_that_sees_nothing(x: Tensor) -> Tensor:
    seen = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    return F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=seen)


def largest_of_nothing_yet(x: Tensor) -> Tensor:
    best = torch.full((4,), -math.inf)
    for row in x:
        best = torch.maximum(best, row)
    return best


def uninitialised_memory(x: Tensor) -> Tensor:
    made = [torch.empty(4, 4), torch.empty_like(x), x.new_empty(4, 4)]
    assert all(memory.isnan().all() for memory in made)  # `filled_memory`
    return x + made[0].zero_()


HEALTHY = [
    causal_mask, additive_mask, log_of_one_hot, log_of_one_hot_multiplied_away,
    logsumexp_with_hidden_entries, zero_times_a_mask_replaced,
    attention_with_a_row_that_sees_nothing, largest_of_nothing_yet, uninitialised_memory,
]  # fmt: skip


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    """Let torch fill memory that nothing was written to with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Around(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.fc(x))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("f", HEALTHY)
def test_what_is_infinite_by_design_is_a_note_at_most(
    f: Callable[[Tensor], Tensor], inside: bool, level: Level
) -> None:
    torch.manual_seed(0)
    model = Around(f) if inside else nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with trace(out=Recorded().append, every=1, level=level) as t:
        for _ in range(2):
            out = model(torch.randn(4, 4))
            loss = (out if inside else f(out)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [f.message for f in t.findings if f.severity != "note"] == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inside", [True, False])
def test_step_that_a_scaler_skips_is_a_note(inside: bool, level: Level) -> None:
    torch.manual_seed(0)

    def overflow(x: Tensor) -> Tensor:
        return (x * 1e4).half().float()

    model = Around(overflow) if inside else nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with trace(out=Recorded().append, every=1, level=level) as t:
        for _ in range(2):
            out = model(torch.rand(4, 4))
            loss = (out if inside else overflow(out)).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert [f.message for f in t.findings if f.severity != "note"] == []
